"""k-NN of several labels or values an image: the mean of the neighbors' targets, each weighted by
exp(cosine / T) as the votes of :mod:`xcit_dino.eval.knn` are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CELLS = 1 << 24  # targets of neighbors gathered at a time


def weighted_means(
    similarities: np.ndarray,
    neighbors: np.ndarray,
    targets: np.ndarray,
    ks: Sequence[int],
    temperature: float,
) -> np.ndarray:
    """float64 [len(ks), Q, C]: means over the first k neighbors. Of labels it is the share of the
    votes that each has, from 0 to 1.

    Args:
        similarities: float [Q, K] cosines, descending; K at least the largest k.
        neighbors: int64 [Q, K], rows of ``targets``.
        targets: [N, C], 0 or 1 of labels, or values.
        temperature: T > 0.
    """
    # a common factor of a query's weights changes nothing; this one keeps exp() finite at any T
    above = similarities.astype(np.float64) - similarities[:, :1]
    weights = np.exp(above / temperature)
    means = np.empty((len(ks), len(neighbors), targets.shape[1]))
    rows = max(1, CELLS // (neighbors.shape[1] * targets.shape[1]))
    for start in range(0, len(neighbors), rows):
        part = slice(start, start + rows)
        near, weight = targets[neighbors[part]], weights[part]
        for number, k in enumerate(ks):
            total = np.einsum("qk,qkc->qc", weight[:, :k], near[:, :k])
            means[number, part] = total / weight[:, :k].sum(1, keepdims=True)
    return means
