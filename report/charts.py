"""Charts of curves as inline SVG. No script, no network; colours and dashes come from the page's
style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 340, 210  # of a curve's canvas, about the pixels that it gets
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 8, 40
MOST_POINTS = 400  # more than a screen shows; longer curves are averaged down
STYLES = 6  # colours with their dashes, in report.css


@dataclass(frozen=True)
class Frame:
    """Where the values of a chart lie on its canvas."""

    left: float
    right: float
    low: float
    high: float
    width: float = WIDTH
    height: float = HEIGHT

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Canvas position of a point."""
        across = (x - self.left) / max(self.right - self.left, 1e-12)
        up = (y - self.low) / max(self.high - self.low, 1e-12)
        room = self.height - TOP - BOTTOM
        return LEFT + across * (self.width - LEFT - RIGHT), self.height - BOTTOM - up * room


def line_chart(
    title: str,
    lines: Sequence[tuple[str, Points]],
    x_label: str,
    unit: str = "",
    marks: Sequence[float] = (),
    from_zero: bool = False,
) -> str:
    """A figure with one curve each of ``lines``; nothing where none has points.

    Args:
        title: above the chart.
        lines: (name, points); the n-th takes the page's n-th colour and dash.
        x_label: of the horizontal axis.
        unit: of the vertical axis, said in the title.
        marks: where a dotted vertical line stands (restarts).
        from_zero: whether the vertical axis begins at 0, whatever the values.
    """
    lines = [(name, thin(finite(points))) for name, points in lines]
    drawn = [points for _, points in lines if points]
    if not drawn:
        return ""
    xs = [x for points in drawn for x, _ in points]
    ys = [y for points in drawn for _, y in points]
    low = min(0.0, min(ys)) if from_zero else min(ys)
    y_ticks = ticks(*around(low, max(ys)), 4)
    frame = Frame(min(xs), max(xs), min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)))
    parts = [rules(frame, y_ticks), x_axis(frame, x_label)]
    for x in (x for x in marks if frame.left < x < frame.right):
        at, _ = frame.place(x, frame.low)
        parts.append(f'<path class="mark" d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    parts += [curve(frame, n, name, points) for n, (name, points) in enumerate(lines) if points]
    last = number(drawn[0][-1][1]) if len(drawn) == 1 else ""
    names = legend([name for name, _ in lines]) if len(lines) > 1 else ""
    return figure(f"{title}, {unit}" if unit else title, "".join(parts), last, names)


def figure(
    title: str,
    content: str,
    last: str = "",
    names: str = "",
    size: tuple[float, float] = (WIDTH, HEIGHT),
) -> str:
    """A canvas with a title, the last value beside it, and a legend below it."""
    return (
        f'<figure><figcaption>{escape(title)}<span class="last">{escape(last)}</span></figcaption>'
        f'{names}<svg viewBox="0 0 {size[0]:.0f} {size[1]:.0f}" role="img" '
        f'aria-label="{escape(title)}">{content}</svg></figure>'
    )


def legend(names: Sequence[str]) -> str:
    """What the lines of a chart are, drawn as they are."""
    items = (
        f'<span class="line-{n % STYLES}"><svg class="key" viewBox="0 0 24 6">'
        f'<polyline points="0,3 24,3"/></svg>{escape(name)}</span>'
        for n, name in enumerate(names)
    )
    return f'<p class="legend">{"".join(items)}</p>'


def around(low: float, high: float) -> tuple[float, float]:
    """Room above and below a constant."""
    if high > low:
        return low, high
    return (low - 0.1 * abs(low), low + 0.1 * abs(low)) if low else (0.0, 1.0)


def rules(frame: Frame, y_ticks: Sequence[float]) -> str:
    """Horizontal lines with their values."""
    parts = []
    for y, word in zip(y_ticks, tick_words(y_ticks), strict=True):
        _, at = frame.place(frame.left, y)
        parts.append(f'<path class="rule" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{word}</text>')
    return "".join(parts)


def x_axis(frame: Frame, label: str) -> str:
    """Values along the horizontal axis, and its name."""
    parts = []
    x_ticks = [x for x in ticks(frame.left, frame.right, 4) if frame.left <= x <= frame.right]
    for x, word in zip(x_ticks, tick_words(x_ticks), strict=True):
        at, _ = frame.place(x, frame.low)
        at = min(at, WIDTH - RIGHT - 8)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 22}" text-anchor="middle">{word}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(label)}</text>')
    return "".join(parts)


def curve(frame: Frame, n: int, name: str, points: Points) -> str:
    """One line; its name and last value show when pointed at."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (frame.place(*point) for point in points))
    x, y = frame.place(*points[-1])
    return (
        f'<g class="line-{n % STYLES}"><title>{escape(name)}: last {number(points[-1][1])}</title>'
        f'<polyline points="{path}"/><circle class="end" cx="{x:.1f}" cy="{y:.1f}" r="3"/></g>'
    )


# -- numbers ---------------------------------------------------------------------------------------


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


def tick_words(values: Sequence[float]) -> list[str]:
    """Short forms, with as many digits as it takes to tell neighbours apart."""
    words = [number(value) for value in values]
    if len(set(words)) == len(words):
        return words
    digits = max(0, -math.floor(math.log10(values[1] - values[0]) + 1e-9))
    return [f"{value:,.{digits}f}" for value in values]


def number(value: float) -> str:
    """A short form: ``12,000``  ``3.21``  ``0.0005``  ``2e-6``."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}".replace("e-0", "e-")
