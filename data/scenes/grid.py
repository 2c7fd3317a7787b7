"""The grid of tiles on a scene: their corners, and the panels in which they are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

PANEL_BYTES = 64 << 20
"""Of the scene, read at once in each process; a single tile may need more."""


def starts(length: int, tile: int, stride: int) -> list[int]:
    """Where tiles begin along a side of ``length`` pixels: every ``stride``, and the last one so
    that it ends at the edge (unless there are gaps between them). Empty where none fits."""
    if tile > length:
        return []
    found = list(range(0, length - tile + 1, stride))
    if found[-1] + tile < length and stride <= tile:
        found.append(length - tile)
    return found


class Panel(NamedTuple):
    """A rectangle of a scene that holds whole tiles."""

    ys: list[int]
    xs: list[int]
    """Corners of its tiles: each of ``ys`` with each of ``xs``."""
    tile: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(y, x, height, width)."""
        y, x = self.ys[0], self.xs[0]
        return y, x, self.ys[-1] + self.tile - y, self.xs[-1] + self.tile - x


def bands(height: int, width: int, tile: int, stride: int, pixel_bytes: int) -> list[list[Panel]]:
    """All tiles of a scene in panels of bounded size, grouped by rows: as wide as possible, then as
    high, so that little is decoded twice whether the file stores strips or tiles."""
    ys, xs = starts(height, tile, stride), starts(width, tile, stride)
    if not ys or not xs:
        return []
    columns = list(_groups(xs, tile, PANEL_BYTES // (tile * pixel_bytes)))
    widest = max(group[-1] - group[0] for group in columns) + tile
    rows = _groups(ys, tile, PANEL_BYTES // (widest * pixel_bytes))
    return [[Panel(row, column, tile) for column in columns] for row in rows]


def _groups(corners: list[int], tile: int, most: int) -> Iterator[list[int]]:
    """Neighboring corners whose tiles together span at most that many pixels, at least one each."""
    group: list[int] = []
    for corner in corners:
        if group and corner + tile - group[0] > most:
            yield group
            group = []
        group.append(corner)
    yield group
