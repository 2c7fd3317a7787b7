"""``xcit-dino segment``: semantic segmentation on a frozen or finetuned backbone.

``forward_backward`` is the method, ``segment`` sets a run up; the optimizer's step is in
``supervised/targets.py``, what happens between two steps in ``train/loop.py``, what an evaluation
is in ``evaluation.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xcit_dino.data.augment import normalize
from xcit_dino.data.targets.loader import TargetBatch
from xcit_dino.models.probe import check_bf16
from xcit_dino.options import replace
from xcit_dino.supervised.segment.config import SegmentConfig
from xcit_dino.supervised.segment.data import IGNORED, TrainTransform, collated
from xcit_dino.supervised.segment.evaluation import SegmentEvaluation
from xcit_dino.supervised.segment.heads import resized
from xcit_dino.supervised.segment.network import build_segmenter
from xcit_dino.supervised.targets import (
    LR_IMAGES,
    TaskTrainer,
    build_backbone,
    open_targets,
    parameter_groups,
    set_up,
    target_loader,
    task_training,
)
from xcit_dino.supervised.trainer import resolved_scaling
from xcit_dino.train import loop
from xcit_dino.train.amp import autocast, resolve_precision
from xcit_dino.train.distributed import dist
from xcit_dino.train.run.folder import check_output
from xcit_dino.train.schedules import Hyperparameters, Schedule, linear
from xcit_dino.train.seeding import seed_drop_path


@dataclass(frozen=True)
class PolySchedule(Schedule):
    """Linear warm-up, then ``(1 - t) ** power`` of the way from the peak to the end (mmseg)."""

    @property
    def peak_lr(self) -> float:
        """Linear scaling rule: the learning rates are for 16 images."""
        return self.config.peak_lr * self.global_batch / LR_IMAGES

    def __call__(self, step: int, halvings: int = 0) -> Hyperparameters:
        """Values of step ``step``, counted from 0; halvings: of the learning rate."""
        options = self.config.optim
        warmup = round(options.warmup_epochs * self.steps_per_epoch)
        share = max(0.0, 1 - step / max(self.total_steps, 1)) ** options.power
        lr = options.min_lr + (self.peak_lr - options.min_lr) * share
        lr *= linear(step, warmup, 1e-6, 1.0) if step < warmup else 1.0
        return Hyperparameters(lr * 0.5**halvings, options.weight_decay)


def forward_backward(
    trainer: TaskTrainer, batch: TargetBatch, step: int, num_micro: int, *, sync_gradients: bool
) -> dict[str, Tensor]:
    """See :data:`xcit_dino.supervised.targets.Pass`; of a grid of learning rates the mean loss."""
    config, world = trainer.config, trainer.world
    task = config.segmentation
    images, masks = collated(batch.items, world.device)
    images = normalize(images, *task.normalization, *task.window_bounds)
    seed_drop_path(config.run.seed, step * num_micro + batch.micro, world.rank)
    with trainer.sync_gradients(sync_gradients):
        with autocast(world.device, trainer.dtype):
            logits = trainer.parallel(images)
        losses = [pixel_loss(x, masks) for x in logits]
        if task.head == "upernet":
            loss = shown = losses[0] + task.auxiliary_weight * losses[1]
        else:  # the heads of a grid share nothing that is trained
            loss, shown = torch.stack(losses).sum(), torch.stack(losses).mean()
        trainer.state.scaler.scale(loss / num_micro).backward()
    return {"loss": shown.detach()}


def pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean cross-entropy over all pixels, 0 of those that do not count (mmsegmentation), logits
    enlarged to the masks' size. The divisor is the same of any masks, so that the mean over
    processes and micro-batches is that of the whole batch."""
    logits = resized(logits.float(), masks.shape[-2:])
    total = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum")
    return total / masks.numel()


# ---------------------------------------------------------------------------- a run


def main(config: SegmentConfig) -> None:
    """The command; a launcher's job calls :func:`segment` and keeps the signals."""
    loop.command(segment, config)


def segment(config: SegmentConfig) -> None:
    """Train and write ``segment`` to ``results.json``.

    Raises:
        InputError: bad options or data; the run folder is as it was before.
        Stopped, RunError: see :func:`xcit_dino.train.loop.train`.
    """
    world = dist.init(config.run.device)
    dist.from_main(lambda: check_output(config.run))
    data = open_targets(config.loader, "mask")
    scaling = resolved_scaling(config, config.segmentation, data.form)
    config = replace(config, scaling)
    task = config.segmentation
    loader = target_loader(config, data, TrainTransform(task), world)
    schedule = PolySchedule(config, loader.plan.steps_per_epoch, loader.plan.batch_size)
    loop.check(config)
    backbone, facts = build_backbone(config, task, task.finetune)
    if task.finetune:
        sizes, precision = {"crop_size": task.crop_size}, config.run.precision
        dtype = resolve_precision(precision, world.device)
        check_bf16(backbone, config.model.arch, sizes, world.device, dtype)
    model = build_segmenter(config, backbone, len(data.classes))
    trainer = set_up(config, "segmenter", model, partial(adamw, config), data, world)
    evaluation = SegmentEvaluation("segment", config, task, model, data, schedule, world)
    loop.train(
        task_training(trainer, loader, schedule, forward_backward, evaluation, facts, "--crop_size")
    )


def adamw(config: SegmentConfig, model: Any) -> torch.optim.AdamW:
    """AdamW; the heads of a grid have their shares of the learning rate."""
    scales = dict[str, float]()
    if config.segmentation.head == "linear":
        for number, lr in enumerate(config.optim.lrs):
            for name, _ in model.head.get_submodule(f"heads.{number}").named_parameters():
                scales[f"head.heads.{number}.{name}"] = lr / max(config.optim.lrs)
    return torch.optim.AdamW(parameter_groups(model, scales), lr=0.0, weight_decay=0.0, fused=True)
