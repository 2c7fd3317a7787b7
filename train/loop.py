"""The training loop: everything around the steps.

A training supplies its step, data and schedule as a :class:`Training`. Here are the lock on the run
folder, resuming, the restart of dead loader workers, the vote to stop or save, checkpoints,
evaluations, the watchdog, roll-backs and the log.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from xcit_dino.errors import InputError, Stopped, warn
from xcit_dino.options import absolute, dump_yaml
from xcit_dino.train import memory, signals
from xcit_dino.train.distributed import dist, fsdp
from xcit_dino.train.evaluation import Evaluations
from xcit_dino.train.nonfinite import Skips, first_tensor, keys_of
from xcit_dino.train.run.folder import check_run, open_run, say_changes
from xcit_dino.train.run.lock import held
from xcit_dino.train.run.log import RunLog
from xcit_dino.train.run.rollback import RollBack, roll_back
from xcit_dino.train.schedules import Schedule
from xcit_dino.train.state import Checkpoints, TrainState, load_checkpoint
from xcit_dino.train.watchdog import Watchdog
from xcit_dino.train.worker_restart import StepLoader, restarting_workers


class Diagnostics(Protocol):
    """Monitors the logged metrics of a training (collapse alarms)."""

    def observe(self, step: int, line: dict[str, float]) -> dict[str, float]:
        """Check a line of the log; returns additional metrics to log."""
        ...

    def state(self) -> dict[str, Any]:
        """State with which a resumed training continues the checks."""
        ...


@dataclass
class Training:
    """A training for the loop to run; the same on all ranks."""

    label: str
    """Of the progress bar."""
    config: Any
    """Of the whole run, with a section ``run``."""
    state: TrainState
    loader: StepLoader
    schedule: Schedule
    train_step: Callable[[Sequence[Any], Any], dict[str, Tensor]]
    """(this rank's micro-batches, the step's hyperparameters) -> scalars on the device."""
    replay_step: Callable[[int, Sequence[Any]], Tensor]
    """Repeat forward and backward passes of a finished step, counted from 1; returns its loss."""
    smaller_options: str
    """Options that reduce the memory per image, for the out-of-memory message."""
    batch_unit: int = 1
    """A process's batch size must be a multiple of this."""
    initialize: Callable[[], dict[str, Any]] = dict
    """Loads the initial weights if there is no checkpoint; returns facts about them."""
    diagnostics: Callable[[dict[str, Any]], Diagnostics] | None = None
    """Builds the diagnostics from the state saved by an earlier attempt."""
    evaluate: Callable[[int], dict[str, Any]] = lambda step: {}
    """Step -> metrics and pictures to log."""
    evaluation_due: Callable[[int], bool] = lambda step: False
    """Whether there is anything to evaluate after a step, 0 for the initial weights."""
    judge: Callable[[int, dict[str, Any], int], int | None] = lambda step, found, rollbacks: None
    """What follows from an evaluation after a step and a number of roll-backs; returns the step
    whose checkpoint must stay, or raises RollBack or RunError."""
    save_start: bool = False
    """Save the initial weights for good, to go back to."""
    finish: Callable[[RunLog, Checkpoints, dict[str, Any]], None] = lambda *finished: None
    """Called once after the last step, with ``facts``."""
    facts: dict[str, Any] = field(default_factory=dict)
    """About the initial weights; stored in checkpoints."""


def command(training: Callable[[Any], None], config: Any) -> None:
    """What ``xcit-dino pretrain`` and its like do: a training, with signals that save the run
    before they end it."""
    signals.install(signal.SIGTERM, signal.SIGINT)
    with dist.leaving():
        training(config)


def check(config: Any) -> None:
    """Say what the options do together that one would not expect, and refuse the folder of another
    run, before anything is built."""
    for remark in config.remarks() if dist.is_main() else ():
        warn(remark)
    dist.from_main(lambda: check_run(config, config.run))


def train(training: Training) -> None:
    """Train, or resume training, until the last step; after a roll-back continue from the last
    checkpoint.

    Raises:
        InputError: the run folder belongs to another run, or its checkpoint does not fit.
        Stopped: a signal ended this attempt; the state is saved.
        RunError: gradients stayed non-finite, memory ran out, loader workers kept dying, or the
            last checkpoint could not be written.
    """
    run, state, rollbacks = training.config.run, training.state, 0
    with (
        held(run.output_dir),
        Checkpoints(run.output_dir, keep=run.keep_checkpoints) as checkpoints,
        Watchdog(run.output_dir, run.watchdog_minutes, run.on_stall == "abort") as watchdog,
    ):
        while True:
            resume(training, checkpoints)
            state.rollbacks = max(state.rollbacks, rollbacks)
            try:
                train_loop(training, checkpoints, watchdog)
                break
            except RollBack as reason:
                rollbacks = state.rollbacks + 1
                roll_back(reason, rollbacks, checkpoints)
    dist.barrier()
    if (reason := signals.requested()) and state.step < training.schedule.total_steps:
        signals.clear()  # acted upon; a request made before the loop began was kept until here
        raise Stopped(f"{reason} after step {state.step}; the same command resumes from there")


