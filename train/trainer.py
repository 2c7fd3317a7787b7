"""What a training step works with, whatever the method."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from xcit_dino.train.distributed import dist
from xcit_dino.train.state import TrainState


@dataclass
class Trainer:
    """The networks of a method and how they compute; methods add their own."""

    config: Any
    world: dist.World
    dtype: torch.dtype
    """Of the forward pass."""
    state: TrainState
    parallel: nn.Module
    """The trained network, in DistributedDataParallel where several ranks hold all of it."""

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a part of the networks only (FSDP)."""
        return hasattr(self.parallel, "set_requires_gradient_sync")

    def sync_gradients(self, now: bool) -> AbstractContextManager[None]:
        """Whether the backward pass inside averages gradients over ranks: once a step."""
        if self.sharded:
            self.parallel.set_requires_gradient_sync(now)  # type: ignore[operator]
        elif isinstance(self.parallel, DistributedDataParallel) and not now:
            return self.parallel.no_sync()
        return nullcontext()


def data_parallel(network: nn.Module, world: dist.World) -> nn.Module:
    """The network in DistributedDataParallel where there are several ranks. Synchronised batch-norm
    keeps its buffers equal without broadcasts."""
    if world.size == 1:
        return network
    # a depthwise weight's gradient may order its dimensions of size 1 differently, at no cost
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
