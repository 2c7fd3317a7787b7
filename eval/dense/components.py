"""Patch features as colors: their first three principal components as red, green and blue.

The picture of DINOv2 (arXiv:2304.07193, figure 1): the first component of all patches separates the
foreground from the background; the first three of the foreground's patches are its colors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xcit_dino.data.scenes.foreground import otsu
from xcit_dino.eval.pictures.false_color import FalseColor, of_components, principal_axes

SAMPLE_IMAGES, SAMPLE_PATCHES = 64, 1024  # of which components are found: images, patches of each
LEVELS = 256  # of the first component, for Otsu's threshold
LEAST = 4  # foreground patches of which components can be found

Pixels = NDArray[np.uint8]
Grid = NDArray[np.floating]


class Colored(NamedTuple):
    """The patches of an image in color, uint8 [h, w, 3] each."""

    patches: Pixels
    """All of them."""
    foreground: Pixels
    """Those of the foreground in colors of their own, on black."""

    def enlarged(self, height: int, width: int) -> Colored:
        """Every patch as a rectangle of equal pixels."""
        return Colored(*(enlarged(picture, height, width) for picture in self))


@dataclass(frozen=True)
class PatchColors:
    """The colors of patch features, the same in all images of a set."""

    axis: NDArray[np.float32]
    """[D]: the first principal component, towards the foreground."""
    threshold: float
    """Foreground are the patches whose component is larger."""
    every: FalseColor
    front: FalseColor

    def is_foreground(self, grid: Grid) -> NDArray[np.bool_]:
        """[..., D] -> [...]."""
        return grid.astype(np.float32) @ self.axis > self.threshold

    def __call__(self, grid: Grid) -> Colored:
        """Features [h, w, D] -> their colors."""
        values = grid.astype(np.float32)
        front = self.front(values)
        front[~self.is_foreground(values)] = 0
        return Colored(self.every(values), front)


def fit_colors(grids: Iterable[Grid]) -> PatchColors | None:
    """The colors of images of one kind, found in some of them: grids [h, w, D]; None where there
    are fewer than two patches.

    Otsu's threshold divides the first component; the side that the images' borders have less of is
    the foreground.
    """
    samples = [_sample(grid) for grid in grids]
    if sum(len(rows) for rows, _ in samples) < 2:
        return None
    rows = np.concatenate([rows for rows, _ in samples])
    border = np.concatenate([border for _, border in samples])
    axis = principal_axes(rows, 1)[:, 0]
    scores = rows @ axis
    low, high = float(scores.min()), float(scores.max())
    counts, edges = np.histogram(scores, LEVELS, (low, max(high, low + 1e-6)))
    threshold = float(edges[otsu(counts) + 1])
    front = scores > threshold
    if border.any() and front[border].mean() > front.mean():
        axis, threshold, front = -axis, -threshold, ~front
    chosen = rows[front] if front.sum() >= LEAST else rows
    return PatchColors(
        axis.astype(np.float32), threshold, of_components(rows), of_components(chosen)
    )


def _sample(grid: Grid) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Evenly spaced patches [n, D] of a grid, and which of them are on its border."""
    edge = np.ones(grid.shape[:2], bool)
    edge[1:-1, 1:-1] = False
    chosen = np.linspace(0, edge.size - 1, min(SAMPLE_PATCHES, edge.size)).astype(np.int64)
    return grid.reshape(edge.size, -1)[chosen].astype(np.float32), edge.ravel()[chosen]


def enlarged(picture: Pixels, height: int, width: int) -> Pixels:
    """Nearest neighbors."""
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST))
