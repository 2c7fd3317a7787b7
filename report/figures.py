"""Figures of a whole data set as inline SVG: a map of points, a matrix of shares."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from xcit_dino.report.charts import STYLES, Frame, Points
from xcit_dino.report.page import render

MAP_WIDTH, MAP_HEIGHT = 1040, 520
MATRIX_WIDTH = 500
LONGEST_NAME = 18


def point_map(
    title: str, points: Points, groups: Sequence[int], names: Sequence[str], labels: tuple[str, str]
) -> Markup:
    """Points in the plane, each in a group; colors repeat after six, then with another shape.

    Args:
        title: above the map.
        points: their positions.
        groups: one per point: an index into ``names``, or -1: drawn pale and without a name.
        labels: of the two axes, which have no values worth reading.
    """
    xs, ys = zip(*points, strict=True)
    frame = Frame(min(xs), max(xs), min(ys), max(ys), MAP_WIDTH, MAP_HEIGHT)
    placed = [(n, frame.x(x), frame.y(y)) for n, (x, y) in zip(groups, points, strict=True)]
    placed.sort(key=lambda point: point[0] >= 0)  # the pale ones below
    return render(
        "point_map",
        title=title,
        frame=frame,
        points=placed,
        names=names,
        labels=labels,
        styles=STYLES,
    )


def matrix(title: str, rows: Sequence[Sequence[float]], names: Sequence[str]) -> Markup:
    """A square of shares (0 to 1), the larger the darker; rows and columns have the same names."""
    names = [shortened(name) for name in names]
    margin = 10 + 6.0 * max(len(name) for name in names)
    cell = (MATRIX_WIDTH - margin) / len(names)
    return render(
        "matrix",
        title=title,
        rows=rows,
        names=names,
        width=MATRIX_WIDTH,
        margin=margin,
        cell=cell,
        side=cell * len(names),
    )


def shortened(name: str) -> str:
    """A name that fits beside a row."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
