"""Images and masks -> crops for training, whole images for evaluation.

mmsegmentation's pipeline (``configs/_base_/datasets/ade20k.py`` of XCiT): resized to a random size,
a random crop in which no class covers too much, flip, color jitter; both images and masks, with the
same numbers. All of them are drawn from (seed, epoch, sample).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcit_dino.data.packed import to_device
from xcit_dino.data.rng import random_uniforms
from xcit_dino.data.targets.formats import Boxes, Mask, ignored_value
from xcit_dino.data.targets.loader import Key, Pixels
from xcit_dino.data.targets.transforms import nearest, resized
from xcit_dino.inputs import Channels
from xcit_dino.supervised.segment.config import SegmentationConfig

IGNORED = 65_535  # in training masks, whatever the type that is stored
TRIES = 10  # crops that are drawn (mmsegmentation: cat_max_ratio)
SEGMENT_STREAM = 41
GRAY = np.array([0.299, 0.587, 0.114], np.float32)


class Crop(NamedTuple):
    """A training sample."""

    image: Pixels
    """[S, S, C]."""
    mask: NDArray[np.uint16]
    """[S, S]: class numbers, IGNORED where pixels do not count."""


class Scene(NamedTuple):
    """An image for evaluation."""

    image: Pixels
    """[H, W, C], the shorter side as in training."""
    mask: NDArray[np.uint16]
    """[H', W'], of the original size."""


@dataclass(frozen=True)
class TrainTransform:
    """(image, mask, key) -> :class:`Crop`; see the module's docstring."""

    config: SegmentationConfig

    def __call__(self, pixels: Pixels, mask: Mask | Boxes, key: Key) -> Crop:
        assert not isinstance(mask, Boxes)
        options, size = self.config, self.config.crop_size
        u = random_uniforms(*key, SEGMENT_STREAM, np.arange(8 + 2 * TRIES))
        low, high = options.scale
        height, width = self._size(pixels.shape[:2], low + u[0] * (high - low))
        full = as_uint16(mask)
        free = max(height - size, 0), max(width - size, 0)
        places = (u[8:].reshape(TRIES, 2) * np.add(free, 1)).astype(int).tolist()
        crops = (nearest(full, height, width, top, left, size) for top, left in places)
        mixed = (n for n, crop in enumerate(crops) if _largest_share(crop) < options.cat_max_ratio)
        top, left = places[next(mixed, -1)]
        crop = nearest(full, height, width, top, left, size)
        image = resized(pixels, height, width)[top : top + size, left : left + size]
        image = jittered(image, options.color_jitter, u[1:7], *options.window_bounds)
        if u[7] < options.hflip:
            image, crop = image[:, ::-1], crop[:, ::-1]
        return Crop(
            _padded(image, size, mean_values(options, image.dtype)),
            _padded(crop, size, np.uint16(IGNORED)),
        )

    def _size(self, sides: Sequence[int], factor: float) -> tuple[int, int]:
        wanted = self.config.short_side * factor / min(sides)
        height, width = (max(1, round(side * wanted)) for side in sides)
        return height, width


@dataclass(frozen=True)
class SceneTransform:
    """(image, mask, key) -> :class:`Scene`."""

    config: SegmentationConfig

    def __call__(self, pixels: Pixels, mask: Mask | Boxes, key: Key) -> Scene:
        assert not isinstance(mask, Boxes)
        factor = self.config.short_side / min(pixels.shape[:2])
        height, width = (max(1, round(side * factor)) for side in pixels.shape[:2])
        return Scene(resized(pixels, height, width).copy(), as_uint16(mask))


def as_uint16(mask: Mask) -> NDArray[np.uint16]:
    """The mask with IGNORED for pixels that do not count."""
    wide = mask.astype(np.uint16)
    wide[mask == ignored_value(mask)] = IGNORED
    return wide


def _largest_share(mask: NDArray[np.uint16]) -> float:
    """Of the pixels that count; 0 if none does, or one class alone occurs (mmsegmentation)."""
    counts = np.bincount(mask[mask != IGNORED].ravel())
    present = counts[counts > 0]
    return float(present.max() / present.sum()) if len(present) > 1 else 1.0


def jittered(
    image: Pixels,
    strengths: tuple[float, float, float],
    u: NDArray[np.float64],
    low: Channels,
    high: Channels,
) -> Pixels:
    """Brightness, contrast, saturation, each with probability 1/2, of values that the window from
    low to high scales to [0, 1]. u: six numbers in [0, 1)."""
    on = u[:3] < 0.5
    brightness, contrast, saturation = strengths
    if not any(strengths) or not on.any():
        return image
    begin, span = np.array(low, np.float32), np.subtract(high, low, dtype=np.float32)
    x = (image.astype(np.float32) - begin) / span
    if on[0]:
        x += brightness * (2 * u[3] - 1)
    if on[1]:
        x *= 1 + contrast * (2 * u[4] - 1)
    if on[2]:
        gray = (x @ GRAY if x.shape[2] == 3 else x.mean(2))[..., None]
        x = gray + (x - gray) * (1 + saturation * (2 * u[5] - 1))
    return as_type(x.clip(0, 1) * span + begin, image.dtype)


def mean_values(options: SegmentationConfig, dtype: np.dtype[Any]) -> NDArray[Any]:
    """[C]: what normalization turns into 0."""
    low, high = map(np.array, options.window_bounds)
    return as_type(low + (high - low) * np.array(options.normalization[0]), dtype)


def as_type(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Converted, and rounded where the type holds integers; values are within its range."""
    return (values if dtype.kind == "f" else np.rint(values)).astype(dtype)


def _padded(array: NDArray[Any], size: int, value: Any) -> NDArray[Any]:
    """Filled up at the right and below to a square."""
    full = np.empty((size, size, *array.shape[2:]), array.dtype)
    full[:] = value
    full[: array.shape[0], : array.shape[1]] = array
    return full


def collated(crops: Sequence[Crop], device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (B, C, S, S) in their own type and masks int64 (B, S, S), IGNORED where pixels do not
    count, on the device."""
    images = torch.from_numpy(np.stack([crop.image for crop in crops])).permute(0, 3, 1, 2)
    masks = torch.from_numpy(np.stack([crop.mask for crop in crops]).astype(np.int32))
    return to_device(images, device), to_device(masks, device).long()
