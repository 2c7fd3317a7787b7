"""Many small arrays in one block: one copy to a device, without a host synchronization.

A copy from ordinary host memory, and ``torch.tensor(..., device="cuda")``, block the host until
the GPU has finished all work queued before it. A copy from page-locked memory is queued like
everything else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

ALIGNMENT = 16  # bytes; an array is read as its own dtype where it lies


@dataclass(frozen=True)
class Packed:
    """The numpy arrays of a nest (tuples, lists, dicts) in one block of memory.

    Attributes:
        block: uint8 [bytes], on the host or on a device.
        places: first byte, dtype and shape of each array.
        nest: their structure.
    """

    block: Tensor
    places: tuple[tuple[int, torch.dtype, torch.Size], ...]
    nest: pytree.TreeSpec

    @classmethod
    def of(cls, nest: Any) -> Packed:
        """Copy the arrays of ``nest`` into a block on the host."""
        arrays, spec = pytree.tree_flatten(nest)
        tensors = [torch.from_numpy(array) for array in arrays]
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
        *starts, end = accumulate(sizes, initial=0)
        block = torch.empty(end, dtype=torch.uint8)
        places = tuple(
            (start, tensor.dtype, tensor.shape)
            for start, tensor in zip(starts, tensors, strict=True)
        )
        packed = cls(block, places, spec)
        for target, tensor in zip(packed._tensors(), tensors, strict=True):
            target.copy_(tensor)
        return packed

    def to(self, device: torch.device) -> Packed:
        """Copy to ``device`` in one transfer; no copy if it is there already."""
        return replace(self, block=to_device(self.block, device))

    def unpacked(self) -> Any:
        """The nest with tensors instead of arrays; they share the block's memory."""
        return pytree.tree_unflatten(self._tensors(), self.nest)

    def _tensors(self) -> list[Tensor]:
        return [
            self.block[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for start, dtype, shape in self.places
        ]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on ``device``. Copies to a GPU go through page-locked memory, which torch caches and
    reuses only once the copy is done."""
    if device.type != "cuda":
        return tensor.to(device)
    if tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
