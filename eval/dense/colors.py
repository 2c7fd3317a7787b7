"""Colors for dense predictions and features: masks over photos, and patches by their principal
components."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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


def components(rows: NDArray[np.float32], count: int) -> tuple[NDArray[np.float32], ...]:
    """(mean [D], directions [count, D]) of the first principal components; a direction's largest
    entry is positive, so that a picture does not depend on the solver."""
    mean = rows.mean(0)
    centered = rows - mean
    values, vectors = np.linalg.eigh(centered.T @ centered)
    found = vectors[:, np.argsort(-values)[:count]].T
    largest = np.abs(found).argmax(1)
    signs = np.sign(found[np.arange(len(found)), largest])
    return mean, (found * signs[:, None]).astype(np.float32)


def patch_colors(
    grids: Sequence[NDArray[np.float32]], separate: bool = True
) -> tuple[list[Pixels], list[NDArray[np.bool_]]]:
    """Patches [h, w, D] of images as colors [h, w, 3], and which are foreground [h, w].

    DINOv2's pictures: the first principal component of all patches divides foreground from
    background; the first three of the foreground's patches are red, green and blue, each scaled
    from its 2nd to its 98th percentile; the background is black. The side that touches the images'
    borders less counts as foreground. Without ``separate`` all patches are colored.
    """
    rows = np.concatenate([grid.reshape(-1, grid.shape[-1]) for grid in grids]).astype(np.float32)
    front = np.ones(len(rows), bool)
    if separate:
        mean, first = components(rows, 1)
        front = _foreground(grids, (rows - mean) @ first[0] > 0)
    chosen = rows[front] if front.sum() > 3 else rows
    mean, directions = components(chosen, min(3, rows.shape[1]))
    values = (rows - mean) @ directions.T
    low, high = np.percentile(values[front] if front.any() else values, (2, 98), axis=0)
    scaled = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
    colors = np.zeros((len(rows), 3), np.uint8)
    colors[:, : scaled.shape[1]] = np.rint(255 * scaled)
    colors[~front] = 0
    ends = np.cumsum([grid.shape[0] * grid.shape[1] for grid in grids])[:-1]
    shapes = [grid.shape[:2] for grid in grids]
    pictures = [p.reshape(*s, 3) for p, s in zip(np.split(colors, ends), shapes, strict=True)]
    fronts = [p.reshape(s) for p, s in zip(np.split(front, ends), shapes, strict=True)]
    return pictures, fronts


def _foreground(grids: Sequence[NDArray[np.float32]], side: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The given side of all patches, or the other one where it touches the borders more."""
    edges = []
    for grid in grids:
        edge = np.ones(grid.shape[:2], bool)
        edge[1:-1, 1:-1] = False
        edges.append(edge.ravel())
    border = np.concatenate(edges)
    here, there = side[border].mean(), side[~border].mean() if (~border).any() else 0.5
    return ~side if here > there else side
