"""data/pixels.py: windows, statistics after scaling, and what an index stores."""

import json
from functools import partial

import numpy as np
import pytest

from xcit_dino.data.native.scaling import check_fit
from xcit_dino.data.pixels import (
    RGB8,
    SHARES,
    PixelFormat,
    Statistics,
    Window,
    default_window,
    parse_window,
    scaled_statistics,
)
from xcit_dino.errors import InputError


def form_of(*channels: np.ndarray, dtype: str = "uint16") -> PixelFormat:
    statistics = Statistics(
        mean=tuple(float(x.mean()) for x in channels),
        std=tuple(float(x.std()) for x in channels),
        quantiles=tuple(tuple(np.percentile(x, SHARES).tolist()) for x in channels),
        invalid=(0.0,) * len(channels),
        images=1,
    )
    return PixelFormat(len(channels), dtype, statistics=statistics)


def test_an_index_stores_a_format_and_finds_it_again():
    form = form_of(np.arange(100.0), np.arange(7.0, 300.0))
    assert PixelFormat.parse(json.loads(json.dumps(form.dump()))) == form
    assert PixelFormat.parse(None) is RGB8 and RGB8.dump() is None
    assert (RGB8.name, form.name) == ("rgb8", "2xuint16")
    with pytest.raises(ValueError, match="other channels"):
        PixelFormat.parse({**(form.dump() or {}), "channels": 3})


def test_default_windows():
    assert default_window(RGB8) == Window((0.0,), (255.0,))
    twelve_bits = form_of(np.arange(4000.0), np.arange(9.0))
    assert default_window(twelve_bits) == Window((0.0,), (4095.0,))
    inverted = form_of(65535 - np.arange(3500.0))  # white is zero, 12 bits in 16
    assert default_window(inverted) == Window((61440.0,), (65535.0,))
    assert default_window(form_of(40000 + np.arange(9.0))) == Window((32768.0,), (65535.0,))
    signed = form_of(np.arange(-1000.0, 3001.0), np.zeros(5), dtype="int16")
    assert default_window(signed).low == pytest.approx((-996.0, 0.0))
    assert default_window(signed).high == pytest.approx(
        (2996.0, 1.0)
    )  # a constant channel has a width, too


def test_windows_by_option():
    form = form_of(np.arange(1001.0), 2 * np.arange(1001.0))
    assert parse_window(("0", "4095"), form) == Window((0.0,), (4095.0,))
    assert parse_window(("p1", "p99"), form) == Window((10.0, 20.0), (990.0, 1980.0))
    assert parse_window(("p0", "5000"), form) == Window((0.0, 0.0), (5000.0, 5000.0))
    each = parse_window(("0", "p50", "p50", "3000"), form)
    assert each == Window((0.0, 1000.0), (500.0, 3000.0))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("9", "4"), "first must be below"),
        (("p101", "p1"), "between p0 and p100"),
        (("low", "4"), "or a percentile"),
        (("1", "2", "3"), "for each of 2 channels"),
        (("nan", "4"), "first must be below"),
    ],
)
def test_windows_that_cannot_be(values, words):
    with pytest.raises(InputError, match=words):
        parse_window(values, form_of(np.arange(9.0), np.arange(9.0)))


def test_windows_that_hardly_fit_are_said_and_those_of_nothing_refused():
    form = form_of(np.arange(3500.0), np.zeros(9), 10 + np.arange(30.0))  # one is constant
    given = partial(check_fit, form=form, what="--window", refuse=True)
    assert given(Window((0.0,) * 3, (2000.0, 1.0, 39.0))) == []  # 43 % are clipped
    clipped = given(Window((0.0,) * 3, (1000.0, 1.0, 39.0)))
    assert clipped == [
        "WARNING: --window 0 1000: clips 71 % of the values of channel 1 (0 to 3499)"
    ]
    little = check_fit(Window((0.0,), (4095.0,)), form, "the window", refuse=True)
    assert little == [
        "WARNING: the window 0 4095: the values of channel 3 (10 to 39) fill 1 % of it or less"
    ]
    for low, high in ((10000.0, 20000.0), (-50.0, -1.0), (39.0, 5000.0)):
        with pytest.raises(InputError, match="holds none of the values of channel . .*p0.1 p99.9"):
            given(Window((low,), (high,)))
    lines = check_fit(Window((10000.0,), (20000.0,)), form, "the window", refuse=False)
    assert len(lines) == 2 and "clips 100 % of the values of channel 1 (0 to 3499)" in lines[0]


def test_statistics_after_scaling():
    values = np.random.default_rng(0).normal(500, 100, 100_000)
    form = form_of(values, dtype="float32")
    for low, high in ((-1e4, 1e4), (400, 600)):  # without clipping, and with
        mean, std = scaled_statistics(form, Window((low,), (high,)))
        scaled = np.clip((values - low) / (high - low), 0, 1)
        assert mean[0] == pytest.approx(scaled.mean(), abs=2e-3)
        assert std[0] == pytest.approx(scaled.std(), rel=2e-2)
