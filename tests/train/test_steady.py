"""Loader workers that die: deaths count while no step comes between them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from xcit_dino.errors import RunError
from xcit_dino.train.worker_restart import MAX_DEATHS, restarting_workers


class Dying:
    """A loader whose worker dies after some steps of each start."""

    def __init__(self, steps: list[int]):
        self.left, self.start_step = steps, 0

    def __iter__(self):
        for number in range(self.left.pop(0)):
            yield [self.start_step + number]
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")


def steps_of(loader):
    state, seen = SimpleNamespace(step=0), []
    for (step,) in restarting_workers(loader, state):
        seen.append(step)
        state.step += 1
    return seen


def test_deaths_with_steps_between_end_no_run(capsys):
    loader = Dying([2] * 10)
    with pytest.raises(IndexError):  # after ten deaths
        steps_of(loader)
    assert capsys.readouterr().err.count("starting new workers at step") == 10


def test_deaths_at_one_step_end_the_run(capsys):
    loader = Dying([3, 0, 2, 0, 0, 9])
    with pytest.raises(RunError, match=rf"died {MAX_DEATHS} times at step 6.*--prefetch_factor"):
        steps_of(loader)
    assert loader.left == [9]
