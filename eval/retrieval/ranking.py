"""Scores of rankings as the benchmarks of retrieval define them (Oxford and Paris revisited,
Copydays): average precision is the area under the precision-recall curve, by trapezoids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Truth:
    """What a query should find, as row numbers of the bank."""

    relevant: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64 [R]; a query without any is left out of the means."""
    junk: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64 [J], neither right nor wrong: taken out of the ranking."""


def average_precision(positions: np.ndarray, relevant: int) -> float:
    """Average precision in [0, 1] of one query.

    Args:
        positions: int64 [P], ascending: places from 0 at which relevant images were found.
        relevant: number of relevant images in the bank, at least P.
    """
    places, found = positions.astype(np.float64), np.arange(len(positions))
    before = np.where(places == 0, 1.0, found / np.maximum(places, 1))
    return float(((before + (found + 1) / (places + 1)) / 2).sum() / relevant)


def positions_of(ranking: np.ndarray, truth: Truth) -> np.ndarray:
    """int64 [P], ascending: places from 0 of the relevant images in a ranking (row numbers of the
    bank, the most similar first) without its junk."""
    rows = np.concatenate([ranking, truth.relevant, truth.junk])
    kinds = np.zeros(int(rows.max()) + 1, np.int8)
    kinds[truth.relevant] = 1
    kinds[truth.junk] = -1
    ranked = kinds[ranking]
    return np.flatnonzero(ranked[ranked >= 0])


def scores(
    positions: Sequence[np.ndarray], relevant: Sequence[int], ks: Sequence[int]
) -> dict[str, float]:
    """Means over the queries that have relevant images, in percent; empty if none has.

    ``map``: mean average precision; ``recall_K``: queries with a relevant image among the first K;
    ``precision_K``: relevant images among the first K, or among those down to the last relevant one
    where they are fewer (as in Oxford and Paris revisited).

    Args:
        positions: of each query, see :func:`positions_of`.
        relevant: number of relevant images in the bank, of each query.
        ks: values of K.
    """
    rows = [
        _of_query(found, count, ks)
        for found, count in zip(positions, relevant, strict=True)
        if count
    ]
    if not rows:
        return {}
    names = ["map", *(f"{kind}_{k}" for k in ks for kind in ("recall", "precision"))]
    return dict(zip(names, (100 * np.mean(rows, axis=0)).tolist(), strict=True))


def _of_query(positions: np.ndarray, relevant: int, ks: Sequence[int]) -> list[float]:
    values = [average_precision(positions, relevant)]
    for k in ks:
        last = int(positions[-1]) + 1 if len(positions) else k
        found = int((positions < k).sum())
        values += [float(found > 0), found / min(last, k)]
    return values
