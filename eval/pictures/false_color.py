"""Pictures of images that are not 8-bit RGB: scaled by their window, in false color.

One channel is gray, two are red and green, three red, green and blue. Of more, ``--show_channels``
names three; else a set's first three principal components are shown, found in a fixed sample of its
training images, so that a color means the same in all its pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from xcit_dino.data.augment import scaled
from xcit_dino.data.shards.index import ShardIndex, resolve_split
from xcit_dino.errors import InputError
from xcit_dino.eval.context import Context
from xcit_dino.inputs import BYTES

SAMPLE_IMAGES, SAMPLE_PIXELS = 32, 1024  # of the principal components: images, pixels of each
STRETCH = (1, 99)  # percentiles of a component that become black and full

Pixels = NDArray[np.uint8]
Values = NDArray[np.generic]


@dataclass(frozen=True)
class FalseColor:
    """An affine map of C channels to red, green and blue."""

    weights: NDArray[np.float32]
    """[C, 3]."""
    offset: NDArray[np.float32]
    """[3]."""

    def __call__(self, unit: NDArray[np.float32]) -> Pixels:
        """[..., C] of values in [0, 1] -> uint8 [..., 3]."""
        colors = np.clip(unit @ self.weights + self.offset, 0, 1)
        return np.rint(255 * colors).astype(np.uint8)


def of_channels(channels: int, shown: tuple[int, ...]) -> FalseColor | None:
    """Channels as colors: those of ``shown``, numbered from 1, or all where they are at most 3;
    None where there are more and none are named."""
    if not shown and channels > 3:
        return None
    named = shown or (1,) * 3 if channels == 1 else shown or (1, 2, 3)[:channels]
    weights = np.zeros((channels, 3), np.float32)
    for color, channel in enumerate(named):
        weights[channel - 1, color] = 1
    return FalseColor(weights, np.zeros(3, np.float32))


def of_components(unit: NDArray[np.float32]) -> FalseColor:
    """The first three principal components of pixels [n, C] with values in [0, 1]; each is brighter
    where most channels are."""
    mean = unit.mean(0)
    axes = principal_axes(unit, 3)
    low, high = np.percentile((unit - mean) @ axes, STRETCH, axis=0)
    weights = axes / np.maximum(high - low, 1e-6)
    offset = -(mean @ weights) - low / np.maximum(high - low, 1e-6)
    return FalseColor(weights.astype(np.float32), offset.astype(np.float32))


def principal_axes(rows: NDArray[np.float32], count: int) -> NDArray[np.float64]:
    """[C, count]: unit vectors of the largest variance of rows [n, C], n >= 2, the largest first;
    none has a negative sum."""
    covariance = np.atleast_2d(np.cov(rows - rows.mean(0), rowvar=False))
    axes = np.linalg.eigh(covariance)[1][:, ::-1][:, :count]
    return axes * np.where(axes.sum(0) < 0, -1, 1)


def check_shown(shown: tuple[int, ...], context: Context) -> None:
    """Raise InputError where ``--show_channels`` cannot be."""
    channels = context.inputs.channels
    if not shown:
        return
    words = " ".join(map(str, shown))
    if is_plain(context):
        raise InputError(
            f"--show_channels {words}: 8-bit RGB images are shown as they are; leave it out"
        )
    if len(shown) != 3 or not all(1 <= channel <= channels for channel in shown):
        raise InputError(
            f"--show_channels {words}: name three of the channels 1 to {channels}, for red, green "
            "and blue"
        )


def is_plain(context: Context) -> bool:
    """Whether images are shown as they are."""
    inputs = context.inputs
    return context.form.is_rgb8 and inputs.channels == 3 and inputs.window == BYTES


def unit_values(values: Values, context: Context) -> NDArray[np.float32]:
    """[..., H, W, C] in the set's own units -> float32 in [0, 1], by the window."""
    tensor = torch.from_numpy(np.array(values)).movedim(-1, -3)  # decoders' may be read-only
    flat = tensor.reshape(-1, *tensor.shape[-3:])
    return scaled(flat, *context.inputs.window).view(tensor.shape).movedim(-3, -1).numpy()


def picture(values: Values, context: Context) -> Pixels:
    """One image [H, W, C] in the set's own units as uint8 [H, W, 3]."""
    if is_plain(context):
        return np.asarray(values, np.uint8)
    return colors_of(context)(unit_values(values, context))


def colors_of(context: Context) -> FalseColor:
    """The colors of a context's images."""
    plain = of_channels(context.inputs.channels, context.show_channels)
    return plain or context.colors or _components_of_set(replace(context, notes=()))


@lru_cache(maxsize=8)
def _components_of_set(context: Context) -> FalseColor:
    """From evenly spaced training images; from validation images where there are no others."""
    try:
        index = ShardIndex.load(resolve_split(context.data_path, "train"))
    except InputError:
        index = ShardIndex.load(resolve_split(context.data_path, "val"))
    few = replace(context, loader=replace(context.loader, num_workers=0, max_bad_fraction=1.0))
    samples = np.unique(np.linspace(0, index.num_samples - 1, SAMPLE_IMAGES).astype(np.int64))
    pixels = [
        some_pixels(images.permute(0, 2, 3, 1).numpy(), context)
        for images, _, _ in few.images(index, samples, batch_size=SAMPLE_IMAGES, labeled=False)
    ]
    return of_components(np.concatenate(pixels))


def some_pixels(images: Values, context: Context) -> NDArray[np.float32]:
    """At most SAMPLE_PIXELS evenly spaced pixels of each image [n, H, W, C], scaled: [m, C]."""
    unit = unit_values(images, context).reshape(len(images), -1, context.inputs.channels)
    chosen = np.linspace(0, unit.shape[1] - 1, min(SAMPLE_PIXELS, unit.shape[1])).astype(np.int64)
    return unit[:, chosen].reshape(-1, unit.shape[-1])
