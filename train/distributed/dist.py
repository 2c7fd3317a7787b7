"""The processes of a run: ``torch.distributed``, set up from torchrun's environment variables.

Only ``RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT`` are read, so torchrun, SLURM and
a submitit job start the same code. Without them this is one process and every function here is
cheap.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from xcit_dino.errors import InputError, Stopped

T = TypeVar("T")
TIMEOUT = timedelta(minutes=float(os.environ.get("XCIT_DINO_TIMEOUT_MINUTES", "15")))


@dataclass(frozen=True)
class World:
    """Rank, world size and device of this process."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init(device: str = "auto") -> World:
    """Join the process group, if there is one, and select this process's device.

    Args:
        device: ``auto`` (cuda if available, else cpu), ``cuda``, ``mps`` or ``cpu``.

    Raises:
        InputError: what was requested is unavailable, or there are fewer GPUs than processes.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device cuda: no GPU is visible; use --device cpu, or check CUDA_VISIBLE_DEVICES"
        )
    if device == "mps" and not torch.backends.mps.is_available():
        raise InputError(
            "--device mps: this torch sees no GPU of a Mac (it takes Apple silicon and macOS 14); "
            "use --device cpu"
        )
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if device == "mps" and size > 1:
        raise InputError(f"--device mps: takes one process, not {size}; use --device cpu for more")
    if not cuda:
        here = torch.device("mps" if device == "mps" else "cpu")
    else:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"process {local_rank} of this node has no GPU of its own "
                f"({torch.cuda.device_count()} visible); start as many processes as GPUs, "
                "or use --device cpu"
            )
        here = torch.device("cuda", local_rank)
        torch.cuda.set_device(here)
    if size > 1 and not dist.is_initialized():
        # gloo for CPU tensors, in addition to NCCL: small messages between ranks never wait for the
        # GPU
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=here if cuda else None)
    return World(rank, size, here)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def leaving() -> Iterator[None]:
    """Leave the process group at the end of a command.

    Not after a failure: leaving may wait for ranks that wait for this one. The process
    ends instead, which the others, or their launcher, notice.
    """
    try:
        yield
    except Stopped:  # all ranks stop together
        shutdown()
        raise
    shutdown()


class RankFailed(RuntimeError):
    """Work done by every rank failed on at least one; the message names the first."""


@contextmanager
def together() -> Iterator[None]:
    """Work of each rank, without collectives, after which all of them continue or all raise.

    A collective that follows is thus entered by all ranks or by none.

    Raises:
        RankFailed: it failed on a rank (a single process raises what it raised).
    """
    error: Exception | None = None
    try:
        yield
    except Exception as reason:
        if world_size() == 1:
            raise
        error = reason
    if world_size() == 1:
        return
    first = torch.tensor(rank() if error is not None else world_size())
    dist.all_reduce(first, dist.ReduceOp.MIN)
    if int(first) == world_size():
        return
    text = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(text, src=int(first), device=torch.device("cpu"))
    raise RankFailed(f"rank {int(first)}: {text[0]}") from error


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def from_main(compute: Callable[[], T]) -> T:
    """Compute on rank 0 and return the result on every rank; exceptions are raised on all ranks."""
    if world_size() == 1:
        return compute()
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = compute()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    if box[1] is not None:
        raise box[1]
    return box[0]


def on_all_ranks(values: torch.Tensor) -> torch.Tensor:
    """All-gather vectors of equal length, [n] on the CPU -> [ranks, n]."""
    if world_size() == 1:
        return values[None]
    found = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(found, values)
    return torch.stack(found)


def refuse_other_data(checksum: str, place: object) -> None:
    """Compare the checksum of the data with rank 0's; all ranks call it (one gather).

    Samples are divided among the ranks by number: nothing else would notice that one node
    sees other shards.

    Args:
        checksum: ASCII, of equal length on all ranks.
        place: where the data are, for the message.

    Raises:
        InputError: on every rank; names those with different data.
    """
    rows = on_all_ranks(torch.frombuffer(bytearray(checksum, "ascii"), dtype=torch.uint8))
    if others := [str(number) for number, row in enumerate(rows) if not row.equal(rows[0])]:
        raise InputError(
            f"--data_path {place}: rank {', '.join(others)} found other shards there than rank 0; "
            "copy the same to all nodes, or take a folder that all see"
        )


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """All-reduce sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """All-reduce mean over ranks, in place."""
    return all_reduce_sum(tensor).div_(world_size())
