"""Asynchronous copy of a state from the device to host memory, and its way to disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from xcit_dino.train.distributed.fsdp import all_finite


class HostCopy:
    """A copy of a state's tensors in host memory, whose buffers are reused for the next copy.

    Copies from a GPU are queued between the finished step and the next one, so that
    nobody waits: neither the host for the GPU, nor the GPU for the disk.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[Any, ...], Tensor] = {}
        self.state: Any = None
        self.copied: torch.cuda.Event | None = None

    def take(self, state: Any) -> HostCopy:
        """Copy; returns itself."""
        self.state = self._copied(state, ())
        if torch.cuda.is_initialized():
            self.copied = torch.cuda.Event()
            self.copied.record()
        return self

    def ready(self) -> Any:
        """The copy, once it is complete."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.state

    def _copied(self, value: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(value, dict):
            return {key: self._copied(inner, (*place, key)) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copied(inner, (*place, i)) for i, inner in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        buffer = self.buffers.get(place)
        if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
            buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self.buffers[place] = buffer
        return buffer.copy_(value.detach(), non_blocking=value.is_cuda)


class Hashed:
    """A file that ``torch.save`` writes to, hashed and counted on the way.

    An error of the file system is kept for :meth:`finish`: torch's writer is C++ and would turn it
    into something unrecognizable.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.bytes = file, 0
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
                self.sha256.update(data)
            except OSError as error:
                self.error = error
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """torch's writer calls it; :meth:`finish` does it."""

    def finish(self) -> None:
        """Flush everything to disk.

        Raises:
            OSError: that, or something before, failed.
        """
        if self.error is not None:
            raise self.error
        self.file.flush()
        os.fsync(self.file.fileno())

    @property
    def checksum(self) -> str:
        """As :func:`file_checksum` computes it."""
        return self.sha256.hexdigest()[:16]


def first_nonfinite(value: Any, place: str = "") -> str | None:
    """Path of the first tensor that contains an infinity or NaN ("student.head.mlp.0.weight")."""
    if isinstance(value, dict):
        found = (first_nonfinite(inner, f"{place}.{key}") for key, inner in value.items())
        return next(filter(None, found), None)
    if isinstance(value, Tensor) and value.is_floating_point() and not all_finite(value):
        return place.removeprefix(".")
    return None


def sync_folder(folder: Path) -> None:
    """Flush renames in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
