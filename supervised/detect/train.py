"""``xcit-dino detect``: Faster R-CNN on a frozen or finetuned backbone.

``forward_backward`` is the method, ``detect`` sets a run up; the optimizer's step is in
``supervised/targets.py``, what happens between two steps in ``train/loop.py``, what an evaluation
is in ``evaluation.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from xcit_dino.data.rng import random_bits
from xcit_dino.data.targets.loader import TargetBatch
from xcit_dino.options import replace
from xcit_dino.supervised.detect.coco import require_pycocotools
from xcit_dino.supervised.detect.config import DetectConfig
from xcit_dino.supervised.detect.data import TrainTransform, to_network, to_targets
from xcit_dino.supervised.detect.evaluation import DetectEvaluation
from xcit_dino.supervised.detect.network import build_detector
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
from xcit_dino.train.amp import autocast
from xcit_dino.train.distributed import dist
from xcit_dino.train.run.folder import check_output
from xcit_dino.train.schedules import Hyperparameters, Schedule, linear
from xcit_dino.train.seeding import seed_drop_path

SAMPLING_STREAM = 44


@dataclass(frozen=True)
class StepSchedule(Schedule):
    """Linear warm-up, then a constant that is divided by ten after some shares of the training
    (mmdetection)."""

    @property
    def peak_lr(self) -> float:
        """Linear scaling rule: the learning rate is for 16 images."""
        return self.config.optim.lr * self.global_batch / LR_IMAGES

    def __call__(self, step: int, halvings: int = 0) -> Hyperparameters:
        """Values of step ``step``, counted from 0; halvings: of the learning rate."""
        options = self.config.optim
        warmup = round(options.warmup_epochs * self.steps_per_epoch)
        drops = sum(step >= round(share * self.total_steps) for share in options.lr_drops)
        lr = self.peak_lr * 0.1**drops
        lr *= linear(step, warmup, 1e-3, 1.0) if step < warmup else 1.0
        return Hyperparameters(lr * 0.5**halvings, options.weight_decay)


def forward_backward(
    trainer: TaskTrainer, batch: TargetBatch, step: int, num_micro: int, *, sync_gradients: bool
) -> dict[str, Tensor]:
    """See :data:`xcit_dino.supervised.targets.Pass`; the loss is the sum of torchvision's four."""
    config, world = trainer.config, trainer.world
    images = [to_network(item.image, config.detection, world.device) for item in batch.items]
    targets = [to_targets(item, world.device) for item in batch.items]
    seed_drop_path(config.run.seed, step * num_micro + batch.micro, world.rank)
    keys = sampling_keys(config.run.seed, batch)
    with trainer.sync_gradients(sync_gradients):
        with autocast(world.device, trainer.dtype):
            losses = trainer.parallel(images, targets, keys)
        loss = torch.stack(list(losses.values())).sum()
        trainer.state.scaler.scale(loss / num_micro).backward()
    return {"loss": loss.detach()} | {name: value.detach() for name, value in losses.items()}


def sampling_keys(seed: int, batch: TargetBatch) -> list[tuple[int, int]]:
    """For each image the seeds by which its anchors and its proposals are sampled."""
    bits = random_bits(
        seed, SAMPLING_STREAM, batch.epoch, batch.samples[:, None], np.arange(2)[None]
    )
    return [(first, second) for first, second in (bits >> np.uint64(1)).tolist()]


# ---------------------------------------------------------------------------- a run


def main(config: DetectConfig) -> None:
    """The command; a launcher's job calls :func:`detect` and keeps the signals."""
    loop.command(detect, config)


def detect(config: DetectConfig) -> None:
    """Train and write ``detect`` to ``results.json``.

    Raises:
        InputError: bad options or data; the run folder is as it was before.
        Stopped, RunError: see :func:`xcit_dino.train.loop.train`.
    """
    world = dist.init(config.run.device)
    dist.from_main(lambda: check_output(config.run))
    require_pycocotools()
    data = open_targets(config.loader, "boxes")
    config = replace(config, resolved_scaling(config, config.detection, data.form))
    task = config.detection
    loader = target_loader(config, data, TrainTransform(task), world)
    schedule = StepSchedule(config, loader.plan.steps_per_epoch, loader.plan.batch_size)
    loop.check(config)
    backbone, facts = build_backbone(config, task, task.finetune)
    model = build_detector(task, backbone, len(data.classes))
    trainer = set_up(config, "detector", model, adamw, data, world)
    evaluation = DetectEvaluation("detect", config, task, model, data, schedule, world)
    smaller = "--short_sides, --crop_size or --roi_samples"
    loop.train(
        task_training(trainer, loader, schedule, forward_backward, evaluation, facts, smaller)
    )


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """AdamW over all parameters that are trained."""
    return torch.optim.AdamW(parameter_groups(model), lr=0.0, weight_decay=0.0, fused=True)
