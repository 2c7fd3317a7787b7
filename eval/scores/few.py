"""Few labels: n images of each class, in several draws; results are their means and spreads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from xcit_dino.data.rng import random_bits, text_key
from xcit_dino.errors import InputError
from xcit_dino.eval.features import Features
from xcit_dino.train.distributed import dist


def draw(labels: np.ndarray, per_class: int, seed: int, number: int) -> np.ndarray:
    """int64, ascending: rows of ``per_class`` random images of each class, all of them where a
    class has fewer.

    Args:
        labels: int64 [N]; -1 (no label) is never drawn.
        seed: of all draws.
        number: of the draw; different draws are independent.
    """
    order = np.lexsort((random_bits(text_key("few"), seed, number, np.arange(len(labels))), labels))
    ordered = labels[order]
    place = np.arange(len(labels)) - np.searchsorted(ordered, ordered)  # within its class, from 0
    return np.sort(order[(place < per_class) & (ordered >= 0)])


def check_classes(labels: np.ndarray, per_class: int) -> None:
    """Print how many classes have fewer images than are to be drawn.

    Raises:
        InputError: all of them.
    """
    counts = np.bincount(labels[labels >= 0])
    counts = counts[counts > 0]
    small = int((counts < per_class).sum())
    if small == len(counts) and counts.max() < per_class:
        raise InputError(
            f"--labels_per_class {per_class}: the largest class has only {counts.max()} labeled, "
            f"readable images; ask for at most {counts.max()}"
        )
    if small and dist.is_main():
        print(
            f"--labels_per_class {per_class}: {small} of {len(counts)} classes have fewer images; "
            "all of theirs are used",
            flush=True,
        )


def subset(features: Features, rows: np.ndarray) -> Features:
    """Some rows of the features, in memory."""
    blocks = {name: np.ascontiguousarray(block[rows]) for name, block in features.blocks.items()}
    return dataclasses.replace(features, blocks=blocks, labels=features.labels[rows])


def mean_and_spread(draws: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the draws under the same names, standard deviations (n - 1) as ``NAME_std``; the
    latter not for a single draw."""
    table = {name: np.array([metrics[name] for metrics in draws]) for name in draws[0]}
    found = {name: float(values.mean()) for name, values in table.items()}
    if len(draws) > 1:
        found |= {f"{name}_std": float(values.std(ddof=1)) for name, values in table.items()}
    return found
