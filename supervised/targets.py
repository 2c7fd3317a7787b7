"""What trainings on masks and boxes share: two splits of data, the backbone, the optimizer's step,
when evaluations take place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.native.scaling import check_same_form
from xcit_dino.data.pixels import PixelFormat
from xcit_dino.data.plan import Plan
from xcit_dino.data.shards.index import ShardIndex, resolve_split
from xcit_dino.data.targets.checks import require_targets
from xcit_dino.data.targets.loader import (
    TargetBatch,
    TargetLoader,
    Transform,
    one_pass,
    refuse_empty,
)
from xcit_dino.errors import InputError
from xcit_dino.files import file_checksum
from xcit_dino.models.weights.load import load_backbone
from xcit_dino.models.zoo import create_model
from xcit_dino.supervised.target_config import TaskConfig
from xcit_dino.supervised.validation import is_recorded, recipe_of
from xcit_dino.train import optim
from xcit_dino.train.amp import resolve_precision
from xcit_dino.train.distributed import dist, sync_batchnorm
from xcit_dino.train.loop import Training
from xcit_dino.train.run.log import RunLog
from xcit_dino.train.schedules import Hyperparameters, Schedule
from xcit_dino.train.state import Checkpoints, TrainState, has_checkpoint, weights_file
from xcit_dino.train.trainer import Trainer, data_parallel, images_per_step

SHOWN = 6  # classes named in a message
LR_IMAGES = 16  # images per step that --lr is for (XCiT: 8 GPUs x 2)

# ---------------------------------------------------------------------------- data


@dataclass(frozen=True)
class TargetData:
    """Training and validation images with targets of the same classes."""

    train: ShardIndex
    val: ShardIndex
    classes: list[str]
    form: PixelFormat
    """What the images are, once ``--bands`` are picked."""


def open_targets(loader: LoaderConfig, kind: str) -> TargetData:
    """The two splits of ``--data_path``; kind: ``mask`` or ``boxes``.

    Raises:
        InputError: a split is missing, has no such targets, other classes or kinds of images than
            the other one, or nothing that could be measured.
    """
    path, name = loader.data_path, {"mask": "masks"}.get(kind, kind)
    if path is None:
        raise InputError("--data_path is missing: the folder that xcit-dino shards make wrote")
    train, val = (ShardIndex.load(resolve_split(path, split)) for split in ("train", "val"))
    for index in (train, val):
        require_targets(index, kind)
        if not index.target_classes:
            raise InputError(
                f"--data_path {index.root}: the classes of the {name} have no names; write them to "
                f"{index.root}/target_classes.txt, one per line, and run: xcit-dino shards check "
                f"{index.root} --rebuild"
            )
    if train.target_classes != val.target_classes:
        only = sorted({*(train.target_classes or ())} ^ {*(val.target_classes or ())})
        raise InputError(
            f"--data_path {path}: train and val have {name} of different classes "
            f"({', '.join(only[:SHOWN]) or 'in another order'}); pack both with one command, which "
            "numbers the classes of all"
        )
    dist.refuse_other_data(train.checksum + val.checksum, path)
    check_same_form(train, val)
    refuse_empty(val, loader)
    return TargetData(
        train, val, list(train.target_classes or ()), train.pixels.select(loader.bands)
    )


def target_loader(
    config: Any, data: TargetData, transform: Transform, world: dist.World
) -> TargetLoader:
    """This process's share of the training images, in the order of the run's plan."""
    run, batch = config.run, images_per_step(config.run, world)
    return TargetLoader(
        data.train,
        Plan.of(data.train, config.loader, seed=run.seed, batch_size=batch),
        config.loader,
        transform,
        rank=world.rank,
        world_size=world.size,
        accum=run.accum_iter,
        run_folder=run.output_dir,
    )


# ---------------------------------------------------------------------------- networks


def build_backbone(config: Any, task: TaskConfig, finetune: bool) -> tuple[nn.Module, dict]:
    """The backbone with its initial weights, and where those come from; torch's generator is then
    seeded for what is built on it, whatever the backbone drew.

    Raises:
        InputError: no such weights, or of another architecture.
    """
    torch.manual_seed(config.run.seed)
    backbone = create_model(
        config.model.arch,
        num_classes=0,
        drop_path_rate=config.model.drop_path_rate if finetune else 0.0,
        in_chans=task.channels,
    )
    facts: dict[str, Any] = {"start": "random weights"}
    path = config.start.pretrained_weights
    if path is not None and not has_checkpoint(config.run.output_dir):
        file = weights_file(path, "--pretrained_weights")
        report = load_backbone(file, backbone, config.start.checkpoint_key, adapt=True)
        if dist.is_main():
            print(report, flush=True)
        facts = {"start": report.network, "start_weights": file_checksum(file)}
    torch.manual_seed(config.run.seed + 1)
    return backbone, facts


@dataclass
class TaskTrainer(Trainer):
    """What a step works with."""

    model: nn.Module


def set_up(
    config: Any,
    name: str,
    model: nn.Module,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    data: TargetData,
    world: dist.World,
) -> TaskTrainer:
    """The network on its device, the optimizer, and the state of both.

    name: of the network in checkpoints.
    """
    dtype = resolve_precision(config.run.precision, world.device)
    if world.size > 1:
        sync_batchnorm.convert(model)
    model.to(world.device).train()
    state = TrainState(
        {name: model},
        optimizer(model),
        torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16),
        data=data.train.checksum,
        global_batch=images_per_step(config.run, world),
    )
    return TaskTrainer(config, world, dtype, state, data_parallel(model, world), model)


def parameter_groups(model: Any, scales: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """Groups without decay of 1-D tensors and of what the backbone exempts; scales: shares of the
    learning rate by name."""
    spared = model.no_weight_decay()
    return optim.grouped(model, lambda name, p: p.ndim > 1 and name not in spared, scales or {})


# ---------------------------------------------------------------------------- a step

Pass = Callable[..., dict[str, Tensor]]
"""(trainer, batch, step, num_micro, sync_gradients=...): network, losses and backward pass of one
of ``num_micro`` micro-batches, after ``step`` optimizer steps; returns ``loss`` and whatever else
is to be logged. sync_gradients: average gradients over ranks."""


def train_step(
    forward_backward: Pass,
    trainer: TaskTrainer,
    batches: Sequence[TargetBatch],
    now: Hyperparameters,
) -> dict[str, Tensor]:
    """One optimizer step over this rank's micro-batches; returns scalars on the device."""
    state = trainer.state
    optim.set_hyperparameters(state.optimizer, now.lr, now.weight_decay)
    losses = []

    for micro, batch in enumerate(batches):
        last = micro == len(batches) - 1
        losses.append(
            forward_backward(trainer, batch, state.step, len(batches), sync_gradients=last)
        )

    state.scaler.unscale_(state.optimizer)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    norms = optim.clip_gradients(trained, trainer.config.optim.clip_grad, together=True)
    skipped = optim.step_unless_nonfinite(state.optimizer, state.scaler, norms)
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return optim.mean_of(losses) | {"grad_norm": norms.norm(), "skipped": skipped}


