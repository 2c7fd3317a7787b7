"""Colors for dense predictions: masks and boxes over photos."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.utils import draw_bounding_boxes

from xcit_dino.data.pack.targets.conventions import voc_colors
from xcit_dino.data.rng import random_bits

Pixels = NDArray[np.uint8]
OPACITY = 0.6  # of a mask over its photo


def class_colors(count: int) -> Pixels:
    """Pascal VOC's colors of ``count`` classes, [count, 3]; from the 256th on any others."""
    colors = voc_colors(min(count, 256))
    colors += (random_bits(7, np.arange(256, max(count, 256))) % np.uint64(1 << 24)).tolist()
    table = np.array(colors[:count], np.uint32)
    return np.stack([table >> 16, table >> 8 & 255, table & 255], -1).astype(np.uint8)


def painted(photo: Pixels, mask: NDArray[np.integer], colors: Pixels) -> Pixels:
    """A mask [H, W] in colors over its photo [H, W, 3]; where it has a class beyond the colors the
    photo remains."""
    known = mask < len(colors)
    paint = colors[np.where(known, mask, 0)].astype(np.float32)
    mixed = OPACITY * paint + (1 - OPACITY) * photo
    return np.where(known[..., None], np.rint(mixed), photo).astype(np.uint8)


def boxed(
    photo: Pixels, boxes: NDArray[np.floating], labels: NDArray[np.integer], colors: Pixels
) -> Pixels:
    """A photo [H, W, 3] with boxes [n, 4] (x0, y0, x1, y1) in the colors of their classes."""
    if not len(boxes):
        return photo
    image = torch.from_numpy(photo.copy()).permute(2, 0, 1)
    paint: Any = [tuple(color) for color in colors[labels].tolist()]
    drawn = draw_bounding_boxes(image, torch.from_numpy(boxes.copy()), colors=paint, width=2)
    return drawn.permute(1, 2, 0).numpy()
