"""How the values of a set become a network's input: window, mean and std, resolved once for a run.

Each is, in this order: as given; that of the run being resumed, or of the weights to start from;
that of the data (``data/pixels.py``); of 8-bit RGB 0 to 255, and ImageNet's mean and std. Weights
of another number of channels say nothing about these images, the window 0 to 255 nothing about
data that are not 8-bit, and a wider one nothing about those that are: then mean and std are the
weights', the window the data's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from xcit_dino.data.pixels import (
    SHARES,
    PixelFormat,
    Window,
    default_window,
    parse_window,
    scaled_statistics,
)
from xcit_dino.data.shards.index import ShardIndex, resolve_split
from xcit_dino.errors import InputError
from xcit_dino.inputs import BYTES, IMAGENET_MEAN, IMAGENET_STD, Channels, InputSettings

MUCH_CLIPPED = 50  # percent of a channel's values: more are said
LITTLE_FILLED = 0.01  # of a window: less is said


class Given(Protocol):
    """The options on scaling of any command."""

    @property
    def window(self) -> tuple[float | str, ...] | None: ...
    @property
    def mean(self) -> Channels | None: ...
    @property
    def std(self) -> Channels | None: ...


@dataclass(frozen=True)
class Scaling:
    """Resolved window, mean and std, and what is to be said of them."""

    window: Window
    mean: Channels
    std: Channels
    form: PixelFormat
    lines: list[str] = field(default_factory=list)

    @property
    def options(self) -> dict[str, Any]:
        """As ``config.yaml`` stores them; the window of 8-bit RGB is not stored."""
        usual = self.form.is_rgb8 and (self.window.low, self.window.high) == BYTES
        pairs = zip(self.window.low, self.window.high, strict=True)
        window = None if usual else tuple(value for pair in pairs for value in pair)
        return {"window": window, "mean": self.mean, "std": self.std}

    @property
    def settings(self) -> dict[str, Any]:
        """As fields of :class:`InputSettings`."""
        return {
            "channels": self.form.channels,
            "low": self.window.low,
            "high": self.window.high,
            "mean": self.mean,
            "std": self.std,
        }


def resolve_scaling(
    given: Given, form: PixelFormat, known: InputSettings | None, *, same_data: bool = False
) -> Scaling:
    """Window, mean and std of a run.

    Args:
        given: the options.
        form: of the images, once ``--bands`` are picked.
        known: settings of the run being resumed, or of the weights.
        same_data: whether ``known`` was made for these data.

    Raises:
        InputError: another number of values than the images have channels; a window that cannot be.
    """
    for name in ("mean", "std"):
        check_length(name, getattr(given, name), form)
    lines = []
    if known is not None and known.channels != form.channels:
        known = None
    window, why = _window(given, form, known, same_data)
    mean, std = (None, None) if known is None else (known.mean, known.std)
    if mean is None or std is None:
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if form.is_rgb8 else _rounded(form, window)
    elif not form.is_rgb8 and not same_data:
        why += "; mean and std are those of the weights"
    if not form.is_rgb8 or why or given.window:
        lines.append(f"images are {form.name}: {bounds_text(window)} scaled to [0, 1]{why}")
    if form.statistics is not None:
        lines += check_fit(window, form, "--window" if given.window else "the window",
                           refuse=bool(given.window) and not same_data)  # fmt: skip
    return Scaling(window, given.mean or mean, given.std or std, form, lines)


def _window(
    given: Given, form: PixelFormat, known: InputSettings | None, same_data: bool
) -> tuple[Window, str]:
    """The window, and why it is not the data's own."""
    if given.window:
        return parse_window(tuple(map(_word, given.window)), form), ""
    if known is not None:
        bytes_only = max(known.high) <= BYTES[1][0]
        fits = bytes_only if form.dtype == "uint8" else known.window != BYTES
        if same_data or fits:
            usual = same_data or known.window == BYTES
            return Window(*known.window), "" if usual else ", as the weights were trained"
        own = _tidy(default_window(form))
        return own, f" (the weights: {bounds_text(Window(*known.window))})"
    return _tidy(default_window(form)), _bits_used(form)


