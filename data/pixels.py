"""What the images of a set are: channels, type of their values, and the statistics of each channel.

Stored in ``index.json`` as ``pixels``; a set without it consists of 8-bit RGB images. Sets of
other kinds are decoded as they are (``data/decode/native.py``), cropped in float32, and scaled by
their window on the device. NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xcit_dino.errors import InputError

DTYPES = ("uint8", "uint16", "int16", "float32")
MAX_CHANNELS = 512
SHARES = (0, 0.1, 0.2, 0.5, *range(1, 100), 99.5, 99.8, 99.9, 100)
"""Percentiles that are stored of each channel."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of each of C channels, over the valid pixels of a set (or a fixed sample)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    quantiles: tuple[tuple[float, ...], ...]
    """[C][len(SHARES)]; the first is the minimum, the last the maximum."""
    invalid: tuple[float, ...]
    """Share of the pixels without a value (NaN, infinite, no-data), from 0 to 1."""
    images: int = 0
    """How many were measured."""

    def percentile(self, share: float) -> tuple[float, ...]:
        """Of each channel, interpolated between the stored ones; ``share`` from 0 to 100."""
        return tuple(float(np.interp(share, SHARES, row)) for row in self.quantiles)

    def select(self, channels: tuple[int, ...]) -> Statistics:
        """Of some channels, numbered from 0."""

        def of(rows: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(rows[c] for c in channels)

        return Statistics(
            of(self.mean), of(self.std), of(self.quantiles), of(self.invalid), self.images
        )

    @property
    def minimum(self) -> tuple[float, ...]:
        return tuple(row[0] for row in self.quantiles)

    @property
    def maximum(self) -> tuple[float, ...]:
        return tuple(row[-1] for row in self.quantiles)


@dataclass(frozen=True)
class PixelFormat:
    """What the images of a set are; the default is what sets were before others existed."""

    channels: int = 3
    dtype: str = "uint8"
    """One of DTYPES."""
    page: int | None = None
    """The page of every multi-page file, from 0; None: single images, or stacked as channels."""
    nodata: float | None = None
    """Pixels of this value have none."""
    max_pixels: int | None = None
    """Of the largest image, where it is more than the decoders allow by default."""
    statistics: Statistics | None = None
    """None: 8-bit RGB, whose window is 0 to 255."""

    @property
    def is_rgb8(self) -> bool:
        """Whether images are decoded to 8-bit RGB whatever they are (``data/decode/rgb.py``)."""
        return self.statistics is None

    @property
    def name(self) -> str:
        """Short and exact, as ``--pixels`` takes it: ``rgb8``, ``13xuint16``."""
        return "rgb8" if self.is_rgb8 else f"{self.channels}x{self.dtype}"

    @property
    def numpy(self) -> np.dtype:
        return np.dtype(self.dtype)

    def select(self, bands: tuple[int, ...]) -> PixelFormat:
        """What images are once ``bands`` of their channels are picked (numbered from 1); all where
        there are none.

        Raises:
            InputError: 8-bit RGB images, no such channel, or one twice.
        """
        if not bands:
            return self
        if self.statistics is None:
            raise InputError(
                "--bands: the images are read as 8-bit RGB; pack them with --pixels "
                "CHANNELSxTYPE, such as 4xuint8, to pick channels"
            )
        if not all(1 <= band <= self.channels for band in bands):
            raise InputError(
                f"--bands {' '.join(map(str, bands))}: the images have channels 1 to "
                f"{self.channels}"
            )
        if len(set(bands)) < len(bands):
            raise InputError(f"--bands {' '.join(map(str, bands))}: name each channel once")
        chosen = self.statistics.select(tuple(band - 1 for band in bands))
        return replace(self, channels=len(bands), statistics=chosen)

    def dump(self) -> dict[str, Any] | None:
        """For ``index.json``; None for plain 8-bit RGB."""
        return None if self == RGB8 else asdict(self)

    @staticmethod
    def parse(facts: Mapping[str, Any] | None) -> PixelFormat:
        """The inverse of :meth:`dump`.

        Raises:
            ValueError, KeyError, TypeError: malformed.
        """
        if facts is None:
            return RGB8
        found = dict(facts)
        if (measured := found.pop("statistics")) is None:
            return PixelFormat(**found)
        statistics = Statistics(
            mean=tuple(map(float, measured["mean"])),
            std=tuple(map(float, measured["std"])),
            quantiles=tuple(tuple(map(float, row)) for row in measured["quantiles"]),
            invalid=tuple(map(float, measured["invalid"])),
            images=int(measured["images"]),
        )
        form = PixelFormat(**found, statistics=statistics)
        form.check()
        return form

    def check(self) -> None:
        """Raise ValueError for what no set can be."""
        if self.dtype not in DTYPES or not 1 <= self.channels <= MAX_CHANNELS:
            raise ValueError(f"{self.channels} channels of {self.dtype}")
        if (found := self.statistics) is not None:
            rows = (found.mean, found.std, found.quantiles, found.invalid)
            if any(len(row) != self.channels for row in rows) or any(
                len(row) != len(SHARES) for row in found.quantiles
            ):
                raise ValueError(f"statistics of other channels than {self.channels}")


RGB8 = PixelFormat()


@dataclass(frozen=True)
class Window:
    """Values from ``low`` to ``high`` are scaled to [0, 1], others clipped; one of each a channel,
    or one for all."""

    low: tuple[float, ...] = (0.0,)
    high: tuple[float, ...] = (255.0,)

    def check(self, option: str) -> None:
        """Raise InputError where a low is not below its high."""
        for low, high in zip(self.low, self.high, strict=True):
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise InputError(f"--{option} {low:g} {high:g}: the first must be below the second")


def default_window(form: PixelFormat) -> Window:
    """How a set is scaled where no option says otherwise.

    Unsigned integers: 0 to the largest value that the bits in use can hold (12-bit values in
    16-bit files: 0 to 4095), the same for all channels, which keeps their relations. Where all
    values lie in the upper half, such as inverted ones of 12 bits, as many bits counted from above
    (61440 to 65535). Signed and floating-point values have no natural range: from the 0.1th to the
    99.9th percentile of each channel.
    """
    if form.statistics is None:
        return Window()
    if form.dtype in ("uint8", "uint16"):
        bits = max(8, int(max(form.statistics.maximum)).bit_length())
        top, least = (1 << bits) - 1, int(min(form.statistics.minimum))
        if form.dtype == "uint16" and least > top // 2:
            bits = max(8, (top - least).bit_length())
            return Window((float(top + 1 - (1 << bits)),), (float(top),))
        return Window((0.0,), (float(top),))
    return _apart(form.statistics.percentile(0.1), form.statistics.percentile(99.9))


def parse_window(values: tuple[str, ...], form: PixelFormat, option: str = "window") -> Window:
    """``LOW HIGH`` for all channels, or such a pair for each; a value or a percentile (``p0.1``).

    Raises:
        InputError: neither, or low not below high.
    """
    C = form.channels
    if len(values) not in (2, 2 * C):
        raise InputError(f"--{option}: takes LOW HIGH, or that for each of {C} channels")
    low, high = (
        tuple(
            value
            for c, text in enumerate(values[start::2])
            for value in _bounds(text, form, option, None if len(values) == 2 else c)
        )
        for start in (0, 1)
    )
    width = max(len(low), len(high))
    low, high = (row * (width // len(row)) for row in (low, high))
    window = Window(low, high)
    window.check(option)
    return window


def _bounds(text: str, form: PixelFormat, option: str, channel: int | None) -> tuple[float, ...]:
    """A value, or the percentile of one channel (None: of each)."""
    try:
        if not text.startswith("p"):
            return (float(text),)
        share = float(text[1:])
    except ValueError:
        raise InputError(f"--{option} {text}: a number, or a percentile such as p0.1") from None
    if not 0 <= share <= 100:
        raise InputError(f"--{option} {text}: a percentile lies between p0 and p100")
    if form.statistics is None:
        raise InputError(f"--{option} {text}: 8-bit RGB images have no stored percentiles")
    found = form.statistics.percentile(share)
    return found if channel is None else (found[channel],)


def _apart(low: tuple[float, ...], high: tuple[float, ...]) -> Window:
    """A window whose bounds differ in every channel, even where its values do not."""
    return Window(low, tuple(b if b > a else a + 1.0 for a, b in zip(low, high, strict=True)))


def scaled_statistics(
    form: PixelFormat, window: Window
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel after scaling by ``window``, for normalization.

    From the stored quantiles where the window clips, else exact.
    """
    assert form.statistics is not None
    found = form.statistics
    mean, std = [], []
    for c in range(form.channels):
        low = window.low[c % len(window.low)]
        span = window.high[c % len(window.high)] - low
        if found.minimum[c] >= low and found.maximum[c] <= low + span:
            mean.append((found.mean[c] - low) / span)
            std.append(found.std[c] / span)
        else:
            values = _clipped(found.quantiles[c], low, span)
            mean.append(float(values.mean()))
            std.append(float(values.std()))
    return tuple(mean), tuple(max(value, 1e-3) for value in std)


def _clipped(quantiles: tuple[float, ...], low: float, span: float) -> NDArray[np.float64]:
    """Values at 10,000 evenly spaced quantiles, scaled and clipped."""
    shares = np.linspace(0, 100, 10_001)
    return np.clip((np.interp(shares, SHARES, quantiles) - low) / span, 0, 1)
