"""The schedules of DINO, in addition to those of every training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.train.schedules import Hyperparameters, Schedule, cosine, linear


@dataclass(frozen=True)
class EmaHyperparameters(Hyperparameters):
    """The scheduled values of one step with a moving average of the student."""

    momentum_teacher: float
    freeze_backbone: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class DinoHyperparameters(EmaHyperparameters):
    """The scheduled values of one step of DINO."""

    teacher_temp: float
    freeze_last_layer: bool


@dataclass(frozen=True)
class DinoSchedule(Schedule):
    """``schedule(step)``, as in dino ``main_dino.py``; in a pure distillation without the values
    that only DINO has."""

    config: PretrainConfig

    def __call__(self, step: int, halvings: int = 0) -> EmaHyperparameters:
        """Values for step ``step``, counted from 0; see :class:`Schedule`."""
        method = self.config.dino
        common = asdict(super().__call__(step, halvings))
        common["momentum_teacher"] = cosine(step, self.total_steps, method.momentum_teacher, 1.0)
        frozen = self.config.start.freeze_backbone
        common["freeze_backbone"] = step < frozen * self.steps_per_epoch
        if not self.config.objective.dino:
            return EmaHyperparameters(**common)
        return DinoHyperparameters(
            **common,
            # by epoch, as DINOLoss does
            teacher_temp=linear(
                step // self.steps_per_epoch,
                round(method.warmup_teacher_temp_epochs),
                method.warmup_teacher_temp,
                method.teacher_temp,
            ),
            freeze_last_layer=step < self.config.head.freeze_last_layer * self.steps_per_epoch,
        )
