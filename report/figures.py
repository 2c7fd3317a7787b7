"""Figures of many things at once, as inline SVG: a map of points, a matrix of shares."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from xcit_dino.report.charts import BOTTOM, LEFT, RIGHT, STYLES, TOP, Frame, Points, figure

MAP_WIDTH, MAP_HEIGHT = 1040, 520
MATRIX_WIDTH = 500
SHAPES = (  # of points, so that colour is not all that tells classes apart
    '<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>',
    '<path d="M{x:.1f} {y:.1f}m-3.2 -3.2h6.4v6.4h-6.4z"/>',
    '<path d="M{x:.1f} {y:.1f}m0 -4.4l4 7h-8z"/>',
)


def point_map(
    title: str, points: Points, groups: Sequence[int], names: Sequence[str], labels: tuple[str, str]
) -> str:
    """Points in the plane, each of a group; group -1 is drawn pale and without a name.

    Args:
        title: above the map.
        points: their places.
        groups: one a point, -1 or a number into ``names``.
        labels: of the two axes, which have no values worth reading.
    """
    xs, ys = zip(*points, strict=True)
    frame = Frame(min(xs), max(xs), min(ys), max(ys), MAP_WIDTH, MAP_HEIGHT)
    order = sorted(range(len(points)), key=lambda i: groups[i] >= 0)  # the pale ones below
    dots = []
    for i in order:
        n = groups[i]
        kind = f"dot line-{n % STYLES}" if n >= 0 else "dot other"
        hover = f"<title>{escape(names[n])}</title>" if n >= 0 else ""
        dots.append(f'<g class="{kind}">{hover}{shape(n, *frame.place(*points[i]))}</g>')
    room, middle = MAP_HEIGHT - TOP - BOTTOM, (LEFT + MAP_WIDTH - RIGHT) / 2
    box = f'x="{LEFT - 8}" y="0" width="{MAP_WIDTH - LEFT}" height="{room + 16}"'
    parts = [
        f'<rect class="frame" {box}/>',
        f'<text x="{middle}" y="{MAP_HEIGHT - 8}" text-anchor="middle">{escape(labels[0])}</text>',
        f'<text transform="translate(24 {TOP + room / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(labels[1])}</text>',
    ]
    content = "".join([*parts, *dots])
    return figure(title, content, names=point_legend(names), size=(MAP_WIDTH, MAP_HEIGHT))


def shape(n: int, x: float, y: float) -> str:
    """The mark of the n-th group; colours come round after six, and then with another shape."""
    return SHAPES[n // STYLES % len(SHAPES) if n >= 0 else 0].format(x=x, y=y)


def point_legend(names: Sequence[str]) -> str:
    """What the points of a map are."""
    items = (
        f'<span class="line-{n % STYLES}"><svg viewBox="-6 -6 12 12" class="dot">{shape(n, 0, 0)}'
        f"</svg>{escape(name)}</span>"
        for n, name in enumerate(names)
    )
    return f'<p class="legend">{"".join(items)}</p>'


# -- a matrix --------------------------------------------------------------------------------------


def matrix(title: str, rows: Sequence[Sequence[float]], names: Sequence[str]) -> str:
    """A square of shares (0 to 1), rows and columns named alike; the larger, the fuller."""
    names = [shortened(name) for name in names]
    margin = 10 + 6.0 * max(len(name) for name in names)
    cell = (MATRIX_WIDTH - margin) / len(names)
    side = cell * len(names)
    parts = []
    for i, name in enumerate(names):
        at = (i + 0.5) * cell
        parts.append(
            f'<text class="name" x="{margin - 6:.1f}" y="{at + 4:.1f}" text-anchor="end">'
            f'{escape(name)}</text><text class="name" text-anchor="end" '
            f'transform="translate({margin + at + 4:.1f} {side + 6:.1f}) rotate(-90)">'
            f"{escape(name)}</text>"
        )
        for j, share in enumerate(rows[i]):
            x, y = margin + j * cell, i * cell
            parts.append(
                f"<g><title>{escape(f'{name} taken for {names[j]}: {share:.0%}')}</title>"
                f'<rect class="heat" x="{x:.1f}" y="{y:.1f}" width="{cell:.1f}" '
                f'height="{cell:.1f}" fill-opacity="{share:.2f}"/>'
            )
            if share >= 0.005 and cell > 22:
                parts.append(
                    f'<text class="cell{" on" if share > 0.6 else ""}" x="{x + cell / 2:.1f}" '
                    f'y="{at + 4:.1f}" text-anchor="middle">{100 * share:.0f}</text>'
                )
            parts.append("</g>")
    parts.append(
        f'<rect class="frame" x="{margin:.1f}" y="0" width="{side:.1f}" height="{side:.1f}"/>'
    )
    return figure(title, "".join(parts), size=(MATRIX_WIDTH, side + margin))


def shortened(name: str, most: int = 18) -> str:
    """A name that fits beside a row."""
    return name if len(name) <= most else f"{name[: most - 1]}…"
