"""Line charts as inline SVG: positions, ticks and labels; templates/line_chart draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from xcit_dino.report.page import render

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 340, 210  # of a line chart's canvas, about its size on screen
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 8, 40  # margins around the plot
MOST_POINTS = 400  # more than a screen shows; longer curves are averaged down
STYLES = 6  # colors with their dashes, in report.css


@dataclass(frozen=True)
class Frame:
    """Where the values of a chart lie on its canvas, in pixels from the upper left corner."""

    left: float
    right: float
    low: float
    high: float
    width: float = WIDTH
    height: float = HEIGHT
    plot_left: float = LEFT
    plot_top: float = TOP

    @property
    def plot_right(self) -> float:
        return self.width - RIGHT

    @property
    def plot_bottom(self) -> float:
        return self.height - BOTTOM

    @property
    def plot_height(self) -> float:
        return self.plot_bottom - self.plot_top

    @property
    def plot_center(self) -> float:
        return (self.plot_left + self.plot_right) / 2

    def x(self, value: float) -> float:
        share = (value - self.left) / max(self.right - self.left, 1e-12)
        return self.plot_left + share * (self.plot_right - self.plot_left)

    def y(self, value: float) -> float:
        share = (value - self.low) / max(self.high - self.low, 1e-12)
        return self.plot_bottom - share * self.plot_height


def line_chart(
    title: str,
    lines: Sequence[tuple[str, Points]],
    x_label: str,
    unit: str = "",
    marks: Sequence[float] = (),
    from_zero: bool = False,
) -> Markup:
    """A figure with one curve per line; empty where none has points.

    Args:
        title: above the chart.
        lines: (name, points); the n-th has the n-th color and dash of the style sheet.
        x_label: of the horizontal axis.
        unit: of the vertical axis, shown in the title.
        marks: positions of dotted vertical lines (restarts).
        from_zero: whether the vertical axis begins at 0, whatever the values.
    """
    lines = [(name, thin(finite(points))) for name, points in lines]
    drawn = [points for _, points in lines if points]
    if not drawn:
        return Markup()
    xs = [x for points in drawn for x, _ in points]
    ys = [y for points in drawn for _, y in points]
    low = min(0.0, min(ys)) if from_zero else min(ys)
    y_ticks = ticks(*padded(low, max(ys)), 4)
    frame = Frame(min(xs), max(xs), min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)))
    x_ticks = [x for x in ticks(frame.left, frame.right, 4) if frame.left <= x <= frame.right]
    curves = [
        {
            "name": name,
            "style": n % STYLES,
            "points": [(frame.x(x), frame.y(y)) for x, y in points],
            "labels": [f"{x:,.0f} {number(y)}" for x, y in points],
            "last": number(points[-1][1]),
            "spoken": f"{name} from {number(points[0][1])} to {number(points[-1][1])}",
        }
        for n, (name, points) in enumerate(lines)
        if points
    ]
    return render(
        "line_chart",
        title=f"{title}, {unit}" if unit else title,
        frame=frame,
        x_label=x_label,
        x_ticks=list(zip(map(frame.x, x_ticks), tick_labels(x_ticks), strict=True)),
        y_ticks=list(zip(map(frame.y, y_ticks), tick_labels(y_ticks), strict=True)),
        marks=[frame.x(x) for x in marks if frame.left < x < frame.right],
        curves=curves,
        last=curves[0]["last"] if len(curves) == 1 else "",
        legend=[name for name, _ in lines] if len(lines) > 1 else [],
        styles=STYLES,
    )


def padded(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty: room above and below a constant."""
    if high > low:
        return low, high
    return (low - 0.1 * abs(low), low + 0.1 * abs(low)) if low else (0.0, 1.0)


# -- numbers ---------------------------------------------------------------------------------------


def finite(points: Points) -> Points:
    """Points without NaN and infinity."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thin(points: Points) -> Points:
    """At most MOST_POINTS points: means of adjacent ones; the first and the last are kept."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / (MOST_POINTS - 2))
    groups = [points[i : i + size] for i in range(1, len(points) - 1, size)]
    means = [tuple(sum(axis) / len(group) for axis in zip(*group, strict=True)) for group in groups]
    return [points[0], *((x, y) for x, y in means), points[-1]]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover ``low`` to ``high``, at most
    ``most`` + 1 of them."""
    if high <= low:
        high = low + (abs(low) or 1) * 0.1
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Short forms, with as many digits as it takes to distinguish adjacent ones."""
    labels = [number(value) for value in values]
    if len(set(labels)) == len(labels):
        return labels
    digits = max(0, -math.floor(math.log10(values[1] - values[0]) + 1e-9))
    return [f"{value:,.{digits}f}" for value in values]


def number(value: float) -> str:
    """A short form: ``12,000``  ``3.21``  ``0.0005``  ``2e-6``."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}".replace("e-0", "e-")
