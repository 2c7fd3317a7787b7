"""DINO pretraining (arXiv 2104.14294): the step, in the paper's order. In addition to DINO, or
instead, the student can learn from a frozen teacher (``ssl/distillation.py``).

``train_step`` is the method; ``pretrain`` sets up a run. The objects that a step uses are built in
``ssl/trainer.py``; what happens between two steps (logging, saving, evaluating, stopping) is in
``train/loop.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xcit_dino.data.loader import Batch, CropLoader
from xcit_dino.data.plan import Plan
from xcit_dino.data.shards.index import ShardIndex, resolve_split
from xcit_dino.errors import InputError, warn
from xcit_dino.eval.online import Evaluate, OnlineKnn, online_knn
from xcit_dino.eval.pictures.render import TrainingCrops
from xcit_dino.options import options
from xcit_dino.ssl import diagnostics, forgetting
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.fit import misfits
from xcit_dino.ssl.schedule import DinoHyperparameters, DinoSchedule, EmaHyperparameters
from xcit_dino.ssl.start import initialize, with_input_settings
from xcit_dino.ssl.trainer import DinoTrainer, set_up
from xcit_dino.train import optim
from xcit_dino.train.amp import autocast, resolve_precision
from xcit_dino.train.distributed import dist
from xcit_dino.train.loop import Training, check, command, train
from xcit_dino.train.run.folder import check_output
from xcit_dino.train.seeding import seed_drop_path
from xcit_dino.train.trainer import crop_loader, images_per_step
from xcit_dino.train.worker_restart import check_shards


def train_step(
    trainer: DinoTrainer, batches: Sequence[Batch], now: EmaHyperparameters
) -> dict[str, Tensor]:
    """One optimizer step over this rank's micro-batches: DINO, distillation from a frozen teacher,
    or both (``--objective``).

    Returns:
        Scalars on the device: the loss and the diagnostics of :mod:`xcit_dino.ssl.diagnostics`.
    """
    config, state = trainer.config, trainer.state
    student, dino_loss = trainer.student, trainer.loss
    optim.set_hyperparameters(state.optimizer, now.lr, now.weight_decay)
    seed_drop_path(config.run.seed, state.step, trainer.world.rank)
    trainer.freeze_batchnorm(now.freeze_backbone or config.start.keeps_batchnorm)
    metrics = []

    for micro, batch in enumerate(batches):
        views = trainer.views(batch)
        targets, features = teacher_targets(trainer, views[0], now)
        last = micro == len(batches) - 1
        passed = student_backward(
            trainer,
            views,
            targets,
            freeze_backbone=now.freeze_backbone,
            loss_weight=1 / len(batches),
            sync_gradients=last,
        )
        features = passed.features if features is None else features
        main = passed.terms.get("dino_loss", passed.loss)
        metrics.append(diagnostics.health(main, targets, features) | passed.logged)

    state.scaler.unscale_(state.optimizer)
    norms = optim.clip_gradients(student.parameters(), config.optim.clip_grad)
    if isinstance(now, DinoHyperparameters) and now.freeze_last_layer:
        student.prototypes.zero_grad(set_to_none=True)
    skipped = optim.step_unless_nonfinite(state.optimizer, state.scaler, norms)
    state.optimizer.zero_grad(set_to_none=True)
    if dino_loss is not None:
        dino_loss.update_center()
    trainer.update_teacher(now.momentum_teacher)
    state.step += 1
    center = {} if dino_loss is None else {"center_norm": dino_loss.center.norm()}
    return optim.mean_of(metrics) | center | {"grad_norm": norms.norm(), "skipped": skipped}


def teacher_targets(
    trainer: DinoTrainer, global_views: Tensor, now: EmaHyperparameters
) -> tuple[Tensor | None, Tensor | None]:
    """Run the teacher on the global views (G*B, 3, S, S), without gradients: targets (G, B, K) and
    features (G*B, D). None if DINO is not part of the objective."""
    if trainer.loss is None or not isinstance(now, DinoHyperparameters):
        return None, None
    teacher = trainer.teacher
    with torch.no_grad(), autocast(trainer.world.device, trainer.dtype):
        features = teacher.backbone(global_views)
        scores = teacher.head(features)  # type: ignore[misc] # it has one with DINO
        num_global = trainer.config.crops.global_crops_number
        return trainer.loss.targets(scores, now.teacher_temp, num_global), features


class StudentPass(NamedTuple):
    """Results of the passes of a micro-batch, without gradients."""

    loss: Tensor
    """The loss that was differentiated."""
    terms: dict[str, Tensor]
    """``dino_loss``, ``distill_loss``: those that the objective has."""
    features: Tensor
    """(V*B, D) of the student, of the global views or, if all have the same size, of all."""

    @property
    def logged(self) -> dict[str, Tensor]:
        """For the log: the loss, and its terms if there are two."""
        return {"loss": self.loss} | (self.terms if len(self.terms) > 1 else {})


def student_backward(
    trainer: DinoTrainer,
    views: list[Tensor],
    targets: Tensor | None,
    *,
    freeze_backbone: bool,
    loss_weight: float = 1.0,
    sync_gradients: bool,
) -> StudentPass:
    """Run the student on all views, compute the loss and run the backward pass.

    With ``--group_backward`` the backward pass of the global views runs before the local views
    start, so that only the activations of one group are kept: losses and gradients add up.

    targets: of DINO's teacher; freeze_backbone: only what follows the backbone gets gradients;
    loss_weight: weight of this micro-batch's loss in the step; sync_gradients: average gradients
    over ranks in the last of these backward passes.
    """
    rows = sum(map(len, views))
    if len({group.shape[-1] for group in views}) == 1:
        views = [torch.cat(views)]  # one size, one pass: batch-norm sees all, as in main_dino.py
    groups = [[group] for group in views] if trainer.config.speed.group_backward else [views]
    losses, found, features = [], [], None
    student = trainer.student if freeze_backbone and not trainer.sharded else trainer.parallel
    for number, group in enumerate(groups, start=1):
        with trainer.sync_gradients(sync_gradients and number == len(groups)):
            tokens = trainer.frozen_targets(group)
            with autocast(trainer.world.device, trainer.dtype):
                outputs = student(group, freeze_backbone=freeze_backbone)
                terms = trainer.terms(outputs, targets, tokens, rows=rows, local=number > 1)
            loss = torch.stack([trainer.weights[name] * term for name, term in terms.items()]).sum()
            trainer.state.scaler.scale(loss * loss_weight).backward()
        losses.append(loss.detach())
        found.append({name: term.detach() for name, term in terms.items()})
        features = outputs.features[0].detach() if features is None else features
    assert features is not None
    if sync_gradients and student is not trainer.parallel:  # DDP waits for the backbone's
        optim.average_gradients(student.parameters())
    total = {  # the first group has every term
        name: torch.stack([each[name] for each in found if name in each]).sum() for name in found[0]
    }
    return StudentPass(torch.stack(losses).sum(), total, features)


def main(config: PretrainConfig) -> None:
    """``xcit-dino pretrain``; a launcher's job calls :func:`pretrain_with_knn` and handles signals
    itself."""
    command(pretrain_with_knn, config)


def pretrain_with_knn(config: PretrainConfig) -> None:
    """:func:`pretrain`, with k-NN every ``--knn_every`` epochs."""
    world = dist.init(config.run.device)
    dist.from_main(lambda: check_output(config.run))
    config = with_input_settings(config)
    evaluations = knn_evaluations(config, world)
    of_teacher = [each.of_teacher() for each in evaluations if config.objective.distills]
    pretrain(config, all_of(evaluations), all_of(of_teacher))


def all_of(evaluations: Sequence[Evaluate]) -> Evaluate | None:
    """Combine several evaluations into one; None if there are none."""

    def evaluate(backbone: nn.Module, epoch: int) -> dict[str, Any]:
        return {k: v for each in evaluations for k, v in each(backbone, epoch).items()}

    return evaluate if evaluations else None


def knn_evaluations(config: PretrainConfig, world: dist.World) -> list[OnlineKnn]:
    """k-NN on the training data, with pictures, and on ``--knn_data_path``."""
    crops = TrainingCrops(config.stages, config.augment, config.loader, config.run.seed)
    every, run = config.online.knn_every, dict(options(config))
    found = [
        online_knn(
            data_path,
            run,
            world,
            every=every,
            name=name,
            pictures=pictures,
            show_channels=config.online.show_channels if pictures else (),
        )  # fmt: skip
        for name, data_path, pictures in (
            ("knn", config.loader.data_path, crops),
            ("knn_other", config.online.knn_data_path, None),
        )
        if every and data_path is not None
    ]
    return [evaluation for evaluation in found if evaluation is not None]


def pretrain(
    config: PretrainConfig,
    evaluate: Evaluate | None = None,
    evaluate_frozen: Evaluate | None = None,
) -> None:
    """Train, or resume training, until the last epoch.

    Args:
        config: the whole run; ``config.run.output_dir`` is resumed where it stopped.
        evaluate: called with (teacher's backbone, epochs done) at epoch ends; the results are
            logged.
        evaluate_frozen: called with the frozen teacher and 0 before the first step.

    Raises:
        InputError: bad options or data; the run folder is as it was before.
        Stopped, RunError: see :func:`xcit_dino.train.loop.train`.
    """
    run = config.run
    world = dist.init(run.device)
    config = with_input_settings(config)
    dtype = resolve_precision(run.precision, world.device)
    index, plan, schedule = planned(config, world)
    check(config)
    for line in misfits(config, index.root, world.size) if world.is_main else ():
        warn(line)
    if config.loader.shard_url is None:
        dist.from_main(lambda: check_shards(index))

    trainer, loader = built(config, world, dtype, index, plan)
    drifts = forgetting.drifts(config, index, world)
    evaluation = TeacherEvaluation(trainer, evaluate, evaluate_frozen, drifts, plan.steps_per_epoch)
    training = Training(
        "pretraining",
        config,
        trainer.state,
        loader,
        schedule,
        train_step=partial(train_step, trainer),
        replay_step=partial(replay_step, trainer, schedule),
        smaller_options="--local_crops_number, --global_crops_size",
        initialize=partial(initialize, trainer),
        diagnostics=partial(collapse_alarms, config, plan.steps_per_epoch),
        evaluate=evaluation,
        evaluation_due=evaluation.due,
        facts=trainer.facts,
        judge=forgetting.judge(config),
        save_start=bool(drifts) and config.health.on_forgetting == "rollback",
    )
    train(training)


def planned(config: PretrainConfig, world: dist.World) -> tuple[ShardIndex, Plan, DinoSchedule]:
    """The training split, which of its images make up each step, and the schedule.

    Raises:
        InputError: no such data, or fewer images than a step takes.
    """
    index, batch_size = open_data(config), images_per_step(config.run, world)
    plan = Plan.of(index, config.loader, seed=config.run.seed, batch_size=batch_size)
    return index, plan, DinoSchedule(config, plan.steps_per_epoch, batch_size)


def built(
    config: PretrainConfig, world: dist.World, dtype: torch.dtype, index: ShardIndex, plan: Plan
) -> tuple[DinoTrainer, CropLoader]:
    """What makes a step, and what it is made of."""
    trainer = set_up(config, world, dtype, index.checksum, plan.batch_size)
    recipes = trainer.augment.recipes
    return trainer, crop_loader(config, world, index, plan, config.stages, recipes=recipes)


def open_data(config: PretrainConfig) -> ShardIndex:
    """The training split of ``--data_path``.

    Raises:
        InputError: there is none, or ranks see different ones.
    """
    path = config.loader.data_path
    if path is None:
        raise InputError("--data_path is missing: the folder that xcit-dino shards make wrote")
    index = ShardIndex.load(resolve_split(path, "train"))
    dist.refuse_other_data(index.checksum, path)
    return index


@dataclass(frozen=True)
class TeacherEvaluation:
    """Evaluations of the teacher: at epoch ends, and what is left of the starting weights every
    ``--forgetting_every``; of a frozen teacher once, before the first step."""

    trainer: DinoTrainer
    evaluate: Evaluate | None
    evaluate_frozen: Evaluate | None
    drifts: Sequence[forgetting.Drift]
    steps_per_epoch: int

    def __call__(self, step: int) -> dict[str, Any]:
        """Metrics and pictures after a step."""
        found = {}
        if self._frozen_due(step):
            assert self.evaluate_frozen and self.trainer.frozen
            found |= self.evaluate_frozen(self.trainer.frozen, 0)
        if not self._teacher_due(step):
            return found
        backbone = self.trainer.eval_backbone()
        if self.evaluate is not None and step % self.steps_per_epoch == 0:
            found |= self.evaluate(backbone, step // self.steps_per_epoch)
        for drift in self.drifts if self._drift_due(step) else ():
            found |= drift(backbone, step)
        return found

    def due(self, step: int) -> bool:
        """Whether there is anything to evaluate after a step."""
        return self._frozen_due(step) or self._teacher_due(step)

    def _frozen_due(self, step: int) -> bool:
        return step == 0 and self.evaluate_frozen is not None

    def _teacher_due(self, step: int) -> bool:
        """Before the first step, only where weights were loaded."""
        known = step > 0 or self.trainer.config.start.init_from is not None
        ends_epoch = self.evaluate is not None and step % self.steps_per_epoch == 0
        return known and (ends_epoch or self._drift_due(step))

    def _drift_due(self, step: int) -> bool:
        every = self.trainer.config.health.forgetting_every * self.steps_per_epoch
        return bool(self.drifts) and step % max(1, round(every)) == 0


def collapse_alarms(
    config: PretrainConfig, steps_per_epoch: int, saved: dict[str, Any]
) -> diagnostics.Alarms:
    """The alarms of a run; ``saved``: what an earlier attempt saved of them."""
    return diagnostics.Alarms(
        config.head.out_dim if config.objective.dino else 0,
        diagnostics.patience(steps_per_epoch),
        stop=config.health.on_collapse == "stop",
        views=config.crops.global_crops_number,
        images=config.run.batch_size_per_gpu,
        saved=saved,
    )


def replay_step(
    trainer: DinoTrainer, schedule: DinoSchedule, step: int, batches: Sequence[Batch]
) -> Tensor:
    """The forward and backward passes of a finished step again; the sum of its losses."""
    seed_drop_path(trainer.config.run.seed, step - 1, trainer.world.rank)
    now, dino_loss = schedule(step - 1), trainer.loss
    rows = dino_loss.rows if dino_loss else 0
    losses = []
    for batch in batches:
        views = trainer.views(batch)
        targets, _ = teacher_targets(trainer, views[0], now)
        passed = student_backward(
            trainer,
            views,
            targets,
            freeze_backbone=now.freeze_backbone,
            loss_weight=1 / len(batches),
            # without shards, a non-finite gradient is to stay on its rank
            sync_gradients=trainer.sharded,
        )
        losses.append(passed.loss)
    if dino_loss:
        dino_loss.rows = rows  # the center has counted them already
    return torch.stack(losses).sum()
