"""The schedules of DINO beside those of every training."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.train.schedules import Hyperparameters, Schedule, cosine, linear


@dataclass(frozen=True)
class DinoHyperparameters(Hyperparameters):
    """The scheduled values of one step."""

    momentum_teacher: float
    teacher_temp: float
    freeze_last_layer: bool


@dataclass(frozen=True)
class DinoSchedule(Schedule):
    """``schedule(step)``, as in dino ``main_dino.py``."""

    config: PretrainConfig

    def __call__(self, step: int, halvings: int = 0) -> DinoHyperparameters:
        """Values for step ``step``, counted from 0; see :class:`Schedule`."""
        method = self.config.dino
        return DinoHyperparameters(
            **asdict(super().__call__(step, halvings)),
            momentum_teacher=cosine(step, self.total_steps, method.momentum_teacher, 1.0),
            # by epoch, as DINOLoss does
            teacher_temp=linear(
                step // self.steps_per_epoch,
                round(method.warmup_teacher_temp_epochs),
                method.warmup_teacher_temp,
                method.teacher_temp,
            ),
            freeze_last_layer=step < self.config.head.freeze_last_layer * self.steps_per_epoch,
        )
