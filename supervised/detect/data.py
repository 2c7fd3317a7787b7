"""Images and boxes -> resized, flipped and cropped images for training, whole ones for evaluation.

Either the recipe of XCiT's 3x schedule (a shorter side drawn from several; without the crops of
DETR that half of its images go through before), or large-scale jitter (Ghiasi et al.,
"Simple copy-paste", as in detectron2). All of it is drawn from (seed, epoch, sample).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcit_dino.data.augment import normalize
from xcit_dino.data.packed import to_device
from xcit_dino.data.rng import random_uniforms
from xcit_dino.data.targets.formats import Boxes, Mask
from xcit_dino.data.targets.loader import Key, Pixels
from xcit_dino.data.targets.transforms import nearest, resized
from xcit_dino.supervised.detect.config import DetectionConfig
from xcit_dino.supervised.detect.masks import decoded, run_lengths

DETECT_STREAM = 43


class Sample(NamedTuple):
    """A training image and its objects."""

    image: Pixels
    """[H, W, C]."""
    boxes: NDArray[np.float32]
    """[n, 4]: x0, y0, x1, y1 in pixels of this image."""
    labels: NDArray[np.int64]
    """[n]: from 0 on."""
    masks: NDArray[np.uint8] | None = None
    """[n, H, W] of 0 and 1, with ``--masks``."""


class View(NamedTuple):
    """An image for evaluation."""

    image: Pixels
    """[H, W, C]."""
    size: tuple[int, int]
    """Height and width of the stored image."""
    target: Boxes
    """In pixels of the stored image; with ``--masks`` its ``segmentation`` are run lengths."""


@dataclass(frozen=True)
class TrainTransform:
    """(image, boxes, key) -> :class:`Sample`; see the module's docstring. Crowds and difficult
    objects are no examples to learn from, as in mmdetection."""

    config: DetectionConfig

    def __call__(self, pixels: Pixels, target: Mask | Boxes, key: Key) -> Sample:
        assert isinstance(target, Boxes)
        options, crop = self.config, self.config.crop_size
        u = random_uniforms(*key, DETECT_STREAM, np.arange(4))
        height, width = self._size(pixels.shape[:2], u[0])
        image = resized(pixels, height, width)
        counts = np.flatnonzero(~(target.crowd | target.difficult))
        boxes = scaled(target.boxes[counts], pixels.shape[:2], (height, width))
        top = left = 0
        if crop:
            free = max(height - crop, 0), max(width - crop, 0)
            top, left = (int(share * (rest + 1)) for share, rest in zip(u[1:3], free, strict=True))
            image = image[top : top + crop, left : left + crop]
            boxes = boxes - np.array([left, top, left, top], np.float32)
            boxes, kept = clipped(boxes, image.shape[:2])
            counts = counts[kept]
        masks = None
        if options.masks:
            shapes = run_lengths(target, *pixels.shape[:2])
            masks = decoded([shapes[number] for number in counts], *pixels.shape[:2])
            masks = nearest(masks, height, width, top, left, crop or None)
        if u[3] < options.hflip:
            image = image[:, ::-1]
            masks = None if masks is None else masks[:, :, ::-1]
            boxes = np.stack(
                [image.shape[1] - boxes[:, 2], boxes[:, 1], image.shape[1] - boxes[:, 0],
                 boxes[:, 3]], 1
            )  # fmt: skip
        masks = None if masks is None else masks.copy()  # not mirrored
        return Sample(image.copy(), boxes, target.labels[counts], masks)

    def _size(self, sides: Sequence[int], u: float) -> tuple[int, int]:
        options = self.config
        if not options.crop_size:
            short = options.short_sides[int(u * len(options.short_sides))]
            return fitted(sides, short, options.long_side)
        low, high = options.scale
        limit = options.crop_size * (low + u * (high - low))
        return fitted(sides, limit, limit)


@dataclass(frozen=True)
class EvalTransform:
    """(image, boxes, key) -> :class:`View`."""

    config: DetectionConfig

    def __call__(self, pixels: Pixels, target: Mask | Boxes, key: Key) -> View:
        assert isinstance(target, Boxes)
        height, width = pixels.shape[:2]
        sides = fitted((height, width), self.config.eval_side, self.config.long_side)
        if self.config.masks:
            target = replace(target, segmentation=run_lengths(target, height, width))
        return View(resized(pixels, *sides).copy(), (height, width), target)


def fitted(sides: Sequence[int], short: float, long: float) -> tuple[int, int]:
    """The size (height, width) of an image whose shorter side becomes ``short``, or less where
    the longer one would exceed ``long``."""
    factor = min(short / min(sides), long / max(sides))
    height, width = (max(1, round(side * factor)) for side in sides)
    return height, width


def scaled(
    boxes: NDArray[np.float32], before: Sequence[int], after: Sequence[int]
) -> NDArray[np.float32]:
    """Boxes of an image of size ``before`` (height, width) in one of size ``after``."""
    y, x = (new / old for new, old in zip(after, before, strict=True))
    return (boxes * np.array([x, y, x, y])).astype(np.float32)


def clipped(
    boxes: NDArray[np.float32], sides: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The parts of boxes that lie in an image of these sides, and which of them have one."""
    height, width = sides
    inside = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    kept = np.all(inside[:, 2:] > inside[:, :2], axis=1)
    return inside[kept], kept


def to_network(image: Pixels, config: DetectionConfig, device: torch.device) -> Tensor:
    """[H, W, C] in the set's own units -> float32 [C, H, W], normalized."""
    pixels = to_device(torch.from_numpy(image), device).permute(2, 0, 1)[None]
    return normalize(pixels, *config.normalization, *config.window_bounds)[0]


def to_targets(sample: Sample, device: torch.device) -> dict[str, Tensor]:
    """Boxes, labels and masks as torchvision takes them: class 0 is the background."""
    arrays = {"boxes": sample.boxes, "labels": sample.labels + 1, "masks": sample.masks}
    return {n: to_device(torch.from_numpy(x), device) for n, x in arrays.items() if x is not None}
