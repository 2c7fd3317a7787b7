"""The plan's guarantees: every sample once per epoch, random access to steps, any layout."""

from __future__ import annotations

import time

import numpy as np
import pytest

from xcit_dino.data.plan import Plan, rank_slice
from xcit_dino.data.rng import mix, random_bits, random_permutation, random_uniforms
from xcit_dino.errors import InputError


def ragged_counts(n: int = 23) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 40, n)  # empty shards included


def test_splitmix_against_its_published_sequence():
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        states = np.uint64(1234567) + golden * np.arange(1, 4, dtype=np.uint64)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert mix(states).tolist() == expected


def test_random_uniforms_are_uniform_and_keys_independent():
    u = random_uniforms(3, np.arange(200)[:, None], np.arange(500))
    assert u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, bins=64, range=(0, 1))[0]
    expected = u.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 120  # chi2(63): p < 1e-5
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.015
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.015
    assert len(np.unique(random_bits(3, np.arange(200)[:, None], np.arange(500)))) == u.size
    assert random_bits(1, 2) != random_bits(2, 1)


def test_permutation_places_every_item_everywhere():
    places = np.stack([random_permutation(8, seed) for seed in range(4000)])
    table = np.stack([(places == item).sum(0) for item in range(8)])
    assert abs(table - 500).max() < 110  # 5 sigma of a binomial(4000, 1/8)


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_each_sample_once_an_epoch(window: int, batch_size: int):
    counts = ragged_counts()
    n = counts.sum()
    plan = Plan(counts, seed=1, batch_size=batch_size, window=window)
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = np.concatenate([plan.batch(step) for step in steps])
        assert len(seen) == n - n % batch_size == len(np.unique(seen))
        assert seen.min() >= 0 and seen.max() < n


def test_wrap_fills_the_last_batch_with_the_epochs_first():
    counts = ragged_counts()
    n = int(counts.sum())
    plan = Plan(counts, seed=1, batch_size=50, window=2, last_batch="wrap")
    assert plan.steps_per_epoch == -(-n // 50)
    seen = np.concatenate([plan.batch(step) for step in range(plan.steps_per_epoch)])
    assert len(np.unique(seen)) == n
    assert np.array_equal(seen[n:], seen[: len(seen) - n])


def test_any_step_in_any_order_is_the_same():
    counts = ragged_counts()
    steps = np.random.RandomState(1).permutation(40)
    plan = Plan(counts, seed=5, checksum="a", batch_size=32, window=4)
    jumping = {step: plan.batch(step) for step in steps}
    for step in range(40):
        fresh = Plan(counts, seed=5, checksum="a", batch_size=32, window=4)
        assert np.array_equal(fresh.batch(step), jumping[step])


def test_seed_checksum_and_epoch_change_the_order():
    def first(step: int = 0, **change) -> list[int]:
        return (
            Plan(ragged_counts(), **({"seed": 0, "batch_size": 64} | change)).batch(step).tolist()
        )

    steps = Plan(ragged_counts(), seed=0, batch_size=64).steps_per_epoch
    orders = [first(), first(seed=1), first(checksum="other"), first(steps)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_window_keeps_reading_local():
    """At any moment samples come from at most two windows of shards."""
    plan = Plan(np.full(40, 100), seed=0, batch_size=50, window=4)
    for step in range(plan.steps_per_epoch):
        epoch, number, windows = plan.window_of(step)
        wanted = plan.shards_of_window(epoch, number)
        assert set(plan.batch(step) // 100) <= set(wanted.tolist())
        assert windows == 10


@pytest.mark.parametrize("world_size,accum", [(1, 1), (1, 8), (2, 4), (4, 2), (8, 1), (2, 2)])
def test_layouts_make_up_the_same_global_batch(world_size: int, accum: int):
    batch = Plan(ragged_counts(), seed=0, batch_size=64).batch(3)
    parts = [
        rank_slice(batch, rank, world_size, accum, micro)
        for micro in range(accum)
        for rank in range(world_size)
    ]
    assert np.array_equal(np.concatenate(parts), batch)


def test_fewer_images_than_a_batch_is_said_in_words():
    with pytest.raises(InputError, match="10 images.*--batch_size_per_gpu"):
        Plan(np.array([4, 6]), seed=0, batch_size=11)


def test_imagenet_resumes_in_far_less_than_two_seconds():
    begin = time.perf_counter()
    plan = Plan(np.full(1281, 1000), seed=0, batch_size=1024)
    plan.batch(299 * plan.steps_per_epoch + 617)
    assert time.perf_counter() - begin < 1
