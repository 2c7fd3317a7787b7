"""Masks as indexed PNGs with DAVIS's palette, and over their frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xcit_dino.data.pack.targets.conventions import voc_colors
from xcit_dino.eval.video.metrics import contour
from xcit_dino.eval.video.videos import Mask, Video

SHOWN = 5  # frames of a video
OPACITY = 0.55
TRUE_COLOR = (255, 255, 255)  # of a true mask's contour
Pixels = NDArray[np.uint8]

_NUMBERS = np.array(voc_colors(256), np.uint32)
PALETTE = np.stack([_NUMBERS >> 16, _NUMBERS >> 8 & 255, _NUMBERS & 255], -1).astype(np.uint8)
"""uint8 [256, 3]: DAVIS's colors, which are Pascal VOC's."""


def write_mask(path: Path, mask: Mask) -> None:
    """Write object numbers [H, W] as an indexed PNG."""
    image = Image.fromarray(mask)
    image.putpalette(PALETTE.ravel().tolist())
    image.save(path)


def shown_frames(video: Video) -> list[int]:
    """Evenly spaced frames, the first and the last included."""
    return np.unique(np.linspace(0, len(video.frames) - 1, SHOWN).round().astype(int)).tolist()


def overlay(photo: Pixels, mask: Mask, true: Mask | None) -> Pixels:
    """Object numbers [H, W] in colors over a photo [H, W, 3], with white contours of the true
    mask's objects."""
    mixed = OPACITY * PALETTE[mask] + (1 - OPACITY) * photo
    found = np.where(mask[..., None] > 0, np.rint(mixed), photo).astype(np.uint8)
    for number in np.unique(true[true > 0]) if true is not None else ():
        found[contour(true == number)] = TRUE_COLOR
    return found
