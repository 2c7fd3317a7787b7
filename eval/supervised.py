"""Supervised training: the loop that finetuning and distillation share (XCiT ``main.py``,
``engine.py``).

``train`` sets a run up and goes through its steps, ``train_step`` is one of them. Two departures
from the official code, both towards what it says it does: the learning rate moves every step
instead of every epoch, and the averaged weights are validated too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3  # pyright: ignore
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from xcit_dino.data.loader import Batch, CropLoader
from xcit_dino.errors import Stopped
from xcit_dino.eval.supervised_data import DeviceAugment, HostAugment, LabelledData, plan_of
from xcit_dino.eval.supervised_optim import Hyperparameters, Schedule, adamw, set_hyperparameters
from xcit_dino.eval.train_config import FinetuneConfig, StartConfig
from xcit_dino.eval.validation import accuracies, record
from xcit_dino.models.weights import load_backbone
from xcit_dino.models.zoo import ModelConfig, create_model
from xcit_dino.ssl.pretrain import seed_drop_path
from xcit_dino.train import dist, memory, optim, stop, syncbn
from xcit_dino.train.config import dump_yaml
from xcit_dino.train.lock import held
from xcit_dino.train.log import RunLog
from xcit_dino.train.precision import autocast, resolve_precision
from xcit_dino.train.provenance import file_checksum, read_results
from xcit_dino.train.run import fingerprint, open_run
from xcit_dino.train.state import Checkpoints, TrainState, load_checkpoint, weights_file
from xcit_dino.train.steady import steady
from xcit_dino.train.watchdog import Watchdog

Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Images [B, 3, S, S], logits [B, C], soft labels [B, C] -> loss."""


@dataclass
class Method:
    """What tells finetuning and distillation apart."""

    name: str
    """Of the command, and of its results."""
    network: str
    """What the trained network is called in checkpoints."""
    criterion: Criterion
    facts: dict[str, Any]
    """Of the start and the teacher; they go into the protocol."""
    modules: dict[str, nn.Module] = field(default_factory=dict)
    """Other networks for the checkpoints."""


