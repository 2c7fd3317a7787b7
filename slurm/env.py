"""Rendezvous of a job's ranks, which sets torchrun's environment variables.

Rank 0 listens on a port that no other process can take: it keeps the bound socket until torch's
store takes over that same socket. The candidate ports are derived from (job, restart), so every
rank computes the same short list, a restart uses fresh ports, and no file, shared folder or cluster
setting has to carry them. A rank that finds a listener on a candidate port exchanges a token of
this job and attempt with it, so neither another job nor a process left over from an earlier attempt
is mistaken for rank 0. All this happens before torch is imported: a missing rank is named after
``timeout`` seconds instead of hanging a collective.
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
POLL = 0.2  # seconds between two rounds over all candidates
SIOCGIFADDR = 0x8915  # linux/sockios.h: address of a network interface


class RendezvousError(RuntimeError):
    """Some ranks did not join."""


def join(
    key: str, rank: int, size: int, local_rank: int, hosts: list[str], timeout: float = 600
) -> Any:
    """Rendezvous with the other ranks and set ``RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR
    MASTER_PORT``.

    Args:
        key: unique to this job and attempt.
        rank, size, local_rank: this process's rank, the world size, and its rank on this node.
        hosts: names or addresses of rank 0's node.
        timeout: seconds to wait for missing ranks.

    Returns:
        Rank 0's store, to be kept alive as long as the process group; None on other ranks.

    Raises:
        RendezvousError: names the missing ranks, or the addresses tried for rank 0.
    """
    if size == 1:
        return None
    deadline = time.monotonic() + timeout
    if rank == 0:
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(listen(key))
            interface = accept_ranks(listener, key, size, deadline)
            address, port = "127.0.0.1", listener.getsockname()[1]
            set_environment(rank, size, local_rank, address, port, interface)
            return serve(listener, size)
    address, port, interface = find_rank_zero(key, rank, resolve_hosts(hosts), deadline)
    set_environment(rank, size, local_rank, address, port, interface)
    return None


def set_environment(
    rank: int, size: int, local_rank: int, address: str, port: int, interface: str
) -> None:
    """Set torchrun's variables; the store already exists, as under torchrun's agent."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(local_rank),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    if interface:  # gloo would use the host name's address, which many images map to 127.0.1.1
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def candidates(key: str) -> list[int]:
    """Candidate ports of this job and attempt, in the order they are tried."""
    digest = hashlib.sha256(key.encode()).digest()
    first, stride = int.from_bytes(digest[:4]), int.from_bytes(digest[4:8]) | 1
    return [PORTS[(first + i * stride) % len(PORTS)] for i in range(CANDIDATES)]


# -- rank 0 ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def listen(key: str) -> Iterator[socket.socket]:
    """Bind the first free candidate port and listen on it."""
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
    raise RendezvousError(f"none of the ports {candidates(key)} is free on {socket.gethostname()}")


def accept_ranks(listener: socket.socket, key: str, size: int, deadline: float) -> str:
    """Answer each rank once; returns the network interface on which the first one connected."""
    missing, interface = set(range(1, size)), ""
    while missing:
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            peer, _ = listener.accept()
        except TimeoutError:
            names = ", ".join(str(rank) for rank in sorted(missing)[:16])
            raise RendezvousError(
                f"ranks {names} of {size} did not join; did their nodes start?"
            ) from None
        with peer, contextlib.suppress(OSError, ValueError):  # unknown or disconnected peer: ignore
            peer.settimeout(5)
            greeted, _, number = read_line(peer).rpartition(" ")
            if greeted == greeting(key):
                peer.sendall(f"{greeting(key)} 0\n".encode())
                missing.discard(int(number))
                interface = interface or interface_of(peer.getsockname()[0])
    return interface


def serve(listener: socket.socket, size: int) -> Any:
    """Hand the listening socket to torch's store, so that the port is never free in between."""
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


def resolve_hosts(hosts: list[str]) -> list[str]:
    """IPv4 addresses of the names that resolve; loopback addresses (127.*) come last."""
    found: dict[str, None] = {}
    for host in hosts:
        with contextlib.suppress(OSError):
            for info in socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM):
                found[str(info[4][0])] = None
    return sorted(found, key=lambda address: ipaddress.ip_address(address).is_loopback)


def find_rank_zero(key: str, rank: int, where: list[str], deadline: float) -> tuple[str, int, str]:
    """Try all addresses and ports until rank 0 responds.

    Returns:
        (address, port, local network interface of the connection).

    Raises:
        RendezvousError: at the deadline.
    """
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
    raise RendezvousError(f"rank {rank} on {socket.gethostname()} found no rank 0 at {place}")


def greeting(key: str) -> str:
    """The token by which ranks of one attempt recognize each other."""
    return f"xcit-dino {hashlib.sha256(key.encode()).hexdigest()[:32]}"


def read_line(peer: socket.socket) -> str:
    """Read one line of at most 128 bytes; anything beyond is dropped."""
    data = b""
    while not data.endswith(b"\n") and len(data) < 128:
        if not (piece := peer.recv(128 - len(data))):
            break
        data += piece
    return data.decode("ascii", "replace").strip()


def interface_of(address: str) -> str:
    """Name of the network interface with this address, or ''."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                reply = fcntl.ioctl(
                    probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15])
                )
                if socket.inet_ntoa(reply[20:24]) == address:
                    return name
    return ""
