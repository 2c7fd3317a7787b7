"""Resizing of images and masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xcit_dino.data.crops import resize_into
from xcit_dino.data.native.crops import resize_values
from xcit_dino.data.targets.loader import Pixels


def resized(pixels: Pixels, height: int, width: int) -> Pixels:
    """[H, W, C] -> [height, width, C], antialiased bicubic, in the images' own type."""
    if pixels.shape[:2] == (height, width):
        return pixels
    source = np.require(pixels, requirements=("C", "W"))
    image = torch.from_numpy(source).permute(2, 0, 1)[None]
    shape = (1, height, width, pixels.shape[2])
    out = torch.empty(shape, dtype=image.dtype).permute(0, 3, 1, 2)
    if image.dtype == torch.uint8:
        resize_into(image, out)
    else:
        resize_values(image.float(), out)
    return out[0].permute(1, 2, 0).numpy()


def nearest(
    mask: NDArray[Any], height: int, width: int, top: int, left: int, size: int | None = None
) -> NDArray[Any]:
    """A crop of masks [..., H, W] resized to (height, width), by nearest neighbors: a square of
    ``size``, or smaller where the resized mask ends."""
    rows = np.arange(top, min(top + size, height) if size else height) + 0.5
    columns = np.arange(left, min(left + size, width) if size else width) + 0.5
    y = (rows * mask.shape[-2] / height).astype(np.int64)
    x = (columns * mask.shape[-1] / width).astype(np.int64)
    return mask[..., y[:, None], x]