def replay_step(
    forward_backward: Pass, trainer: TaskTrainer, step: int, batches: Sequence[TargetBatch]
) -> Tensor:
    """The forward and backward passes of a finished step again; the sum of its losses."""
    replay = partial(forward_backward, trainer, sync_gradients=False)
    return torch.stack([replay(b, step - 1, len(batches))["loss"] for b in batches]).sum()


def task_training(
    trainer: TaskTrainer,
    loader: TargetLoader,
    schedule: Schedule,
    forward_backward: Pass,
    evaluation: TaskEvaluation,
    facts: dict[str, Any],
    smaller_options: str,
) -> Training:
    """What the loop runs; facts: about the initial weights."""
    return Training(
        evaluation.name,
        trainer.config,
        trainer.state,
        loader,
        schedule,
        train_step=partial(train_step, forward_backward, trainer),
        replay_step=partial(replay_step, forward_backward, trainer),
        smaller_options=smaller_options,
        evaluate=evaluation,
        evaluation_due=evaluation.due,
        finish=evaluation.finish,
        facts=facts,
    )


# ---------------------------------------------------------------------------- evaluations


@dataclass(frozen=True)
class TaskEvaluation(ABC):
    """The evaluations of a training: between steps, and at its end."""

    name: str
    """Of the result."""
    config: Any
    task: TaskConfig
    model: nn.Module
    data: TargetData
    schedule: Any
    world: dist.World

    @abstractmethod
    def measure(self) -> Any:
        """Scores over the validation images, on all ranks together."""

    @abstractmethod
    def metrics(self, scores: Any) -> dict[str, float]:
        """Of :meth:`measure`, for the log."""

    @abstractmethod
    def record(self, scores: Any, facts: dict[str, Any], checkpoint: Path) -> None:
        """Print the scores and write them to ``results.json``."""

    def __call__(self, step: int = 0) -> dict[str, float]:
        """Metrics for the log."""
        return {f"val_{name}": value for name, value in self.metrics(self.measure()).items()}

    def due(self, step: int) -> bool:
        """Whether an epoch to be evaluated ends with this step, other than the last one."""
        every, epochs = self.task.eval_every, self.config.run.epochs
        epoch, into_epoch = divmod(step, self.schedule.steps_per_epoch)
        return into_epoch == 0 and 0 < epoch < epochs and every > 0 and epoch % every == 0

    def views(self, transform: Transform) -> Iterator[tuple[int, Any]]:
        """(sample number, transformed sample) of this rank's share of the validation images."""
        val, world = self.data.val, self.world
        first, last = (val.num_samples * (world.rank + i) // world.size for i in (0, 1))
        return one_pass(val, self.config.loader, transform, np.arange(first, last))

    def finish(self, log: RunLog, checkpoints: Checkpoints, facts: dict[str, Any]) -> None:
        """Log the final scores and write them to ``results.json``, once."""
        newest = checkpoints.newest()
        if is_recorded(self.name, self.config, self.data.val, newest):  # by an earlier attempt
            return
        scores = self.measure()
        found = {f"val_{name}": value for name, value in self.metrics(scores).items()}
        log.write(self.schedule.total_steps, found)
        if self.world.is_main:
            assert newest is not None
            self.record(scores, facts, newest)

    def protocol(self, facts: dict[str, Any], checkpoint: Path, images: int) -> dict[str, Any]:
        """What every such result states.

        Args:
            facts: about the initial weights.
            images: validation images that could be read.
        """
        unreadable = self.data.val.num_samples - images
        return (
            facts
            | {
                "evaluation": self.name,
                "arch": self.config.model.arch,
                "mean": list(self.task.normalization[0]),
                "std": list(self.task.normalization[1]),
                "precision": "fp32",
                "num_classes": len(self.data.classes),
                "train_index": self.data.train.checksum,
                "val_index": self.data.val.checksum,
                "val_images": self.data.val.num_samples,
                "recipe": recipe_of(self.config),
                "weights": file_checksum(checkpoint),
            }
            | ({"unreadable_images": unreadable} if unreadable else {})
        )
