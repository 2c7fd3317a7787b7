"""Supervised training: the step that finetuning and distillation share (XCiT ``main.py``,
``engine.py``).

``train_step`` is the method, ``train`` sets up a run; what happens between two steps is in
``train/loop.py``. There are two differences from the official code, both in line with its
documentation: the learning rate changes every step instead of every epoch, and the averaged
weights are validated too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from xcit_dino.data.loader import Batch
from xcit_dino.models.probe import check_bf16, check_sizes
from xcit_dino.supervised.config import FinetuneConfig
from xcit_dino.supervised.data import HostAugment, LabeledData, plan_of
from xcit_dino.supervised.trainer import Method, SupervisedTrainer, say_average, set_up
from xcit_dino.supervised.validation import Validation
from xcit_dino.train import loop, optim
from xcit_dino.train.amp import autocast, resolve_precision
from xcit_dino.train.distributed import dist
from xcit_dino.train.loop import Training
from xcit_dino.train.schedules import Hyperparameters, Schedule
from xcit_dino.train.seeding import seed_drop_path
from xcit_dino.train.state import newest_checkpoint
from xcit_dino.train.trainer import crop_loader, images_per_step


def train_step(
    trainer: SupervisedTrainer, batches: Sequence[Batch], now: Hyperparameters
) -> dict[str, Tensor]:
    """One optimizer step over this rank's micro-batches.

    Returns:
        Scalars on the device.
    """
    config, state = trainer.config, trainer.state
    optim.set_hyperparameters(state.optimizer, now.lr, now.weight_decay)
    losses = []

    for micro, batch in enumerate(batches):
        last = micro == len(batches) - 1
        loss = forward_backward(trainer, batch, state.step, len(batches), sync_gradients=last)
        losses.append({"loss": loss})

    state.scaler.unscale_(state.optimizer)
    norms = optim.clip_gradients(trainer.model.parameters(), config.optim.clip_grad, together=True)
    skipped = optim.step_unless_nonfinite(state.optimizer, state.scaler, norms)
    state.optimizer.zero_grad(set_to_none=True)
    if trainer.average is not None:
        decay = config.regularization.model_ema_decay
        optim.update_average(trainer.average, trainer.model, decay)
    state.step += 1
    return optim.mean_of(losses) | {"grad_norm": norms.norm(), "skipped": skipped}


def forward_backward(
    trainer: SupervisedTrainer, batch: Batch, step: int, num_micro: int, *, sync_gradients: bool
) -> Tensor:
    """Augmentation, network, loss and backward pass of one of ``num_micro`` micro-batches; returns
    the loss.

    step: optimizer steps before this one; sync_gradients: average gradients over ranks.
    """
    images, targets = trainer.augment(batch)
    config, rank = trainer.config, trainer.world.rank
    seed_drop_path(config.run.seed, step * num_micro + batch.micro, rank)
    with trainer.sync_gradients(sync_gradients):
        with autocast(trainer.world.device, trainer.dtype):
            logits = trainer.parallel(images)
            loss = trainer.criterion(images, logits, targets)
        trainer.state.scaler.scale(loss / num_micro).backward()
    return loss.detach()


def soft_cross_entropy(images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with soft labels, which already include smoothing and mixing."""
    return SoftTargetCrossEntropy()(logits.float(), targets)


def train(
    config: FinetuneConfig,
    method: Method,
    model: nn.Module,
    data: LabeledData,
    world: dist.World,
) -> None:
    """Train, or resume training, until the last epoch; then validate and write ``results.json``.

    Raises:
        InputError: bad options or data; the run folder is as it was before.
        Stopped, RunError: see :func:`xcit_dino.train.loop.train`.
    """
    run, regularization = config.run, config.regularization
    sizes = {"input_size": regularization.input_size}
    check_sizes(model, config.model.arch, sizes, features=False)
    dtype = resolve_precision(run.precision, world.device)
    check_bf16(model, config.model.arch, sizes, world.device, dtype)
    plan = plan_of(config, data.train, images_per_step(run, world))
    steps_per_epoch = plan.steps_per_epoch // plan.repeats  # as many images as the data set
    schedule = Schedule(config, steps_per_epoch, plan.batch_size, config.cooldown_epochs)
    host_transform = HostAugment(regularization, run.seed, data.form)
    loader = crop_loader(
        config, world, data.train, plan, regularization.crops,
        host_transform=host_transform, labeled=True,
    )  # fmt: skip
    loop.check(config)

    trainer = set_up(config, method, model, data, world)
    validation = Validation(method, trainer, data, schedule)
    if not validation.recorded(newest_checkpoint(run.output_dir)):
        say_average(regularization.model_ema_decay, schedule.total_steps)
    training = Training(
        method.name,
        config,
        trainer.state,
        loader,
        schedule,
        train_step=partial(train_step, trainer),
        replay_step=partial(replay_step, trainer),
        smaller_options="--input_size",
        batch_unit=2 if regularization.mixes else 1,  # mixup pairs a process's images
        evaluate=validation,
        evaluation_due=validation.due,
        finish=validation.finish,
        facts=method.facts,
    )
    loop.train(training)


def replay_step(trainer: SupervisedTrainer, step: int, batches: Sequence[Batch]) -> Tensor:
    """Repeat the forward and backward passes of a finished step; returns the sum of its losses."""
    # without FSDP, a non-finite gradient must stay on its rank
    replay = partial(forward_backward, trainer, sync_gradients=trainer.sharded)
    return torch.stack([replay(batch, step - 1, len(batches)) for batch in batches]).sum()
