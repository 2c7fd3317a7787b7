"""A network's input settings: image size, center crop, interpolation, window, mean and std of the
channels.

A network expects images prepared as in its training, so its weights carry these settings: our
checkpoints in the options of their run; extracted, converted and exported files as
``input_settings``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from xcit_dino.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BYTES = ((0.0,), (255.0,))  # lows and highs of the window of 8-bit images
PROTOCOL_CROP, PROTOCOL_RESIZE = 224, 256  # DINO eval_knn.py, eval_linear.py
WHOLE = 64  # images up to this side are not cropped, unless the network has a crop ratio
KEY = "input_settings"  # key in a file's metadata
Channels = tuple[float, ...]


def check_window(values: tuple[float | str, ...] | None) -> None:
    """Raise InputError unless ``--window`` holds pairs of finite numbers or percentiles (p0.1)."""
    if values is None:
        return
    if not values or len(values) % 2:
        raise InputError("--window: takes LOW HIGH, or such a pair for each channel")
    for value in values:
        if isinstance(value, float | int) and not -1e9 <= value <= 1e9:
            raise InputError(f"--window {value:g}: values lie between -1e9 and 1e9")


def window_bounds(window: Sequence[float | str] | None) -> tuple[Channels, Channels]:
    """Lows and highs of a resolved ``--window`` (LOW HIGH, or a pair a channel); BYTES for None."""
    if not window:
        return BYTES
    values = tuple(map(float, window))
    return values[0::2], values[1::2]


class Scaled:
    """What follows from the options ``window``, ``mean`` and ``std`` of a training."""

    window: tuple[float | str, ...] | None
    mean: Channels | None
    std: Channels | None

    @property
    def normalization(self) -> tuple[Channels, Channels]:
        """Mean and std of the channels; ImageNet's if none are given."""
        return self.mean or IMAGENET_MEAN, self.std or IMAGENET_STD

    @property
    def window_bounds(self) -> tuple[Channels, Channels]:
        """Lows and highs of the window once it is resolved; those of 8-bit images without one."""
        return window_bounds(self.window)

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        return len(self.normalization[0])


@dataclass(frozen=True)
class InputSettings:
    """Preprocessing expected by a network; the defaults are those of the published XCiTs."""

    size: int | None = None
    """Side of the square input in pixels; None: unknown."""
    crop_ratio: float | None = None
    """Side of the center crop relative to the resized image's shorter side; None: unknown."""
    interpolation: str = "bicubic"
    """How images are resized: bicubic or bilinear, both antialiased."""
    mean: Channels = IMAGENET_MEAN
    """Subtracted from the channels (values in [0, 1])."""
    std: Channels = IMAGENET_STD
    """Divisor of the channels."""
    channels: int = 3
    low: Channels = BYTES[0]
    """Values from low to high are scaled to [0, 1]; one for all channels, or one of each."""
    high: Channels = BYTES[1]
    bands: tuple[int, ...] = ()
    """Channels that are read of the images, numbered from 1; all of them where there are none."""

    @property
    def window(self) -> tuple[Channels, Channels]:
        """Lows and highs."""
        return self.low, self.high

    @property
    def crop(self) -> int:
        """Side of the center crop in pixels; 224 where the network's own size is not known."""
        return self.size or PROTOCOL_CROP

    @property
    def resize(self) -> int:
        """Shorter side after resizing, before the center crop.

        By the network's own crop ratio, rounded down as in timm; else by the protocol's 256 / 224.
        In the latter case images up to 64 px are kept whole: cropping an eighth, harmless in a
        photo, would cut into the object of a small image.
        """
        if self.crop_ratio is not None:
            return math.floor(self.crop / self.crop_ratio + 1e-9)
        whole = self.crop <= WHOLE
        return self.crop if whole else round(self.crop * PROTOCOL_RESIZE / PROTOCOL_CROP)

    @staticmethod
    def from_run(options: Mapping[str, Any]) -> InputSettings | None:
        """Settings of the network trained with these options; None if they are not the options of
        a training."""
        sides = map(options.get, ("input_size", "global_crops_size", "crop_size", "eval_side"))
        if (size := next(filter(None, sides), None)) is None:
            return None
        mean = tuple(options.get("mean") or IMAGENET_MEAN)
        low, high = window_bounds(options.get("window"))
        return InputSettings(
            size=int(size),
            crop_ratio=options.get("eval_crop_ratio"),
            mean=mean,
            std=tuple(options.get("std") or IMAGENET_STD),
            channels=len(mean),
            low=low,
            high=high,
            bands=tuple(options.get("bands") or ()),
        )

    def other_bands(self, ours: InputSettings) -> str | None:
        """A line on bands, where a network with these settings was trained on others than those of
        ``ours``; None where they are the same, or unknown (as for published weights)."""
        if not self.bands or self.bands == ours.bands or self.channels != ours.channels:
            return None
        theirs = " ".join(map(str, self.bands))
        given = f"--bands {' '.join(map(str, ours.bands))}" if ours.bands else "all bands"
        return f"was trained with --bands {theirs} of its images, and is given {given} of these"

    def dump(self) -> str:
        """Serialize as JSON, for the metadata of a file."""
        return json.dumps(asdict(self))

    @staticmethod
    def parse(text: str) -> InputSettings:
        """The inverse of :meth:`dump`.

        Raises:
            ValueError: malformed, or values out of range.
        """
        facts = json.loads(text)
        if not isinstance(facts, dict):
            raise ValueError("no table of settings")
        known = {name: facts[name] for name in InputSettings.__dataclass_fields__ if name in facts}
        for name in ("mean", "std", "low", "high"):
            if name in known:
                known[name] = tuple(float(value) for value in known[name])
        known["bands"] = tuple(int(band) for band in known.get("bands", ()))
        settings = InputSettings(**known)
        settings.check()
        return settings

    def check(self) -> None:
        """Raise ValueError for values out of range."""
        size, ratio = self.size, self.crop_ratio
        if not (size is None or 1 <= int(size) <= 8192) or not (ratio is None or 0 < ratio <= 1):
            raise ValueError(f"size {size}, crop_ratio {ratio}")
        if not all(abs(value) <= 1e3 for value in self.mean) or not all(
            1e-6 <= value <= 1e3 for value in self.std
        ):
            raise ValueError(f"mean {self.mean}, std {self.std}")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation {self.interpolation}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"{self.channels} channels, mean {self.mean}, std {self.std}")
        if not len(self.low) == len(self.high) or len(self.low) not in (1, self.channels):
            raise ValueError(f"{self.channels} channels, window {self.window}")
        if self.bands and (len(self.bands) != self.channels or min(self.bands) < 1):
            raise ValueError(f"{self.channels} channels, bands {self.bands}")
        if not all(low < high for low, high in zip(self.low, self.high, strict=True)):
            raise ValueError(f"window {self.window}")
