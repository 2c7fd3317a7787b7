"""What the schedules of a run say at a step."""

from __future__ import annotations

from dataclasses import dataclass

from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.train.schedules import cosine, linear, warmup_cosine


@dataclass(frozen=True)
class Hyperparameters:
    """The scheduled values of one step."""

    lr: float
    weight_decay: float
    momentum_teacher: float
    teacher_temp: float
    freeze_last_layer: bool


@dataclass(frozen=True)
class Schedule:
    """``schedule(step)``: pure, so that a resumed run is where it would have been."""

    config: PretrainConfig
    steps_per_epoch: int
    global_batch: int

    @property
    def total_steps(self) -> int:
        return self.config.run.epochs * self.steps_per_epoch

    @property
    def peak_lr(self) -> float:
        """DINO's linear rule: ``lr`` is for 256 images."""
        return self.config.optim.lr * self.global_batch / 256

    def __call__(self, step: int, halvings: int = 0) -> Hyperparameters:
        """Values for step ``step``, counted from 0 (dino ``main_dino.py``).

        halvings: of the learning rate; one for each time that the run was rolled back.
        """
        opt, method, total = self.config.optim, self.config.dino, self.total_steps
        warmup = round(opt.warmup_epochs * self.steps_per_epoch)
        return Hyperparameters(
            lr=warmup_cosine(step, total, self.peak_lr, opt.min_lr, warmup, opt.warmup_lr)
            * 0.5**halvings,
            weight_decay=cosine(step, total, opt.weight_decay, opt.weight_decay_end),
            momentum_teacher=cosine(step, total, method.momentum_teacher, 1.0),
            # by epoch, as DINOLoss does
            teacher_temp=linear(
                step // self.steps_per_epoch,
                round(method.warmup_teacher_temp_epochs),
                method.warmup_teacher_temp,
                method.teacher_temp,
            ),
            freeze_last_layer=step < self.config.head.freeze_last_layer * self.steps_per_epoch,
        )