def check_fit(window: Window, form: PixelFormat, what: str, *, refuse: bool) -> list[str]:
    """Lines on channels most of whose values the window clips, or which fill a small part of it.

    Args:
        window: of ``form``, in the data's own units.
        form: with statistics.
        what: the window's name in messages.
        refuse: whether a channel may not lose all of its values. Of a run being resumed, and by the
            window of its weights, it may: such runs go on, and such evaluations are wanted.

    Raises:
        InputError: all values of a channel are clipped to the same end.
    """
    found = form.statistics
    assert found is not None
    lines = []
    for c in range(form.channels):
        low, high = (row[c % len(row)] for row in (window.low, window.high))
        least, most = found.minimum[c], found.maximum[c]
        if least == most:
            continue
        here = f"channel {c + 1} ({least:g} to {most:g})"
        if refuse and (most <= low or least >= high):
            raise InputError(
                f"{what} {low:g} {high:g}: holds none of the values of {here}; take --window p0.1 "
                "p99.9, or other bounds"
            )
        shares = np.interp((low, high), found.quantiles[c], SHARES, left=0, right=100)
        clipped = 100 - float(shares[1] - shares[0])
        if clipped > MUCH_CLIPPED:
            lines.append(f"{what} {low:g} {high:g}: clips {clipped:.0f} % of the values of {here}")
        elif most - least < LITTLE_FILLED * (high - low):
            lines.append(f"{what} {low:g} {high:g}: the values of {here} fill 1 % of it or less")
    if len(lines) > 3:
        lines = [*lines[:3], f"{what}: the same for {len(lines) - 3} more channels"]
    return [f"WARNING: {line}" for line in lines]


def _bits_used(form: PixelFormat) -> str:
    """`` (12 of 16 bits are used)``, where not all are."""
    if form.dtype != "uint16":
        return ""
    window = default_window(form)
    bits = int(window.high[0] - window.low[0]).bit_length()
    return f" ({bits} of 16 bits are used)" if bits < 16 else ""


def bounds_text(window: Window) -> str:
    """``values 0 to 4095 are``, or of several channels the first few."""
    pairs = [f"{a:g} to {b:g}" for a, b in zip(window.low, window.high, strict=True)]
    if len(pairs) == 1:
        return f"values {pairs[0]} are"
    more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
    return f"values {', '.join(pairs[:3])}{more} of the channels are"


def check_length(name: str, values: Channels | None, form: PixelFormat) -> None:
    """Raise InputError for other numbers of values than the images have channels."""
    if values is not None and len(values) != form.channels:
        raise InputError(
            f"--{name}: {len(values)} values, and the images have {form.channels} "
            f"channel{'s' * (form.channels != 1)} ({form.name}); give one of each"
        )


def form_of(data_path: str | Path | None, bands: tuple[int, ...] = ()) -> PixelFormat | None:
    """What the images of a data set are, by its training split, else by its validation split; None
    where there is neither (any more).

    Raises:
        InputError: no such ``--bands``.
    """
    for split in ("train", "val") if data_path else ():
        try:
            index = ShardIndex.load(resolve_split(str(data_path), split))
        except InputError:
            continue
        return index.pixels.select(bands)
    return None


def check_same_form(*indexes: ShardIndex) -> None:
    """Raise InputError where two splits hold different kinds of images."""
    kinds = [index.pixels.name for index in indexes]
    if len(set(kinds)) > 1:
        places = ", ".join(f"{i.root}: {kind}" for i, kind in zip(indexes, kinds, strict=True))
        raise InputError(
            f"--data_path: the splits hold different kinds of images ({places}); pack both with "
            f"--pixels {kinds[0]}"
        )


def _rounded(form: PixelFormat, window: Window) -> tuple[Channels, Channels]:
    mean, std = scaled_statistics(form, window)
    return tuple(round(m, 5) for m in mean), tuple(round(s, 5) for s in std)


def _tidy(window: Window) -> Window:
    """Bounds of seven digits, where these stay apart."""
    short = Window(*(tuple(float(f"{v:.7g}") for v in row) for row in (window.low, window.high)))
    apart = all(a < b for a, b in zip(short.low, short.high, strict=True))
    return short if apart else window


def _word(value: float | str) -> str:
    return value if isinstance(value, str) else repr(value)
