"""Schedules against the arrays of the official code, written out with numpy."""

import numpy as np
import pytest

from xcit_dino.train.schedules import cosine, linear, warmup_cosine


def official(base, final, epochs, per_epoch, warmup_epochs=0, start=0.0):
    """What dino ``utils.cosine_scheduler`` describes: a linspace, then half a cosine."""
    warm = np.linspace(start, base, warmup_epochs * per_epoch) if warmup_epochs else np.array([])
    rest = np.arange(epochs * per_epoch - len(warm))
    return np.concatenate(
        (warm, final + 0.5 * (base - final) * (1 + np.cos(np.pi * rest / len(rest))))
    )


def test_warmup_cosine_equals_the_official_array():
    want = official(5e-4, 1e-6, epochs=7, per_epoch=11, warmup_epochs=2, start=1e-5)
    got = [warmup_cosine(s, 77, 5e-4, 1e-6, 22, 1e-5) for s in range(77)]
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_cosine_equals_the_official_array():
    want = official(0.996, 1.0, epochs=5, per_epoch=3)
    np.testing.assert_allclose([cosine(s, 15, 0.996, 1.0) for s in range(15)], want, rtol=1e-12)


def test_linear_is_a_linspace_then_constant():
    want = np.concatenate((np.linspace(0.04, 0.07, 30), np.full(10, 0.07)))
    np.testing.assert_allclose([linear(e, 30, 0.04, 0.07) for e in range(40)], want, rtol=1e-12)
    assert linear(0, 0, 0.04, 0.07) == 0.07


@pytest.mark.parametrize("warmup", [1, 2, 11, 76, 77])
def test_warm_ups_of_any_length_equal_the_official_array(warmup):
    """One step of it is numpy's linspace of one number: the start."""
    want = official(5e-4, 1e-6, epochs=77, per_epoch=1, warmup_epochs=warmup, start=1e-5)
    got = [warmup_cosine(s, 77, 5e-4, 1e-6, warmup, 1e-5) for s in range(77)]
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_warm_up_of_one_epoch_has_the_warm_up_temperature():
    """dino DINOLoss.teacher_temp_schedule: linspace(0.04, 0.07, 1), then 0.07."""
    assert [linear(epoch, 1, 0.04, 0.07) for epoch in range(3)] == [0.04, 0.07, 0.07]


def test_schedules_stay_at_their_end():
    assert cosine(100, 15, 0.5, 1.0) == 1.0
