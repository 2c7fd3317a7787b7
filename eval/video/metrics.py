"""Agreement of object masks in a video: region similarity J and contour accuracy F.

Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation" (CVPR
2016). The numbers are those of davisvideochallenge/davis2017-evaluation, semi-supervised task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
TOLERANCE = 0.008  # of the image's diagonal, in F
RECALLED = 0.5  # a frame whose J or F is above this counts for the recall
PARTS = 4  # of a video: the decay is the mean of the first minus that of the last


class Statistics(NamedTuple):
    """J or F of an object over the frames of a video."""

    mean: float
    recall: float
    """Fraction of the frames above 1/2."""
    decay: float
    """Mean over the first quarter of the frames minus mean over the last."""


def jaccard(predicted: Mask, true: Mask) -> float:
    """J of two masks [H, W]: intersection over union; 1 where both are empty."""
    union = np.count_nonzero(predicted | true)
    return np.count_nonzero(predicted & true) / union if union else 1.0


def contour_f(predicted: Mask, true: Mask) -> float:
    """F of two masks [H, W]: harmonic mean of the fractions of each contour that lie near the
    other, 1 where both have none.

    Near: within 0.8 % of the diagonal, rounded up to whole pixels.
    """
    radius = math.ceil(TOLERANCE * math.hypot(*true.shape))
    ours, theirs = contour(predicted), contour(true)
    count, wanted = np.count_nonzero(ours), np.count_nonzero(theirs)
    if not count or not wanted:
        return float(count == wanted)
    precision = np.count_nonzero(ours & dilated(theirs, radius)) / count
    recall = np.count_nonzero(theirs & dilated(ours, radius)) / wanted
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def statistics(values: Sequence[float]) -> Statistics:
    """Mean, recall and decay over the frames of a video, at least one."""
    found = np.asarray(values, np.float64)
    ends = np.round(np.linspace(1, len(found), PARTS + 1) + 1e-10).astype(int) - 1
    first, last = found[ends[0] : ends[1] + 1], found[ends[-2] : ends[-1] + 1]
    recall = np.mean(found > RECALLED)
    return Statistics(float(found.mean()), float(recall), float(first.mean() - last.mean()))


def contour(mask: Mask) -> Mask:
    """Pixels that differ from their right, lower or lower right neighbor (Martin's seg2bmap)."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, across = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    found = (mask != right) | (mask != below) | (mask != across)
    # beyond the last row and column there is nothing to differ from, not even diagonally
    found[-1], found[:, -1] = (mask != right)[-1], (mask != below)[:, -1]
    found[-1, -1] = False
    return found


def dilated(mask: Mask, radius: int) -> Mask:
    """Pixels within ``radius`` of one that is set: x^2 + y^2 <= radius^2."""
    height, width = mask.shape
    sums = np.zeros((height, width + 2 * radius + 1), np.int32)  # running sums along the rows
    np.cumsum(np.pad(mask, ((0, 0), (radius, radius))), axis=1, out=sums[:, 1:])
    result = np.zeros_like(mask)
    for dy in range(-min(radius, height - 1), min(radius, height - 1) + 1):
        reach = math.isqrt(radius * radius - dy * dy)
        start, stop = radius - reach, radius + reach + 1
        row = sums[:, stop : stop + width] > sums[:, start : start + width]
        if dy >= 0:
            result[dy:] |= row[: height - dy]
        else:
            result[:dy] |= row[-dy:]
    return result
