"""Memory shared with the worker processes: a ring of slots, one micro-batch of crops each.

Workers write crops where the training process, or its GPU, reads them; only a slot's number goes
through the queue. The memory is anonymous (inherited by fork), so the size of /dev/shm, 64 MB in
many containers, does not limit it. 8-bit RGB lies channels last, [crops, B, height, width, 3], and
other kinds of images channel by channel, [crops, B, C, height, width]: as their resizes are faster.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xcit_dino.data.pixels import RGB8, PixelFormat

PAGE = mmap.PAGESIZE


class Ring:
    """``num_slots`` slots; a slot holds one tensor of each shape, in the dtype of ``form``.

    Args:
        shapes: (crops, B, side, side, C) of each group of crops.
        form: what the images are.
    """

    def __init__(
        self, num_slots: int, shapes: Sequence[tuple[int, ...]], form: PixelFormat = RGB8
    ) -> None:
        self.shapes = shapes
        self.num_slots = num_slots
        dtype = getattr(torch, form.dtype)
        sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
        self.slot_bytes = -(-sum(sizes) // PAGE) * PAGE
        self._memory = mmap.mmap(-1, max(num_slots * self.slot_bytes, PAGE))
        flat = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._slots = [
            [
                _shaped(piece.view(dtype), shape, channels_last=form.is_rgb8)
                for piece, shape in zip(
                    flat[slot * self.slot_bytes :][: sum(sizes)].split(sizes), shapes, strict=True
                )
            ]
            for slot in range(num_slots)
        ]
        self._address = flat.data_ptr()
        self._pinned = False

    def views(self, slot: int) -> list[Tensor]:
        """The slot's tensors [crops, B, C, side, side]."""
        return self._slots[slot]

    def pin(self) -> None:
        """Page-lock the memory for direct transfers to the GPU; after the workers have forked."""
        status = _cudart().cudaHostRegister(self._address, len(self._memory), 0)
        torch.cuda.check_error(int(status))
        self._pinned = True

    def unpin(self) -> None:
        if self._pinned:
            torch.cuda.synchronize()  # no copy may be under way
            _cudart().cudaHostUnregister(self._address)
            self._pinned = False


def _shaped(piece: Tensor, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    """[crops, B, C, height, width] from the shape with C at its end."""
    if channels_last:
        return piece.view(shape).permute(0, 1, 4, 2, 3)
    crops, B, height, width, C = shape
    return piece.view(crops, B, C, height, width)


def _cudart() -> Any:
    return torch.cuda.cudart()
