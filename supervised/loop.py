"""Supervised training: the loop that finetuning and distillation share (XCiT ``main.py``,
``engine.py``).

``train`` sets a run up and goes through its steps, ``train_step`` is one of them. Two departures
from the official code, both towards what it says it does: the learning rate moves every step
instead of every epoch, and the averaged weights are validated too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from xcit_dino.data.loader import Batch, CropLoader
from xcit_dino.errors import Stopped, warn
from xcit_dino.models.probe import check_sizes
from xcit_dino.provenance import read_results
from xcit_dino.supervised.config import FinetuneConfig
from xcit_dino.supervised.data import HostAugment, LabelledData, plan_of
from xcit_dino.supervised.schedule import Hyperparameters, Schedule, set_hyperparameters
from xcit_dino.supervised.trainer import Method, Trainer, say_average, set_up
from xcit_dino.supervised.validation import accuracies, record
from xcit_dino.train import memory, optim, signals
from xcit_dino.train.amp import autocast
from xcit_dino.train.config import absolute, dump_yaml
from xcit_dino.train.distributed import dist
from xcit_dino.train.evaluation import Evaluations
from xcit_dino.train.run.folder import check_run, open_run, say_changes
from xcit_dino.train.run.lock import held
from xcit_dino.train.run.log import RunLog
from xcit_dino.train.seeding import seed_drop_path
from xcit_dino.train.state import Checkpoints, load_checkpoint
from xcit_dino.train.watchdog import Watchdog
from xcit_dino.train.worker_restart import steady


def train_step(
    trainer: Trainer, batches: Sequence[Batch], now: Hyperparameters
) -> dict[str, Tensor]:
    """One optimiser step over this rank's micro-batches.

    Returns:
        Scalars on the device.
    """
    config, state, world = trainer.config, trainer.state, trainer.world
    set_hyperparameters(state.optimizer, now)
    losses = []

    for micro, batch in enumerate(batches):
        images, targets = trainer.augment(batch)
        seed_drop_path(config.run.seed, state.step * len(batches) + micro, world.rank)
        with trainer.exchanging(last_micro=micro == len(batches) - 1):
            with autocast(world.device, trainer.dtype):
                logits = trainer.parallel(images)
                loss = trainer.criterion(images, logits, targets)
            state.scaler.scale(loss / len(batches)).backward()
        losses.append({"loss": loss.detach()})

    state.scaler.unscale_(state.optimizer)
    norms = optim.clip_gradients(trainer.model.parameters(), config.optim.clip_grad, together=True)
    skipped = optim.step_unless_nonfinite(state.optimizer, state.scaler, norms)
    state.optimizer.zero_grad(set_to_none=True)
    if trainer.average is not None:
        trainer.average.update(trainer.model)
    state.step += 1
    return optim.mean_of(losses) | {"grad_norm": norms.norm(), "skipped": skipped}


def soft_cross_entropy(images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with soft labels; smoothing and mixing are in them already."""
    return SoftTargetCrossEntropy()(logits.float(), targets)


def train(
    config: FinetuneConfig,
    method: Method,
    model: nn.Module,
    data: LabelledData,
    world: dist.World,
) -> None:
    """Train, or go on training, until the last epoch; then measure and write ``results.json``.

    Raises:
        InputError: bad options or data; the run folder is as it was before.
        Stopped: a signal ended this try; the state is saved.
        RunError: gradients are no numbers any more.
    """
    run = config.run
    sizes = {"input_size": config.regularization.input_size}
    check_sizes(model, config.model.arch, sizes, features=False)
    global_batch = run.batch_size_per_gpu * run.accum_iter * world.size
    plan = plan_of(config, data.train, global_batch)
    steps_per_epoch = plan.steps_per_epoch // plan.repeats  # as many images as there are
    schedule = Schedule(config, steps_per_epoch, global_batch)
    for remark in config.remarks() if world.is_main else ():
        warn(remark)
    loader = CropLoader(
        data.train,
        plan,
        config.regularization.crops,
        config.loader,
        rank=world.rank,
        world_size=world.size,
        accum=run.accum_iter,
        device=world.device,
        run_folder=run.output_dir,
        host_transform=HostAugment(config.regularization, run.seed),
        labelled=True,
    )
    dist.from_main(lambda: check_run(config, run))

    trainer = set_up(config, method, model, data, world)
    state = trainer.state
    with (
        held(run.output_dir),
        Checkpoints(run.output_dir, keep=run.keep_checkpoints) as checkpoints,
        Watchdog(run.output_dir, run.watchdog_minutes, run.on_stall == "abort") as watchdog,
    ):
        if (newest := checkpoints.newest()) is not None:
            saved = load_checkpoint(newest)
            state.load_state_dict(saved)
            method.facts = saved["facts"]
            if world.is_main:
                say_changes(saved.get("config", ""), config, state.step)
        # only now, when nothing can refuse the run any more, is its folder written to
        dist.from_main(lambda: open_run(config, run))
        dist.from_main(checkpoints.clean)
        measured = dist.from_main(lambda: method.name in read_results(run.output_dir))
        if state.step < schedule.total_steps or not measured:
            say_average(config.regularization.model_ema_decay, schedule.total_steps)
            go_on(trainer, method, loader, schedule, checkpoints, watchdog, data)
    dist.barrier()
    if (reason := signals.requested()) and state.step < schedule.total_steps:
        signals.clear()  # heeded; a request made before the loop began was kept until here
        raise Stopped(f"{reason} after step {state.step}; the same command goes on from there")


