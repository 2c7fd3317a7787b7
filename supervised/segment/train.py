"""``xcit-dino segment``: semantic segmentation on a frozen or finetuned backbone.

``train_step`` is the method, ``segment`` sets a run up; what happens between two steps is in
``train/loop.py``, what an evaluation is in ``evaluation.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xcit_dino.data.augment import normalize
from xcit_dino.data.plan import Plan
from xcit_dino.data.targets.loader import TargetBatch, TargetLoader
from xcit_dino.files import file_checksum
from xcit_dino.models.weights.load import load_backbone
from xcit_dino.models.zoo import create_model
from xcit_dino.options import replace
from xcit_dino.supervised.segment.config import SegmentConfig
from xcit_dino.supervised.segment.data import (
    IGNORED,
    MaskedData,
    TrainTransform,
    collated,
    open_masks,
)
from xcit_dino.supervised.segment.evaluation import SegmentEvaluation
from xcit_dino.supervised.segment.heads import resized
from xcit_dino.supervised.segment.network import Segmenter, build_segmenter
from xcit_dino.supervised.trainer import resolved_scaling
from xcit_dino.train import loop, optim
from xcit_dino.train.amp import autocast, resolve_precision
from xcit_dino.train.distributed import dist, sync_batchnorm
from xcit_dino.train.loop import Training
from xcit_dino.train.run.folder import check_output
from xcit_dino.train.schedules import Hyperparameters, Schedule, linear
from xcit_dino.train.seeding import seed_drop_path
from xcit_dino.train.state import TrainState, has_checkpoint, weights_file
from xcit_dino.train.trainer import Trainer, data_parallel, images_per_step

LR_IMAGES = 16  # images per step that --lr is for (XCiT: 8 GPUs x 2)


@dataclass
class SegmentTrainer(Trainer):
    """What a step works with."""

    config: SegmentConfig
    model: Segmenter


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


def train_step(
    trainer: SegmentTrainer, batches: Sequence[TargetBatch], now: Hyperparameters
) -> dict[str, Tensor]:
    """One optimizer step over this rank's micro-batches; returns scalars on the device."""
    state = trainer.state
    optim.set_hyperparameters(state.optimizer, now.lr, now.weight_decay)
    losses = []

    for micro, batch in enumerate(batches):
        last = micro == len(batches) - 1
        loss = forward_backward(trainer, batch, state.step, len(batches), sync_gradients=last)
        losses.append({"loss": loss})

    state.scaler.unscale_(state.optimizer)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    norms = optim.clip_gradients(trained, trainer.config.optim.clip_grad, together=True)
    skipped = optim.step_unless_nonfinite(state.optimizer, state.scaler, norms)
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return optim.mean_of(losses) | {"grad_norm": norms.norm(), "skipped": skipped}


def forward_backward(
    trainer: SegmentTrainer, batch: TargetBatch, step: int, num_micro: int, *, sync_gradients: bool
) -> Tensor:
    """Network, loss and backward pass of one of ``num_micro`` micro-batches; returns the loss, the
    mean over the grid of learning rates where there is one.

    step: optimizer steps before this one; sync_gradients: average gradients over ranks.
    """
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
    return shown.detach()


def pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean cross-entropy over all pixels, 0 of those that do not count (mmsegmentation), logits
    enlarged to the masks' size. The divisor is the same of any masks, so that the mean over
    processes and micro-batches is that of the whole batch."""
    logits = resized(logits.float(), masks.shape[-2:])
    total = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum")
    return total / masks.numel()


def replay_step(trainer: SegmentTrainer, step: int, batches: Sequence[TargetBatch]) -> Tensor:
    """The forward and backward passes of a finished step again; the sum of its losses."""
    replay = partial(forward_backward, trainer, sync_gradients=False)
    return torch.stack([replay(batch, step - 1, len(batches)) for batch in batches]).sum()


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
    data = open_masks(config.loader)
    scaling = resolved_scaling(config, config.segmentation, data.form)
    config = replace(config, scaling)
    run = config.run
    plan = Plan.of(data.train, config.loader, seed=run.seed, batch_size=images_per_step(run, world))
    schedule = PolySchedule(config, plan.steps_per_epoch, plan.batch_size)
    loader = TargetLoader(
        data.train, plan, config.loader, TrainTransform(config.segmentation), rank=world.rank,
        world_size=world.size, accum=run.accum_iter, run_folder=run.output_dir,
    )  # fmt: skip
    loop.check(config)
    model, facts = build(config, len(data.classes))
    trainer = set_up(config, model, data, world)
    evaluation = SegmentEvaluation(config, trainer.model, data, schedule, world)
    training = Training(
        "segment",
        config,
        trainer.state,
        loader,
        schedule,
        train_step=partial(train_step, trainer),
        replay_step=partial(replay_step, trainer),
        smaller_options="--crop_size",
        evaluate=evaluation,
        evaluation_due=evaluation.due,
        finish=evaluation.finish,
        facts=facts,
    )
    loop.train(training)


def build(config: SegmentConfig, classes: int) -> tuple[Segmenter, dict[str, Any]]:
    """The network with its initial weights, and where those come from.

    Raises:
        InputError: no such weights, or of another architecture.
    """
    torch.manual_seed(config.run.seed)
    rate = config.model.drop_path_rate if config.segmentation.finetune else 0.0
    backbone = create_model(
        config.model.arch,
        num_classes=0,
        drop_path_rate=rate,
        in_chans=config.segmentation.channels,
    )
    facts: dict[str, Any] = {"start": "random weights"}
    path = config.start.pretrained_weights
    if path is not None and not has_checkpoint(config.run.output_dir):
        file = weights_file(path, "--pretrained_weights")
        report = load_backbone(file, backbone, config.start.checkpoint_key, adapt=True)
        if dist.is_main():
            print(report, flush=True)
        facts = {"start": report.network, "start_weights": file_checksum(file)}
    torch.manual_seed(config.run.seed + 1)  # the head's, whatever the backbone drew
    return build_segmenter(config, backbone, classes), facts


def set_up(
    config: SegmentConfig, model: Segmenter, data: MaskedData, world: dist.World
) -> SegmentTrainer:
    """The network on its device, the optimizer, and the state of both."""
    dtype = resolve_precision(config.run.precision, world.device)
    if world.size > 1:
        sync_batchnorm.convert(model)
    model.to(world.device).train()
    state = TrainState(
        {"segmenter": model},
        adamw(model, config),
        torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16),
        data=data.train.checksum,
        global_batch=images_per_step(config.run, world),
    )
    return SegmentTrainer(config, world, dtype, state, data_parallel(model, world), model)


def adamw(model: Segmenter, config: SegmentConfig) -> torch.optim.AdamW:
    """AdamW without decay on 1-D tensors and what the backbone exempts; the heads of a grid have
    their shares of the learning rate."""
    spared, scales = model.no_weight_decay(), dict[str, float]()
    if config.segmentation.head == "linear":
        for number, lr in enumerate(config.optim.lrs):
            for name, _ in model.head.get_submodule(f"heads.{number}").named_parameters():
                scales[f"head.heads.{number}.{name}"] = lr / max(config.optim.lrs)
    groups = optim.grouped(model, lambda name, p: p.ndim > 1 and name not in spared, scales)
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)