def resume(training: Training, checkpoints: Checkpoints) -> None:
    """Load the newest intact checkpoint, or the initial weights; the run folder is written to only
    afterwards, when the run can no longer be refused."""
    config = training.config
    if (newest := checkpoints.newest()) is None:
        training.facts = training.facts | training.initialize()
    else:
        saved = load_checkpoint(newest)
        training.state.load_state_dict(saved)
        refuse_shorter(training)
        training.facts = saved.get("facts", training.facts)
        if dist.is_main():
            say_changes(saved.get("config", ""), config, training.state.step)
    dist.from_main(lambda: open_run(config, config.run))
    dist.from_main(checkpoints.clean)


def refuse_shorter(training: Training) -> None:
    """Raise InputError where a run is beyond the last step of its options."""
    step, last = training.state.step, training.schedule.total_steps
    if step > last:
        raise InputError(
            f"--epochs {training.config.run.epochs}: ends at step {last}, and the run in "
            f"{training.config.run.output_dir} is at step {step} already; give as many epochs as "
            "it has, or another --output_dir"
        )


def train_loop(training: Training, checkpoints: Checkpoints, watchdog: Watchdog) -> None:
    """Run steps until the last one, or until the run is to stop.

    Raises:
        RollBack: gradients were non-finite for too long, or an evaluation demands it.
        RunError: see :func:`train`.
    """
    run, state = training.config.run, training.state
    loader, schedule = training.loader, training.schedule
    last_step = run.last_step(schedule.total_steps)
    vote, saved_at = signals.Vote(), time.monotonic()
    skips = Skips(
        run.max_skipped,
        run.on_nonfinite == "rollback",
        state.modules,
        partial(first_tensor, state.modules, training.replay_step),
        partial(keys_of, loader.index, training.config.loader),
        run.output_dir,
        state.scaler.is_enabled(),
    )
    alarms = training.diagnostics and training.diagnostics(state.log.get("alarms") or {})
    with RunLog(
        run, state.step, schedule.total_steps, state.global_batch, training.label,
        saved=state.log, waited=loader.wait_seconds,
    ) as log:  # fmt: skip
        evaluations = Evaluations(run.output_dir, log, training.evaluate)
        if training.save_start and state.step == 0:
            save(training, checkpoints, 0, permanent=True)
        if training.evaluation_due(state.step):
            found = evaluations.catch_up(state.step)
            checkpoints.good = training.judge(state.step, found, state.rollbacks)
        for batches in restarting_workers(loader, state) if state.step < last_step else ():
            overdue = 0 < 60 * run.checkpoint_minutes < time.monotonic() - saved_at
            vote.cast(overdue)
            now = schedule(state.step, state.rollbacks)
            with memory.explained(state, run, training.smaller_options, training.batch_unit):
                metrics = training.train_step(batches, now)
            skips.add(state.step, metrics["skipped"], batches)
            line = log.step(state.step, metrics, asdict(now), loader.wait_seconds)
            if line and alarms:
                log.write(state.step, alarms.observe(state.step, line))

            epoch, into_epoch = divmod(state.step, schedule.steps_per_epoch)
            wish = vote.result()
            stopping = wish == signals.STOP or state.step == last_step
            late = wish == signals.SAVE and not skips.in_a_row
            if into_epoch == 0 or stopping or late:
                state.log = log.state() | ({"alarms": alarms.state()} if alarms else {})
                permanent = into_epoch == 0 and epoch % run.saveckp_freq == 0
                save(training, checkpoints, epoch, permanent)
                saved_at = time.monotonic()
            urgent = wish == signals.STOP and state.step < last_step  # the next attempt catches up
            if training.evaluation_due(state.step) and not urgent:
                found = evaluations(state.step)
                checkpoints.good = training.judge(state.step, found, state.rollbacks)
            watchdog.beat(state.step)
            if stopping:
                break
        dist.from_main(checkpoints.wait)
        if state.step == schedule.total_steps:
            training.finish(log, checkpoints, training.facts)


def save(training: Training, checkpoints: Checkpoints, epoch: int, permanent: bool) -> None:
    """Write a checkpoint in the background: the state and its metadata."""
    config, state = training.config, fsdp.full_tensors(training.state.state_dict())
    if dist.is_main():
        about = {"epoch": epoch, "arch": config.model.arch, "config": dump_yaml(absolute(config))}
        facts = {"facts": training.facts} if training.facts else {}
        checkpoints.save(state | about | facts, permanent)
