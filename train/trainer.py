"""Networks and settings of a training step, common to all methods."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from xcit_dino.data.config import CropsConfig
from xcit_dino.data.loader import CropLoader
from xcit_dino.data.plan import Plan
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.inputs import IMAGENET_MEAN
from xcit_dino.models.zoo import create_model
from xcit_dino.options import options
from xcit_dino.train.config import RunConfig
from xcit_dino.train.distributed import dist, fsdp
from xcit_dino.train.state import TrainState


@dataclass
class Trainer:
    """The networks of a method and their precision; methods add their own fields."""

    config: Any
    world: dist.World
    dtype: torch.dtype
    """Of the forward pass."""
    state: TrainState
    parallel: nn.Module
    """The trained network, in DistributedDataParallel if several ranks hold full copies."""

    @property
    def sharded(self) -> bool:
        """Whether each rank holds only a part of the networks (FSDP)."""
        return is_sharded(self.parallel)

    @property
    def channels(self) -> int:
        """Of the images."""
        return len(dict(options(self.config)).get("mean") or IMAGENET_MEAN)

    def sync_gradients(self, now: bool) -> AbstractContextManager[None]:
        """Whether the backward pass inside averages gradients over ranks: once per step."""
        if self.sharded:
            self.parallel.set_requires_gradient_sync(now)  # type: ignore[operator]
        elif isinstance(self.parallel, DistributedDataParallel) and not now:
            return self.parallel.no_sync()
        return nullcontext()

    def whole(self, network: nn.Module, num_classes: int = 0) -> nn.Module:
        """A trained network, or its average, for evaluations: whole on every rank, since each runs
        it as often as it has images. All ranks call this."""
        if not self.sharded:
            return network
        copy = create_model(
            self.config.model.arch, num_classes=num_classes, in_chans=self.channels
        ).requires_grad_(False)
        copy.load_state_dict(fsdp.full_tensors(network.state_dict(), everywhere=True))
        return copy.to(self.world.device).train(network.training)


def images_per_step(run: RunConfig, world: dist.World) -> int:
    """The global batch."""
    return run.batch_size_per_gpu * run.accum_iter * world.size


def crop_loader(
    config: Any,
    world: dist.World,
    index: ShardIndex,
    plan: Plan,
    crops: CropsConfig | Sequence[tuple[int, CropsConfig]],
    **transforms: Any,
) -> CropLoader:
    """This rank's share of a plan, in micro-batches; ``transforms``: see :class:`CropLoader`."""
    return CropLoader(
        index,
        plan,
        crops,
        config.loader,
        rank=world.rank,
        world_size=world.size,
        accum=config.run.accum_iter,
        device=world.device,
        run_folder=config.run.output_dir,
        **transforms,
    )


def to_be_sharded(run: RunConfig, world: dist.World) -> bool:
    """Whether networks are to be split over the ranks; said where there is but one."""
    if run.fsdp and world.size == 1:
        print("--fsdp: this is one process, which has nothing to split with others", flush=True)
    return run.fsdp and world.size > 1


def is_sharded(network: nn.Module) -> bool:
    """Whether each rank holds a part of a network only."""
    return hasattr(network, "set_requires_gradient_sync")


def data_parallel(network: nn.Module, world: dist.World, unused: Sequence[str] = ()) -> nn.Module:
    """The network in DistributedDataParallel where several ranks hold all of it. Synchronized
    batch-norm keeps its buffers equal without broadcasts.

    unused: names of parameters that get no gradient; they stay as they are on every rank.
    """
    if world.size == 1 or is_sharded(network):
        return network
    ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(network, list(unused))  # else the second step waits for their gradients
    # a depthwise weight's gradient may order its dimensions of size 1 differently, at no cost
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
