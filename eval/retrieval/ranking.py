"""Scores of rankings as the benchmarks of retrieval define them (Oxford and Paris revisited,
Copydays): average precision is the area under the precision-recall curve, by trapezoids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Truth:
    """What a query should find, as row numbers of the bank."""

    relevant: np.ndarray
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
    kept = ranking[~np.isin(ranking, truth.junk)]
    return np.flatnonzero(np.isin(kept, truth.relevant))


def scores(
    rankings: np.ndarray | Sequence[np.ndarray], truths: Sequence[Truth], ks: Sequence[int]
) -> dict[str, float]:
    """Means over the queries that have relevant images, in percent.

    ``map``: mean average precision; ``recall_K``: queries with a relevant image among the first K;
    ``precision_K``: relevant images among the first K, or among those down to the last relevant one
    where they are fewer (as in Oxford and Paris revisited).

    Args:
        rankings: for each query all row numbers of the bank, or the first of them, the most
            similar first.
        truths: one a query.
        ks: values of K.
    """
    rows = []
    for ranking, truth in zip(rankings, truths, strict=True):
        if not len(truth.relevant):
            continue
        positions = positions_of(np.asarray(ranking), truth)
        first = [float(len(positions) > 0 and positions[0] < k) for k in ks]
        rows.append(
            [average_precision(positions, len(truth.relevant)), *first]
            + [_precision(positions, k) for k in ks]
        )
    names = ["map", *(f"recall_{k}" for k in ks), *(f"precision_{k}" for k in ks)]
    means = 100 * np.mean(rows, axis=0) if rows else np.full(len(names), np.nan)
    return dict(zip(names, means.tolist(), strict=True))


def _precision(positions: np.ndarray, k: int) -> float:
    if not len(positions):
        return 0.0
    depth = min(int(positions[-1]) + 1, k)
    return float((positions < depth).sum() / depth)


# -- Oxford and Paris revisited --------------------------------------------------------------------

LEVELS = {  # setup -> (relevant, junk): kinds of images in the ground truth
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}


def level_truths(ground_truth: Sequence[Mapping[str, np.ndarray]], level: str) -> list[Truth]:
    """The truths of one setup; ``ground_truth``: per query the row numbers of its ``easy``,
    ``hard`` and ``junk`` images."""
    relevant, junk = LEVELS[level]
    return [
        Truth(
            *(
                np.concatenate([np.asarray(query[kind], np.int64) for kind in kinds])
                for kinds in (relevant, junk)
            )
        )  # fmt: skip
        for query in ground_truth
    ]
