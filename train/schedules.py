"""Schedules: pure functions of the step (dino ``utils.cosine_scheduler``, ``DINOLoss``)."""

from __future__ import annotations

import math


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
