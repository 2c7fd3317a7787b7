"""Schedules: pure functions of the step (dino ``utils.cosine_scheduler``, ``DINOLoss``)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Hyperparameters:
    """The scheduled values of one step."""

    lr: float
    """Of the last layer; with layer decay, lower layers have a fraction of it."""
    weight_decay: float


@dataclass(frozen=True)
class Schedule:
    """``schedule(step)``: a pure function, so that a resumed run continues exactly.

    Args:
        config: of the run, with sections ``run`` and ``optim``.
        steps_per_epoch: optimizer steps per epoch.
        global_batch: images per step.
        cooldown_epochs: final epochs at the final values.
    """

    config: Any
    steps_per_epoch: int
    global_batch: int
    cooldown_epochs: float = 0.0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.run.epochs * self.steps_per_epoch

    @property
    def peak_lr(self) -> float:
        """Linear scaling rule: ``lr`` is for batch size 256."""
        return self.config.optim.lr * self.global_batch / 256

    def __call__(self, step: int, halvings: int = 0) -> Hyperparameters:
        """Values for step ``step``, counted from 0.

        halvings: of the learning rate, one per roll-back.
        """
        opt = self.config.optim
        warmup = round(opt.warmup_epochs * self.steps_per_epoch)
        end = self.total_steps - round(self.cooldown_epochs * self.steps_per_epoch)
        lr = warmup_cosine(step, end, self.peak_lr, opt.min_lr, warmup, opt.warmup_lr)
        return Hyperparameters(
            lr=lr * 0.5**halvings,
            weight_decay=cosine(step, end, opt.weight_decay, opt.weight_decay_end),
        )


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Half a cosine from ``start`` (step 0) towards ``end`` (reached at ``total``)."""
    share = min(max(step / max(total, 1), 0.0), 1.0)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * share))


def linear(step: int, total: int, start: float, end: float) -> float:
    """A straight line from ``start`` (step 0) to ``end`` (step ``total - 1``), then constant.

    One step is ``start``, as in numpy's ``linspace``.
    """
    if step >= max(total - 1, min(total, 1)):
        return end
    return start + (end - start) * step / max(total - 1, 1)


def warmup_cosine(
    step: int, total: int, peak: float, end: float, warmup: int = 0, start: float = 0.0
) -> float:
    """Linear warm-up over ``warmup`` steps to ``peak``, then cosine to ``end``.

    Equal at every step to the array of dino ``utils.cosine_scheduler``.
    """
    if step < warmup:
        return linear(step, warmup, start, peak)
    return cosine(step - warmup, total - warmup, peak, end)
