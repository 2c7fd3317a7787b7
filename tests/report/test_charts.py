"""Charts: sane axes, every value in its place, names escaped."""

from __future__ import annotations

import math
import re

import pytest

from xcit_dino.report.charts import (
    HEIGHT,
    MOST_POINTS,
    WIDTH,
    line_chart,
    number,
    thin,
    tick_labels,
    ticks,
)
from xcit_dino.report.figures import matrix, point_map


def test_ticks_are_round_and_cover():
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.3, 0.97, 5) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    for low, high in ((0, 1), (-3, 7), (1e-9, 2e-9), (5, 5), (0, 0), (-1e6, 3e7), (99.5, 100.5)):
        found = ticks(low, high, 5)
        assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12
        assert 2 <= len(found) <= 7
        mantissa = (found[1] - found[0]) / 10 ** math.floor(math.log10(found[1] - found[0]) + 1e-9)
        assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-6


def test_long_curves_are_averaged_and_keep_their_ends():
    points = [(float(x), float(x % 7)) for x in range(10_001)]
    short = thin(points)
    assert len(short) <= MOST_POINTS
    assert short[0] == points[0] and short[-1] == points[-1]
    assert sum(y for _, y in short) / len(short) == pytest.approx(3, abs=0.05)


def places(chart: str) -> list[list[float]]:
    points = re.findall(r'<polyline points="([^"]*)"/>\s*<circle', chart)
    return [[float(v) for p in line.split() for v in p.split(",")] for line in points]


def test_a_curve_runs_from_corner_to_corner():
    (x0, y0, x1, y1) = places(line_chart("rise", [("run", [(0, 0), (10, 100)])], "step"))[0]
    assert 0 < x0 < x1 <= WIDTH and 0 <= y1 < y0 < HEIGHT
    assert line_chart("empty", [("run", [(0, math.nan)])], "step") == ""
    assert places(line_chart("one point", [("run", [(3, 3)])], "step"))


def test_lines_differ_by_dash_and_are_named():
    chart = line_chart("two", [("a<b", [(0, 1), (1, 2)]), ("c", [(0, 2), (1, 3)])], "step", "%")
    assert "two, %" in chart and "a&lt;b" in chart and chart.count('class="line-1"') == 2
    assert line_chart("one", [("a", [(0, 1), (4, 2)])], "step", marks=[2, 9]).count("mark") == 1


def test_a_constant_lies_in_the_middle():
    (_, y, _, _) = places(line_chart("flat", [("a", [(0, 0.04), (1, 0.04)])], "step"))[0]
    assert 0.2 * HEIGHT < y < 0.7 * HEIGHT


def test_the_matrix_is_filled_where_shares_are():
    chart = matrix("m", [[0.75, 0.25], [0, 1]], ["cat", "<dog>"])
    opacities = re.findall(r'fill-opacity="([\d.]+)"', chart)
    assert opacities == ["0.75", "0.25", "0.00", "1.00"]
    assert "cat classified as &lt;dog&gt;: 25%" in chart


def test_the_map_has_a_mark_a_point_and_names():
    points = [(0.0, 0.0), (1.0, 1.0), (2.0, 0.0)]
    chart = point_map("map", points, [0, 7, -1], [f"c{n}" for n in range(8)], ("x", "y"))
    assert chart.count("dot line-0") == 1 and chart.count("dot other") == 1
    assert "<title>c7</title>" in chart and "c3" in chart


def test_labels_of_close_ticks_differ():
    assert tick_labels([1.2496, 1.25, 1.2504]) == ["1.2496", "1.2500", "1.2504"]
    assert tick_labels([0, 500, 1000]) == ["0", "500", "1,000"]


def test_an_axis_may_begin_at_zero():
    chart = line_chart("m", [("a", [(0, 90.0), (1, 100.0)])], "step", from_zero=True)
    assert ">0</text>" in chart and min(places(chart)[0][1::2]) < 0.2 * HEIGHT


def test_numbers_are_short():
    assert [number(v) for v in (0, 12_000, 3.14159, 5e-4, 2e-6)] == [
        "0", "12,000", "3.14", "0.0005", "2e-6",
    ]  # fmt: skip
