"""A submitit job's place among the others, as torchrun's environment variables.

Rank 0 listens on a port that no other process can have: it keeps the socket it bound until torch's
store takes that very socket over. The ports tried come from (job, restart), so every rank computes
the same short list, a restart uses fresh ones, and no file, shared folder or cluster setting
carries them. A rank that finds a listener on one of them asks for the word of this job and attempt,
so that neither a neighbour's job nor a process left over from an earlier attempt is taken for rank
0. This works before torch is imported: a rank that never comes is named after ``timeout`` seconds
instead of hanging a collective.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import ipaddress
import os
import socket
import struct
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

PORTS = range(
    20_000, 32_000
)  # below Linux's ephemeral ports: no outgoing connection takes one by chance
CANDIDATES = 16
POLL = 0.2  # seconds between two rounds of asking
SIOCGIFADDR = 0x8915  # linux/sockios.h: address of a network interface


class Missing(RuntimeError):
    """Some ranks did not come."""


def join(
    key: str, rank: int, size: int, local_rank: int, hosts: list[str], timeout: float = 600
) -> Any:
    """Meet the other ranks and set ``RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT``.

    Args:
        key: of this job and attempt; differs from that of any other.
        rank, size, local_rank: this process, the number of all, and its number on this node.
        hosts: names or addresses under which rank 0's node may be reached.
        timeout: seconds until the missing ranks are given up.

    Returns:
        What has to be kept as long as the process group lives (rank 0's store), or None.

    Raises:
        Missing: names the ranks that did not come, or rank 0's addresses.
    """
    if size == 1:
        return None
    deadline = time.monotonic() + timeout
    if rank == 0:
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(listen(key))
            interface = welcome(listener, key, size, deadline)
            address, port = "127.0.0.1", listener.getsockname()[1]
            export(rank, size, local_rank, address, port, interface)
            return serve(listener, size)
    address, port, interface = find(key, rank, addresses(hosts), deadline)
    export(rank, size, local_rank, address, port, interface)
    return None


def export(rank: int, size: int, local_rank: int, address: str, port: int, interface: str) -> None:
    """Set torchrun's variables; the store is already there, as under torchrun's agent."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(local_rank),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    if interface:  # gloo would take the host name's address, which many images map to 127.0.1.1
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def candidates(key: str) -> list[int]:
    """The ports of this job and attempt, in the order in which they are tried."""
    digest = hashlib.sha256(key.encode()).digest()
    first, stride = int.from_bytes(digest[:4]), int.from_bytes(digest[4:8]) | 1
    return [PORTS[(first + i * stride) % len(PORTS)] for i in range(CANDIDATES)]


# -- rank 0 ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def listen(key: str) -> Iterator[socket.socket]:
    """Bind the first free candidate and listen: from here on it is ours."""
    for port in candidates(key):
        listener = socket.socket()
        try:
            listener.bind(("", port))
        except OSError:
            listener.close()
            continue
        with listener:
            listener.listen(4096)
            yield listener
        return
    raise Missing(f"none of the ports {candidates(key)} is free on {socket.gethostname()}")


def welcome(listener: socket.socket, key: str, size: int, deadline: float) -> str:
    """Answer every rank once; returns the network interface by which the first one came."""
    missing, interface = set(range(1, size)), ""
    while missing:
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            peer, _ = listener.accept()
        except TimeoutError:
            names = ", ".join(str(rank) for rank in sorted(missing)[:16])
            raise Missing(f"ranks {names} of {size} did not come; did their nodes start?") from None
        with peer, contextlib.suppress(OSError, ValueError):  # a stranger, or one that left: go on
            peer.settimeout(5)
            said, _, number = read_line(peer).rpartition(" ")
            if said == greeting(key):
                peer.sendall(f"{greeting(key)} 0\n".encode())
                missing.discard(int(number))
                interface = interface or interface_of(peer.getsockname()[0])
    return interface


def serve(listener: socket.socket, size: int) -> Any:
    """Hand the listening socket to torch's store: the port is never free in between."""
    from torch.distributed import TCPStore

    return TCPStore(
        "127.0.0.1",
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(minutes=15),
        master_listen_fd=os.dup(listener.fileno()),
    )


# -- the others ------------------------------------------------------------------------------------


def addresses(hosts: list[str]) -> list[str]:
    """IP addresses of the names that resolve; those of this machine alone (127.*) come last."""
    found: dict[str, None] = {}
    for host in hosts:
        with contextlib.suppress(OSError):
            for info in socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM):
                found[str(info[4][0])] = None
    return sorted(found, key=lambda address: ipaddress.ip_address(address).is_loopback)


def find(key: str, rank: int, where: list[str], deadline: float) -> tuple[str, int, str]:
    """Ask round until rank 0 answers: its address, its port, and the interface that leads there."""
    while time.monotonic() < deadline:
        for address in where:
            for port in candidates(key):
                with contextlib.suppress(OSError):
                    with socket.create_connection((address, port), timeout=5) as peer:
                        peer.sendall(f"{greeting(key)} {rank}\n".encode())
                        if read_line(peer) == f"{greeting(key)} 0":
                            return address, port, interface_of(peer.getsockname()[0])
        time.sleep(POLL)
    place = ", ".join(where) or "any address"
    raise Missing(f"rank {rank} on {socket.gethostname()} found no rank 0 at {place}")


def greeting(key: str) -> str:
    """The word by which ranks of one attempt know each other."""
    return f"xcit-dino {hashlib.sha256(key.encode()).hexdigest()[:32]}"


def read_line(peer: socket.socket) -> str:
    """One short line; whatever else somebody sends is cut."""
    data = b""
    while not data.endswith(b"\n") and len(data) < 128:
        if not (piece := peer.recv(128 - len(data))):
            break
        data += piece
    return data.decode("ascii", "replace").strip()


def interface_of(address: str) -> str:
    """Name of the network interface that has an address, or ''."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                reply = fcntl.ioctl(
                    probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15])
                )
                if socket.inet_ntoa(reply[20:24]) == address:
                    return name
    return ""
