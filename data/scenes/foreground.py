"""Which pixels of a scene are foreground: neither no-data nor background.

Slides: the background, glass, is nearly free of color. A pixel is foreground where its saturation
(of HSV) is above the threshold that separates the scene's saturations best (Otsu, IEEE Trans. SMC
1979), the usual method for whole slides (CLAM, arXiv 2004.09666, ``segmentTissue``), and at least
CLAM's fixed one. Other scenes: only pixels without a value are no foreground.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xcit_dino.data.decode.native import Values, invalid
from xcit_dino.data.scenes.reader import Scene

LEAST_SATURATION = 8  # CLAM's threshold where Otsu's is not used, of 255
WHITE, WHITE_SHARE = 200, 0.25  # a slide has so bright pixels, and at least so many of them
PLACES, SIDE = 16, 64  # sampled windows a side, and their sides in pixels

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Background:
    """How the foreground of a scene is found."""

    nodata: float | None
    has_alpha: bool
    saturation: int | None = None
    """Of a slide: pixels up to this one (0 to 255) are background."""

    def foreground(self, values: Values) -> Mask:
        """Of a window [H, W, C], transparency included: bool [H, W]."""
        colors, mask = values, np.ones(values.shape[:2], bool)
        if self.has_alpha:
            colors = values[..., :-1]
            mask &= values[..., -1] > 0
        if (holes := invalid(colors, self.nodata)) is not None:
            mask &= ~holes.all(-1)
        if self.nodata is None and values.dtype.kind == "u":
            mask &= colors.any(-1)
        if self.saturation is not None:
            mask &= saturation(colors) > self.saturation
        return mask


def find_background(scene: Scene, how: str, nodata: float | None) -> Background:
    """The rule for a scene by ``--background``.

    Raises:
        BadImage: the scene cannot be read.
    """
    value = scene.nodata if nodata is None else nodata
    plain = Background(value, scene.has_alpha)
    is_color = scene.dtype == "uint8" and scene.channels - scene.has_alpha == 3
    if how == "nodata" or not is_color:
        return plain
    pixels = sample(scene)
    pixels = pixels[plain.foreground(pixels[None])[0]][:, :3]
    if how == "auto" and not scene.is_slide:
        white = (pixels.min(-1) >= WHITE).mean() if len(pixels) else 0
        if white < WHITE_SHARE:
            return plain
    threshold = otsu(np.bincount(saturation(pixels), minlength=256))
    return Background(value, scene.has_alpha, max(threshold, LEAST_SATURATION))


def sample(scene: Scene) -> Values:
    """Pixels [n, C] of evenly spaced windows."""
    side = min(SIDE, scene.height, scene.width)
    found = []
    for y in _evenly(scene.height - side):
        if scene.whole_rows:  # decoded in full anyway
            band = scene.read(y, 0, min(16, side), scene.width)
            step = max(1, scene.width // (PLACES * SIDE))
            found.append(band[:, ::step].reshape(-1, scene.channels))
        else:
            for x in _evenly(scene.width - side):
                found.append(scene.read(y, x, side, side).reshape(-1, scene.channels))
    return np.concatenate(found)


def _evenly(last: int) -> list[int]:
    return np.unique(np.linspace(0, last, PLACES).astype(np.int64)).tolist()


def saturation(colors: Values) -> NDArray[np.uint8]:
    """Of HSV, of 8-bit colors [..., 3]: 255 (max - min) / max, rounded down; 0 of black."""
    high, low = colors.max(-1), colors.min(-1)
    return (255 * (high - low).astype(np.uint16) // np.maximum(high, 1)).astype(np.uint8)


def otsu(counts: NDArray[np.int64]) -> int:
    """The level up to which values form the lower class, so that the variance between the two
    classes is largest; counts [levels]."""
    levels = np.arange(len(counts))
    below = np.cumsum(counts)[:-1].astype(np.float64)
    above = counts.sum() - below
    total = np.cumsum(counts * levels)
    lower = total[:-1] / np.maximum(below, 1)
    upper = (total[-1] - total[:-1]) / np.maximum(above, 1)
    return int(np.argmax(below * above * (lower - upper) ** 2))