@dataclass
class Trainer:
    """What a step works with."""

    config: FinetuneConfig
    world: dist.World
    model: nn.Module
    average: ModelEmaV3 | None
    criterion: Criterion
    augment: Callable[[Batch], tuple[Tensor, Tensor]]
    dtype: torch.dtype
    state: TrainState
    parallel: nn.Module  # the model, in DistributedDataParallel where there are several ranks

    def exchanging(self, last_micro: bool) -> AbstractContextManager[None]:
        """Ranks exchange gradients once a step, with the last micro-batch."""
        if isinstance(self.parallel, DistributedDataParallel) and not last_micro:
            return self.parallel.no_sync()
        return nullcontext()

    @property
    def networks(self) -> dict[str, nn.Module]:
        """What is validated: ``""`` the trained network, ``"ema"`` its moving average."""
        average = {} if self.average is None else {"ema": self.average.module}
        return {"": self.model} | average


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
    norms = optim.clip_gradients(trainer.model.parameters(), config.optim.clip_grad)
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
        InputError: bad options or data, before anything is written.
        Stopped: a signal ended this try; the state is saved.
        RunError: gradients are no numbers any more.
    """
    run = config.run
    dtype = resolve_precision(run.precision, world.device)
    global_batch = run.batch_size_per_gpu * run.accum_iter * world.size
    plan = plan_of(config, data.train, global_batch)
    steps_per_epoch = plan.steps_per_epoch // plan.repeats  # as many images as there are
    schedule = Schedule(config, steps_per_epoch, global_batch)
    retouch = HostAugment(config.regularization, run.seed)
    augment = DeviceAugment(config, data.num_classes, world)
    dist.from_main(lambda: open_run(config, run))

    # -- network, its average, optimiser
    if world.size > 1:
        syncbn.convert(model)
    model.to(world.device).train()
    decay = config.regularization.model_ema_decay
    average = ModelEmaV3(model, decay=decay) if decay else None
    averages = {} if average is None else {"model_ema": average.module}
    state = TrainState(
        {method.network: model, **averages, **method.modules},
        adamw(model, config.regularization.layer_decay),
        torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16),
        data=data.train.checksum,
        global_batch=global_batch,
        config=fingerprint(config),
    )

    # -- resume
    checkpoints = Checkpoints(run.output_dir, keep=run.keep_checkpoints)
    facts = method.facts
    if (newest := checkpoints.newest()) is not None:
        saved = load_checkpoint(newest)
        state.load_state_dict(saved)
        facts = saved["facts"]
    parallel: nn.Module = model
    if world.size > 1:  # synchronised batch-norm keeps the buffers equal without broadcasts
        parallel = DistributedDataParallel(model, broadcast_buffers=False)
    trainer = Trainer(
        config, world, model, average, method.criterion, augment, dtype, state, parallel
    )
    if state.step == schedule.total_steps and method.name in read_results(run.output_dir):
        return
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
        retouch=retouch,
        labelled=True,
    )

    # -- the loop
    vote = stop.Vote()
    saved_at = time.monotonic()
    with (
        held(run.output_dir),
        checkpoints,
        Watchdog(run.output_dir, run.watchdog_minutes, run.on_stall == "abort") as watchdog,
        RunLog(run, state.step, schedule.total_steps, global_batch, method.name) as log,
    ):
        dist.from_main(checkpoints.clean)
        last_step = run.last_step(schedule.total_steps)
        for batches in steady(loader, state) if state.step < last_step else ():
            vote.cast()
            now = schedule(state.step)
            with memory.explained(state, run):
                metrics = train_step(trainer, batches, now)
            log.step(state.step, metrics, asdict(now), loader.wait_seconds)

            epoch, into_epoch = divmod(state.step, steps_per_epoch)
            finished = state.step == schedule.total_steps
            every = config.validation.eval_every
            if into_epoch == 0 and every and epoch % every == 0 and not finished:
                log.write(state.step, shown(accuracies(trainer.networks, config, data.val, world)))
            stopping = vote.result() == stop.STOP or state.step == last_step
            waited = time.monotonic() - saved_at
            late = 0 < 60 * run.checkpoint_minutes < waited
            if world.is_main and (into_epoch == 0 or stopping or late):
                permanent = into_epoch == 0 and epoch % run.saveckp_freq == 0
                about = {"epoch": epoch, "arch": config.model.arch, "facts": facts}
                text = {"config": dump_yaml(config)}
                newest = checkpoints.save(state.state_dict() | about | text, permanent)
                saved_at = time.monotonic()
            watchdog.beat(state.step)
            if stopping:
                break
        dist.from_main(checkpoints.wait)
        if state.step == schedule.total_steps:
            results = accuracies(trainer.networks, config, data.val, world)
            log.write(state.step, shown(results))
            if world.is_main:
                assert newest is not None
                record(method.name, method.network, config, data, results, facts, newest)
    dist.barrier()
    if (reason := stop.requested()) and state.step < schedule.total_steps:
        stop.clear()  # heeded; a request made before the loop began was kept until here
        raise Stopped(f"{reason} after step {state.step}; the same command goes on from there")


def shown(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """``{"": {"top1": 3.0}, "ema": ...}`` -> ``{"val_top1": 3.0, "val_ema_top1": ...}``."""
    return {
        "_".join(filter(None, ("val", network, name))): value
        for network, metrics in results.items()
        for name, value in metrics.items()
    }


# -- the start


def started(folder: Path) -> bool:
    """Whether a run folder holds a whole checkpoint, which then has all weights needed."""
    return Checkpoints(folder).newest() is not None


def build_model(
    model: ModelConfig, start: StartConfig, num_classes: int, run_folder: Path, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """A classifier with the weights to start from, and where those come from.

    Raises:
        InputError: no such weights, of another architecture, or for another number of classes.
    """
    torch.manual_seed(seed)
    network = create_model(model.arch, num_classes=num_classes, drop_path_rate=model.drop_path_rate)
    if start.pretrained_weights is None or started(run_folder):
        return network, {"start": "scratch"}
    path = weights_file(start.pretrained_weights, "--pretrained_weights")
    report = load_backbone(
        path, network, start.checkpoint_key, head="new" if start.new_head else "auto"
    )
    if dist.is_main():
        print(report, flush=True)
    facts = {"start": report.network, "start_weights": file_checksum(path), "head": report.head}
    return network, facts