def go_on(
    trainer: Trainer,
    method: Method,
    loader: CropLoader,
    schedule: Schedule,
    checkpoints: Checkpoints,
    watchdog: Watchdog,
    data: LabelledData,
) -> None:
    """Step after step until the run is to stop, or the last one; then the results.

    Raises:
        RunError: see :func:`train`.
    """
    config, state, run, world = trainer.config, trainer.state, trainer.config.run, trainer.world
    last_step = run.last_step(schedule.total_steps)
    vote = signals.Vote()
    unit = 2 if config.regularization.mixes else 1  # mixup pairs a process's images

    def due(step: int) -> bool:
        epoch, into_epoch = divmod(step, schedule.steps_per_epoch)
        every, finished = config.validation.eval_every, step == schedule.total_steps
        return into_epoch == 0 and 0 < every and epoch % every == 0 and not finished

    saved_at = time.monotonic()
    with RunLog(
        run, state.step, schedule.total_steps, state.global_batch, method.name,
        saved=state.log, waited=loader.wait_seconds,
    ) as log:  # fmt: skip
        evaluations = Evaluations(
            run.output_dir,
            log,
            lambda _: shown(accuracies(trainer.networks, config, data.val, world)),
        )
        if state.step > 0 and due(state.step):
            evaluations.catch_up(state.step)
        for batches in steady(loader, state) if state.step < last_step else ():
            overdue = 0 < 60 * run.checkpoint_minutes < time.monotonic() - saved_at
            vote.cast(overdue)
            now = schedule(state.step)
            with memory.explained(state, run, "--input_size", unit):
                metrics = train_step(trainer, batches, now)
            log.step(state.step, metrics, asdict(now), loader.wait_seconds)

            epoch, into_epoch = divmod(state.step, schedule.steps_per_epoch)
            wish = vote.result()
            stopping = wish == signals.STOP or state.step == last_step
            if into_epoch == 0 or stopping or wish == signals.SAVE:
                state.log = log.state()
                if world.is_main:
                    permanent = into_epoch == 0 and epoch % run.saveckp_freq == 0
                    whole = state.state_dict() | described(config, method, epoch)
                    checkpoints.save(whole, permanent)
                saved_at = time.monotonic()
            urgent = wish == signals.STOP and state.step < last_step  # the next try catches up
            if due(state.step) and not urgent:
                evaluations(state.step)
            watchdog.beat(state.step)
            if stopping:
                break
        dist.from_main(checkpoints.wait)
        if state.step == schedule.total_steps:
            results = accuracies(trainer.networks, config, data.val, world)
            log.write(state.step, shown(results))
            newest = checkpoints.newest()
            if world.is_main:
                assert newest is not None
                record(method.name, method.network, config, data, results, method.facts, newest)


def described(config: FinetuneConfig, method: Method, epoch: int) -> dict[str, Any]:
    """What a checkpoint says of itself beside its state."""
    about = {"epoch": epoch, "arch": config.model.arch, "facts": method.facts}
    return about | {"config": dump_yaml(absolute(config))}


def shown(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """``{"": {"top1": 3.0}, "ema": ...}`` -> ``{"val_top1": 3.0, "val_ema_top1": ...}``."""
    return {
        "_".join(filter(None, ("val", network, name))): value
        for network, metrics in results.items()
        for name, value in metrics.items()
    }
