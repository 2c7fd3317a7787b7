"""Memory shared with the worker processes: a ring of slots, one micro-batch of crops each.

Workers write crops where the training process, or its GPU, reads them; only a slot's number goes
through the queue. The memory is anonymous (inherited by fork), so the size of /dev/shm, 64 MB in
many containers, does not limit it. Crops lie channels last: [crops, B, height, width, 3].
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE


class Ring:
    """``num_slots`` slots; a slot holds one uint8 tensor of each shape.

    Args:
        shapes: (crops, B, side, side, 3) of each group of crops.
    """

    def __init__(self, num_slots: int, shapes: Sequence[tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.num_slots = num_slots
        sizes = [math.prod(shape) for shape in shapes]
        self.slot_bytes = -(-sum(sizes) // PAGE) * PAGE
        self._memory = mmap.mmap(-1, max(num_slots * self.slot_bytes, PAGE))
        flat = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._slots = [
            [
                piece.view(shape).permute(0, 1, 4, 2, 3)
                for piece, shape in zip(
                    flat[slot * self.slot_bytes :][: sum(sizes)].split(sizes), shapes, strict=True
                )
            ]
            for slot in range(num_slots)
        ]
        self._address = flat.data_ptr()
        self._pinned = False

    def views(self, slot: int) -> list[Tensor]:
        """The slot's tensors [crops, B, 3, side, side] (strides: channels last)."""
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


def _cudart() -> Any:
    return torch.cuda.cudart()
