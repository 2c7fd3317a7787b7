"""One rank's micro-batch, and its copy to the device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcit_dino.data.packed import Packed, to_device


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch; G global and L local crops of B samples.

    Attributes:
        step, micro, epoch: optimizer step (from 0), micro-batch in it, epoch of the step.
        samples: int64 [B], the plan's numbers; keys of every random choice.
        sources: int64 [B], the samples that were read; a substitute where a sample is unreadable.
        labels: int64 [B], of the sources; -1 where there is none.
        global_crops, local_crops: [G, B, C, S, S] and [L, B, C, s, s] in the set's dtype (uint8,
            uint16, int16 or float32), in its own units; 8-bit RGB lies channels last.
        recipes: parameters of their augmentation; None: drawn when it is applied.
    """

    step: int
    micro: int
    epoch: int
    samples: NDArray[np.int64]
    sources: NDArray[np.int64]
    labels: Tensor
    global_crops: Tensor
    local_crops: Tensor
    recipes: Packed | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """What lies on the device."""
        drawn = [] if self.recipes is None else [self.recipes.block]
        return [self.global_crops, self.local_crops, self.labels, *drawn]

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``; queued, where the crops lie in page-locked memory."""
        queued = device.type == "cuda"  # elsewhere the crops' memory may be filled again too early
        return replace(
            self,
            global_crops=self.global_crops.to(device, non_blocking=queued),
            local_crops=self.local_crops.to(device, non_blocking=queued),
            labels=to_device(self.labels, device),
            recipes=self.recipes and self.recipes.to(device),
        )


class Copier:
    """Copies micro-batches to the GPU on a stream of its own, beside the running step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.last, self.before = torch.cuda.Event(), torch.cuda.Event()

    def copied(self, step: list[Batch]) -> list[Batch]:
        """The same batches on the device, ready for the current stream.

        Returns once the copies of the step before are done: its slots are then free.
        """
        with torch.cuda.stream(self.stream):
            moved = [batch.to(self.device) for batch in step]
            self.last, self.before = self.before, self.last
            self.last.record(self.stream)
        self.before.synchronize()
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self.last)
        for batch in moved:
            for tensor in batch.tensors:
                tensor.record_stream(current)
        return moved
