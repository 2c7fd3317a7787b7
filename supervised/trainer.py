"""The objects that a supervised step uses, and how they are built."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xcit_dino.data.native.scaling import Given, resolve_scaling
from xcit_dino.data.pixels import PixelFormat
from xcit_dino.eval.context import resolve_input_settings, run_options
from xcit_dino.files import file_checksum
from xcit_dino.inputs import IMAGENET_MEAN, InputSettings
from xcit_dino.models.weights.load import load_backbone
from xcit_dino.models.zoo import ModelConfig, create_model
from xcit_dino.options import replace
from xcit_dino.supervised.config import Config, FinetuneConfig, StartConfig
from xcit_dino.supervised.data import DeviceAugment, LabeledData
from xcit_dino.supervised.optim import adamw
from xcit_dino.train.amp import resolve_precision
from xcit_dino.train.distributed import dist, fsdp, sync_batchnorm
from xcit_dino.train.state import TrainState, has_checkpoint, weights_file
from xcit_dino.train.trainer import Trainer, data_parallel, images_per_step, to_be_sharded

Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Images [B, C, S, S], logits [B, C], soft labels [B, C] -> loss."""


@dataclass
class Method:
    """What differs between finetuning and distillation."""

    name: str
    """Name of the command and of its results."""
    network: str
    """Name of the trained network in checkpoints."""
    criterion: Criterion
    facts: dict[str, Any]
    """About the initial weights and the teacher; part of the protocol."""
    modules: dict[str, nn.Module] = field(default_factory=dict)
    """Other networks for the checkpoints."""


@dataclass
class SupervisedTrainer(Trainer):
    """The objects that a supervised step uses."""

    config: FinetuneConfig
    model: nn.Module
    average: nn.Module | None
    """Moving average of the weights."""
    criterion: Criterion
    augment: DeviceAugment

    def networks(self) -> dict[str, nn.Module]:
        """The networks to validate: ``""`` is the trained one, ``"ema"`` its moving average, once
        more than half of that comes from this training. All ranks call this."""
        decay, found = self.config.regularization.model_ema_decay, {"": self.model}
        if self.average is not None and initial_share(decay, self.state.step) <= 0.5:
            found["ema"] = self.average
        return {name: self.whole(net, self.augment.num_classes) for name, net in found.items()}


def set_up(
    config: FinetuneConfig, method: Method, model: nn.Module, data: LabeledData, world: dist.World
) -> SupervisedTrainer:
    """The network on its device, its moving average, the optimizer, and their state."""
    run, decay = config.run, config.regularization.model_ema_decay
    dtype = resolve_precision(run.precision, world.device)
    if world.size > 1:
        sync_batchnorm.convert(model)
    model.to(world.device).train()
    average = copy.deepcopy(model).eval() if decay else None
    averages = {} if average is None else {"model_ema": average}
    if to_be_sharded(run, world):
        for network in (model, *averages.values()):
            fsdp.shard(network, network, world.device, dtype)
    state = TrainState(
        {method.network: model, **averages, **method.modules},
        adamw(model, config.optim.layer_decay),
        torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16),
        data=data.train.checksum,
        global_batch=images_per_step(run, world),
    )
    fsdp.take_whole_moments(state.optimizer)
    parallel = data_parallel(model, world)
    augment = DeviceAugment(config, data.num_classes, world)
    return SupervisedTrainer(
        config, world, dtype, state, parallel, model, average, method.criterion, augment
    )


def initial_share(decay: float, steps: int) -> float:
    """Share of a moving average that still comes from the initial weights, 0 to 1."""
    return decay**steps


def say_average(decay: float, steps: int) -> None:
    """Warn at the start if the averaged weights will not be evaluated at the end, and why."""
    share = initial_share(decay, steps)
    if decay and share > 0.5 and dist.is_main():
        remedy = f"; a decay of {1 - 5 / steps:.4g} suits this number of steps" if steps > 5 else ""
        print(
            f"--model_ema_decay {decay:g}: after {steps} steps {share:.0%} of the average is still "
            f"the initial weights, so it is not evaluated{remedy}",
            flush=True,
        )


def with_input_settings(config: Config, form: PixelFormat) -> Config:
    """The options with ``--window``, ``--mean`` and ``--std`` filled in; see
    :func:`resolved_scaling`."""
    if dist.is_main() and not form.is_rgb8 and config.regularization.uses_pillow:
        print(
            f"--aa, --color_jitter: off, as timm's operations are for 8-bit RGB, and the images "
            f"are {form.name}",
            flush=True,
        )
    return replace(config, resolved_scaling(config, config.regularization, form))


def resolved_scaling(config: Any, given: Given, form: PixelFormat) -> dict[str, Any]:
    """The options ``window``, ``mean`` and ``std``: as given, else those of the run being resumed,
    else of the weights to start from, else of the data, which of 8-bit RGB are ImageNet's; see
    ``data/native/scaling.py``.

    Args:
        config: with the sections ``run``, ``model`` and ``start``.
        form: of the images, once ``--bands`` are picked.

    Raises:
        InputError: another number of values than the images have channels.
    """
    start, folder, arch = config.start, config.run.output_dir, config.model.arch
    settings, resumed = None, has_checkpoint(folder)
    if resumed:
        settings = InputSettings.from_run(run_options(folder))
    elif start.pretrained_weights is not None:
        path = weights_file(start.pretrained_weights, "--pretrained_weights")
        settings = resolve_input_settings(arch, path, start.checkpoint_key)
    scaling = resolve_scaling(given, form, settings, same_data=resumed)
    if dist.is_main():
        for line in scaling.lines:
            print(line, flush=True)
        if scaling.mean != IMAGENET_MEAN:
            print(f"images are normalized by mean {scaling.mean}, std {scaling.std}", flush=True)
    return scaling.options


def build_model(
    model: ModelConfig,
    start: StartConfig,
    num_classes: int,
    run_folder: Path,
    seed: int,
    channels: int = 3,
) -> tuple[nn.Module, dict[str, Any]]:
    """A classifier of images of ``channels`` channels with the weights to start from, and where
    those come from.

    Raises:
        InputError: no such weights, of another architecture, or for another number of classes.
    """
    torch.manual_seed(seed)
    network = create_model(
        model.arch,
        num_classes=num_classes,
        drop_path_rate=model.drop_path_rate,
        in_chans=channels,
    )
    if start.pretrained_weights is None or has_checkpoint(run_folder):
        return network, {"start": "scratch"}
    path = weights_file(start.pretrained_weights, "--pretrained_weights")
    report = load_backbone(
        path, network, start.checkpoint_key, head="new" if start.new_head else "auto", adapt=True
    )
    if dist.is_main():
        print(report, flush=True)
    facts = {"start": report.network, "start_weights": file_checksum(path), "head": report.head}
    return network, facts
