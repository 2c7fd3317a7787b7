"""Line charts as inline SVG: no script, no network, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 440, 220
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 40
MOST_POINTS = 400  # more than a screen shows; longer curves are averaged down


def line_chart(
    title: str, lines: Sequence[tuple[str, Points]], x_label: str, unit: str = ""
) -> str:
    """A figure with one curve a run.

    Args:
        title: above the chart.
        lines: (run's name, points); the n-th curve takes the page's colour ``--run-n``.
        x_label: of the horizontal axis.
        unit: after the last value in the title.
    """
    lines = [(name, thin(finite(points))) for name, points in lines]
    lines = [(name, points) for name, points in lines if points]
    if not lines:
        return ""
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 6), ticks(min(ys), max(ys), 5)
    left, right = min(xs[0], min(xs)), max(max(xs), min(xs) + 1e-9)
    low, high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - left) / (right - left), (y - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (
            HEIGHT - TOP - BOTTOM
        )

    parts = []
    for y in y_ticks:
        _, at = place(left, y)
        parts.append(f'<path class="rule" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in (x for x in x_ticks if left <= x <= right):
        at, _ = place(x, low)
        parts.append(
            f'<text x="{at:.1f}" y="{HEIGHT - 20}" text-anchor="middle">{number(x)}</text>'
        )
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 2}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
    )
    for n, (name, points) in enumerate(lines):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        x, y = place(*points[-1])
        hover = f"{escape(name)}: last {number(points[-1][1])}"
        parts.append(
            f'<g style="--line: var(--run-{n % 6})"><title>{hover}</title>'
            f'<polyline class="line" points="{path}"/>'
            f'<circle class="end" cx="{x:.1f}" cy="{y:.1f}" r="3"/></g>'
        )
    last = f"{number(lines[0][1][-1][1])}{unit}" if len(lines) == 1 else ""
    return (
        f'<figure><figcaption>{escape(title)}<span class="last">{escape(last)}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def finite(points: Points) -> Points:
    """The points that can be drawn."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thin(points: Points) -> Points:
    """At most MOST_POINTS points: means of runs of neighbours, the first and the last as they
    are."""
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


def number(value: float) -> str:
    """A short form: ``12,000``  ``3.21``  ``0.0005``  ``2e-06``."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
