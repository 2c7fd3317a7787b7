"""DINO pretraining (arXiv 2104.14294): the loop, in the paper's order.

``pretrain`` sets a run up and goes through its steps, ``train_step`` is the method,
``ssl/trainer.py`` puts together what both need. Everything between two steps (logging, saving,
evaluating, stopping) stands in ``go_on``.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xcit_dino.data.loader import Batch, CropLoader
from xcit_dino.data.plan import Plan
from xcit_dino.data.shards.index import ShardIndex, resolve_split
from xcit_dino.errors import InputError, Stopped, warn
from xcit_dino.eval.online import Evaluate, online_knn
from xcit_dino.eval.pictures.render import TrainingCrops
from xcit_dino.models.weights.load import input_settings, load_pretraining
from xcit_dino.ssl import diagnostics
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.nonfinite import RollBack, Skips, first_tensor, keys_of, roll_back
from xcit_dino.ssl.schedule import Hyperparameters, Schedule
from xcit_dino.ssl.trainer import Trainer, set_up
from xcit_dino.train import memory, optim, signals
from xcit_dino.train.amp import autocast, resolve_precision
from xcit_dino.train.config import absolute, dump_yaml, options
from xcit_dino.train.distributed import dist, fsdp
from xcit_dino.train.evaluation import Evaluations
from xcit_dino.train.run.folder import check_output, check_run, open_run, say_changes
from xcit_dino.train.run.lock import held
from xcit_dino.train.run.log import RunLog
from xcit_dino.train.seeding import seed_drop_path
from xcit_dino.train.state import Checkpoints, load_checkpoint, weights_file
from xcit_dino.train.watchdog import Watchdog
from xcit_dino.train.worker_restart import check_shards, steady


def train_step(
    trainer: Trainer, batches: Sequence[Batch], now: Hyperparameters
) -> dict[str, Tensor]:
    """One optimiser step of DINO over this rank's micro-batches.

    Returns:
        Scalars on the device: the loss and the signs of :mod:`xcit_dino.ssl.diagnostics`.
    """
    config, state = trainer.config, trainer.state
    student, teacher, dino_loss = trainer.student, trainer.teacher, trainer.loss
    optim.set_hyperparameters(state.optimizer, now.lr, now.weight_decay)
    seed_drop_path(config.run.seed, state.step, trainer.world.rank)
    signs = []

    for micro, batch in enumerate(batches):
        views = trainer.views(batch)
        targets, features = teach(trainer, views[0], now)
        last = micro == len(batches) - 1
        loss = learn(trainer, views, targets, exchange=last, share=1 / len(batches))
        signs.append(diagnostics.health(loss, targets, features))

    state.scaler.unscale_(state.optimizer)
    norms = optim.clip_gradients(student.parameters(), config.optim.clip_grad)
    if now.freeze_last_layer:
        student.head.last_layer.zero_grad(set_to_none=True)
    skipped = optim.step_unless_nonfinite(state.optimizer, state.scaler, norms)
    state.optimizer.zero_grad(set_to_none=True)
    dino_loss.update_center()
    optim.update_ema(teacher, student, now.momentum_teacher)
    state.step += 1
    return optim.mean_of(signs) | {
        "center_norm": dino_loss.center.norm(),
        "grad_norm": norms.norm(),
        "skipped": skipped,
    }


def teach(trainer: Trainer, global_views: Tensor, now: Hyperparameters) -> tuple[Tensor, Tensor]:
    """The teacher on the global views (G*B, 3, S, S), without gradients: targets (G, B, K) and its
    features (G*B, D)."""
    teacher = trainer.teacher
    with torch.no_grad(), autocast(trainer.world.device, trainer.dtype):
        features = teacher.backbone(global_views)
        scores = teacher.head(features)
        num_global = trainer.config.crops.global_crops_number
        return trainer.loss.targets(scores, now.teacher_temp, num_global), features


def learn(
    trainer: Trainer, views: list[Tensor], targets: Tensor, *, exchange: bool, share: float = 1.0
) -> Tensor:
    """The student on all views, loss and backward pass; the loss.

    With ``--group_backward`` the global views go all the way back before the local ones begin, so
    that the activations of one group are there at a time: their losses and gradients add up.

    exchange: the ranks exchange gradients in (the last of) these backward passes; share: of the
    step's loss.
    """
    if len({group.shape[-1] for group in views}) == 1:
        views = [torch.cat(views)]  # one size, one pass: batch-norm sees all, as in main_dino.py
    groups = [[group] for group in views] if trainer.config.speed.group_backward else [views]
    num_views = sum(map(len, views)) // targets.shape[1]
    losses = []
    for number, group in enumerate(groups, start=1):
        with trainer.exchanging(exchange and number == len(groups)):
            with autocast(trainer.world.device, trainer.dtype):
                z, last_layer = trainer.parallel(group), trainer.student.head.last_layer
                loss = trainer.loss(z, last_layer, targets, local=number > 1, num_views=num_views)
            trainer.state.scaler.scale(loss * share).backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def main(config: PretrainConfig) -> None:
    """``xcit-dino pretrain``: :func:`pretrain_with_knn`, with signals that save before they end
    it."""
    signals.install(signal.SIGTERM, signal.SIGINT)
    with dist.leaving():
        pretrain_with_knn(config)


def pretrain_with_knn(config: PretrainConfig) -> None:
    """:func:`pretrain`, with k-NN every ``--knn_every`` epochs."""
    world = dist.init(config.run.device)
    dist.from_main(lambda: check_output(config.run))
    crops = TrainingCrops(config.crops, config.augment, config.loader, config.run.seed)
    evaluations = []
    for name, data_path, pictures in (
        ("knn", config.loader.data_path, crops),
        ("knn_other", config.online.knn_data_path, None),
    ):
        if config.online.knn_every and data_path is not None:
            evaluation = online_knn(
                data_path,
                dict(options(config)),
                world,
                every=config.online.knn_every,
                name=name,
                pictures=pictures,
            )
            evaluations += [evaluation] if evaluation else []

    def evaluate(backbone: nn.Module, epoch: int) -> dict[str, Any]:
        return {k: v for each in evaluations for k, v in each(backbone, epoch).items()}

    pretrain(config, evaluate if evaluations else None)


def pretrain(config: PretrainConfig, evaluate: Evaluate | None = None) -> None:
    """Train, or go on training, until the last epoch.

    Args:
        config: the whole run; ``config.run.output_dir`` is resumed from where it stopped.
        evaluate: called with (teacher's backbone, step) at epoch ends; its numbers are logged.

    Raises:
        InputError: bad options or data; the run folder is as it was before.
        Stopped: a signal ended this try; the state is saved.
        RunError: gradients are no numbers any more.
    """
    run = config.run
    world = dist.init(run.device)
    dtype = resolve_precision(run.precision, world.device)

    # -- data: which samples, in which order
    if config.loader.data_path is None:
        raise InputError("--data_path is missing: the folder that xcit-dino shards make wrote")
    index = ShardIndex.load(resolve_split(config.loader.data_path, "train"))
    dist.refuse_other_data(index.checksum, config.loader.data_path)
    global_batch = run.batch_size_per_gpu * run.accum_iter * world.size
    plan = Plan.of(index, config.loader, seed=run.seed, batch_size=global_batch)
    schedule = Schedule(config, plan.steps_per_epoch, global_batch)
    for remark in config.remarks() if world.is_main else ():
        warn(remark)
    dist.from_main(lambda: check_run(config, run))
    if config.loader.shard_url is None:
        dist.from_main(lambda: check_shards(index))

    # -- student, teacher, loss, optimiser
    trainer = set_up(config, world, dtype, index.checksum, global_batch)
    state = trainer.state
    loader = CropLoader(
        index,
        plan,
        config.crops,
        config.loader,
        rank=world.rank,
        world_size=world.size,
        accum=run.accum_iter,
        device=world.device,
        run_folder=run.output_dir,
        recipes=trainer.augment.recipes,
    )

    # -- the steps; from the last checkpoint, and again from there where the run is rolled back
    folder, rollbacks = run.output_dir, 0
    with (
        held(folder),
        Checkpoints(folder, keep=run.keep_checkpoints) as checkpoints,
        Watchdog(folder, run.watchdog_minutes, run.on_stall == "abort") as watchdog,
    ):
        while True:
            resume(trainer, checkpoints)
            state.rollbacks = max(state.rollbacks, rollbacks)
            try:
                go_on(trainer, loader, schedule, checkpoints, watchdog, evaluate)
                break
            except RollBack as reason:
                rollbacks = state.rollbacks + 1
                roll_back(reason, rollbacks, checkpoints)
    if (reason := signals.requested()) and state.step < schedule.total_steps:
        signals.clear()  # heeded; a request made before the loop began was kept until here
        raise Stopped(f"{reason} after step {state.step}; the same command goes on from there")


def resume(trainer: Trainer, checkpoints: Checkpoints) -> None:
    """Put the trainer where the newest whole checkpoint was, or where ``--init_from`` says; only
    then, when nothing can refuse the run any more, is its folder written to."""
    config = trainer.config
    if (newest := checkpoints.newest()) is not None:
        saved = load_checkpoint(newest)
        trainer.state.load_state_dict(saved)
        if trainer.world.is_main:
            say_changes(saved.get("config", ""), config, trainer.state.step)
    elif config.start.init_from is not None:
        source = weights_file(config.start.init_from, "--init_from")
        taken = load_pretraining(source, trainer.student, trainer.teacher, trainer.loss.center)
        if trainer.world.is_main:
            print(taken, flush=True)
            before, now = input_settings(source), config.augment
            if before and (before.mean, before.std) != (now.mean, now.std):
                warn(
                    f"--init_from {source}: was trained with --mean {spaced(before.mean)} --std "
                    f"{spaced(before.std)}, and this run has {spaced(now.mean)} and "
                    f"{spaced(now.std)}"
                )
    dist.from_main(lambda: open_run(config, config.run))
    dist.from_main(checkpoints.clean)


def spaced(values: tuple[float, ...]) -> str:
    """As on a command line."""
    return " ".join(f"{value:g}" for value in values)


def go_on(
    trainer: Trainer,
    loader: CropLoader,
    schedule: Schedule,
    checkpoints: Checkpoints,
    watchdog: Watchdog,
    evaluate: Evaluate | None,
) -> None:
    """Step after step until the last one, or until the run is to stop.

    Raises:
        RollBack: gradients were not finite for too long.
        RunError: that, or memory ran out, workers died, the last checkpoint could not be written.
    """
    config, state, run, world = trainer.config, trainer.state, trainer.config.run, trainer.world
    vote = signals.Vote()
    skips = Skips(
        run.max_skipped,
        config.health.on_nonfinite == "rollback",
        state.modules,
        partial(first_tensor, state.modules, partial(passes, trainer, schedule)),
        partial(keys_of, loader.index, config.loader),
        run.output_dir,
    )
    alarms = diagnostics.Alarms(
        config.head.out_dim,
        diagnostics.patience(schedule.steps_per_epoch),
        stop=config.health.on_collapse == "stop",
        views=config.crops.global_crops_number,
        images=run.batch_size_per_gpu,
        saved=state.log.get("alarms"),
    )

    def evaluated(step: int) -> dict[str, Any]:
        epoch = step // schedule.steps_per_epoch
        return {} if evaluate is None else evaluate(trainer.evaluated(), epoch)

    saved_at = time.monotonic()
    with RunLog(
        run, state.step, schedule.total_steps, state.global_batch,
        saved=state.log, waited=loader.wait_seconds,
    ) as log:  # fmt: skip
        evaluations = Evaluations(run.output_dir, log, evaluated)
        at_start = state.step > 0 or config.start.init_from is not None  # before weights change
        if evaluate is not None and at_start and state.step % schedule.steps_per_epoch == 0:
            evaluations.catch_up(state.step)
        last_step = run.last_step(schedule.total_steps)
        for batches in steady(loader, state) if state.step < last_step else ():
            overdue = 0 < 60 * run.checkpoint_minutes < time.monotonic() - saved_at
            vote.cast(overdue)
            now = schedule(state.step, state.rollbacks)
            with memory.explained(state, run, "--local_crops_number, --global_crops_size"):
                metrics = train_step(trainer, batches, now)
            skips.add(state.step, metrics["skipped"], batches)
            if line := log.step(state.step, metrics, asdict(now), loader.wait_seconds):
                log.write(state.step, alarms.observe(state.step, line))

            epoch, into_epoch = divmod(state.step, schedule.steps_per_epoch)
            wish = vote.result()
            stopping = wish == signals.STOP or state.step == last_step
            late = wish == signals.SAVE and not skips.in_a_row
            if into_epoch == 0 or stopping or late:
                state.log = log.state() | {"alarms": alarms.state()}
                whole = fsdp.whole(state.state_dict())
                if world.is_main:
                    permanent = into_epoch == 0 and epoch % run.saveckp_freq == 0
                    checkpoints.save(whole | described(config, epoch), permanent)
                saved_at = time.monotonic()
            urgent = wish == signals.STOP and state.step < last_step  # the next try catches up
            if evaluate is not None and into_epoch == 0 and not urgent:
                evaluations(state.step)
            watchdog.beat(state.step)
            if stopping:
                break
        dist.from_main(checkpoints.wait)


def passes(trainer: Trainer, schedule: Schedule, step: int, batches: Sequence[Batch]) -> Tensor:
    """The forward and backward passes of a step that has been done; the sum of its losses."""
    seed_drop_path(trainer.config.run.seed, step - 1, trainer.world.rank)
    now, rows = schedule(step - 1), trainer.loss.rows
    losses = []
    for batch in batches:
        views = trainer.views(batch)
        targets, _ = teach(trainer, views[0], now)
        # shards have no gradient before it is exchanged; else it is to stay on its rank
        exchange = trainer.sharded
        losses.append(learn(trainer, views, targets, exchange=exchange, share=1 / len(batches)))
    trainer.loss.rows = rows  # the centre has counted them
    return torch.stack(losses).sum()


def described(config: PretrainConfig, epoch: int) -> dict[str, Any]:
    """What a checkpoint says of itself beside its state."""
    return {"epoch": epoch, "arch": config.model.arch, "config": dump_yaml(absolute(config))}
