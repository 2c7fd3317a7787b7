"""Statistics of each channel of a set, measured image by image and merged shard by shard.

Integers are counted in exact histograms. Of floating-point values mean, standard deviation,
minimum and maximum are exact, and the percentiles those of a fixed sample of pixels, drawn from
the image's number. The results do not depend on how many processes measured, nor on where an
interrupted packing was cut in two: each shard's share is a function of its images, and shards are
merged in their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xcit_dino.data.pixels import SHARES, PixelFormat, Statistics

SAMPLE = 1 << 22
"""Floating-point values that are kept of a whole set, over all channels (at least 2^16 each)."""
MAX_AN_IMAGE = 4096
ENOUGH = 1000
"""Images that are measured where not all are decoded (``--verify false``)."""
Shares = Mapping[str, NDArray[Any]]
"""What a shard's part file stores; of equal lengths over channels."""


def is_measured(number: int, total: int, all_decoded: bool) -> bool:
    """Whether image ``number`` of ``total`` is: all, or every n-th."""
    return all_decoded or number % -(-total // ENOUGH) == 0


class Histograms:
    """Of integers: one exact histogram [C, values of the type]."""

    def __init__(self, channels: int, dtype: np.dtype) -> None:
        limits = np.iinfo(dtype)
        self.low = int(limits.min)
        self.counts = np.zeros((channels, int(limits.max) - self.low + 1), np.int64)
        self.invalid = np.zeros(channels, np.int64)
        self.images = 0

    def add(self, number: int, values: NDArray[Any], mask: NDArray[np.bool_] | None) -> None:
        """One image [H, W, C], and which values are none."""
        self.images += 1
        for c, counts in enumerate(self.counts):
            channel = values[..., c].ravel()
            if mask is not None:
                channel = channel[~mask[..., c].ravel()]
            self.invalid[c] += values.shape[0] * values.shape[1] - channel.size
            if self.low:
                channel = channel.astype(np.int32) - self.low
            counts += np.bincount(channel, minlength=counts.size)

    def shares(self) -> Shares:
        """The occupied part of the histograms and its first value."""
        used = np.flatnonzero(self.counts.any(0))
        first, last = (int(used[0]), int(used[-1])) if used.size else (0, 0)
        return {
            "counts": self.counts[:, first : last + 1], "first": np.array(first + self.low),
            "invalid": self.invalid, "images": np.array(self.images),
        }  # fmt: skip

    def merge(self, shares: Shares) -> None:
        start = int(shares["first"]) - self.low
        self.counts[:, start : start + shares["counts"].shape[1]] += shares["counts"]
        self.invalid += shares["invalid"]
        self.images += int(shares["images"])

    def statistics(self) -> Statistics:
        levels = np.arange(self.counts.shape[1], dtype=np.float64) + self.low
        mean, std, quantiles = [], [], []
        for counts in self.counts:
            total = int(counts.sum())
            average = float(counts @ levels) / max(total, 1)
            mean.append(average)
            std.append(float(np.sqrt(counts @ (levels - average) ** 2 / max(total, 1))))
            # The smallest value at or below which that share lies; of none the minimum.
            ranks = np.maximum(np.ceil(np.array(SHARES) / 100 * total), 1)
            places = np.searchsorted(np.cumsum(counts), ranks) if total else np.zeros(len(SHARES))
            quantiles.append(tuple((places + self.low * (total > 0)).astype(float).tolist()))
        return _statistics(mean, std, quantiles, self.invalid, self.counts.sum(1), self.images)


class Moments:
    """Of floating-point values: exact moments and limits, and a sample of values."""

    def __init__(self, channels: int, total: int) -> None:
        self.total = max(total, 1)
        self.budget = max(SAMPLE // channels, 1 << 16)
        self.count = np.zeros(channels, np.int64)
        self.invalid = np.zeros(channels, np.int64)
        self.mean, self.squares = np.zeros(channels), np.zeros(channels)
        self.low, self.high = np.full(channels, np.inf), np.full(channels, -np.inf)
        self.samples: list[NDArray[np.float32]] = []
        self.images = 0

    def add(self, number: int, values: NDArray[Any], mask: NDArray[np.bool_] | None) -> None:
        """Image ``number`` of the set [H, W, C], and which values are none."""
        flat = values.reshape(-1, values.shape[-1])
        valid = None if mask is None else ~mask.reshape(flat.shape)
        where = True if valid is None else valid
        count = np.full(flat.shape[1], len(flat)) if valid is None else valid.sum(0)
        wide = flat.astype(np.float64)
        mean = wide.sum(0, where=where) / np.maximum(count, 1)
        squares = np.square(wide - mean).sum(0, where=where)
        self._join(count, mean, squares)
        self.low = np.minimum(self.low, wide.min(0, where=where, initial=np.inf))
        self.high = np.maximum(self.high, wide.max(0, where=where, initial=-np.inf))
        self.invalid += len(flat) - count
        self.images += 1
        self._draw(number, flat, valid)

    def _join(self, count: NDArray[Any], mean: NDArray[Any], squares: NDArray[Any]) -> None:
        """Moments of two sets from those of each (Chan, Golub and LeVeque 1979)."""
        both = np.maximum(self.count + count, 1)
        apart = mean - self.mean
        self.squares = self.squares + squares + apart**2 * self.count * count / both
        self.mean = self.mean + apart * count / both
        self.count = self.count + count

    def _draw(self, number: int, flat: NDArray[Any], valid: NDArray[np.bool_] | None) -> None:
        """Values of randomly chosen pixels, NaN where there is none; of every n-th image only
        where there are more images than values to keep."""
        if number % -(-self.total // self.budget):
            return
        size = min(max(self.budget // self.total, 1), MAX_AN_IMAGE)
        picked = np.random.Generator(np.random.Philox(key=number)).integers(len(flat), size=size)
        sample = flat[picked].astype(np.float32)
        if valid is not None:
            sample[~valid[picked]] = np.nan
        self.samples.append(sample)

    def shares(self) -> Shares:
        samples = self.samples or [np.zeros((0, len(self.count)), np.float32)]
        return {
            "count": self.count, "invalid": self.invalid, "mean": self.mean,
            "squares": self.squares, "low": self.low, "high": self.high,
            "sample": np.concatenate(samples), "images": np.array(self.images),
        }  # fmt: skip

    def merge(self, shares: Shares) -> None:
        self._join(shares["count"], shares["mean"], shares["squares"])
        self.low = np.minimum(self.low, shares["low"])
        self.high = np.maximum(self.high, shares["high"])
        self.invalid += shares["invalid"]
        self.images += int(shares["images"])
        self.samples.append(shares["sample"])

    def statistics(self) -> Statistics:
        std = np.sqrt(self.squares / np.maximum(self.count, 1))
        sample = self.shares()["sample"]
        quantiles = []
        for c, count in enumerate(self.count):
            row = np.zeros(len(SHARES))
            if count:
                drawn = sample[:, c][~np.isnan(sample[:, c])].astype(np.float64)
                drawn = drawn if drawn.size else np.array([self.mean[c]])
                row = np.percentile(drawn, SHARES, method="inverted_cdf")
                row[0], row[-1] = self.low[c], self.high[c]
            quantiles.append(tuple(row.tolist()))
        return _statistics(
            self.mean.tolist(), std.tolist(), quantiles, self.invalid, self.count, self.images
        )


Meter = Histograms | Moments


def meter(form: PixelFormat, total: int) -> Meter:
    """An empty one for a set of ``total`` images."""
    if form.numpy.kind == "f":
        return Moments(form.channels, total)
    return Histograms(form.channels, form.numpy)


def merged(form: PixelFormat, total: int, shares: Iterable[Shares]) -> Statistics:
    """The statistics of a set from what its shards' meters stored, in their order."""
    whole = meter(form, total)
    for part in shares:
        whole.merge(part)
    return whole.statistics()


def _statistics(
    mean: list[float], std: list[float], quantiles: list[tuple[float, ...]],
    invalid: NDArray[Any], valid: NDArray[Any], images: int,
) -> Statistics:  # fmt: skip
    share = invalid / np.maximum(invalid + valid, 1)
    return Statistics(tuple(mean), tuple(std), tuple(quantiles), tuple(share.tolist()), images)
