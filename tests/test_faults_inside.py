"""Faults inside a run: memory, workers, ranks, non-finite numbers, and time.

Like test_faults.py, on real runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.victims import (
    STEPS,
    assert_nothing_lost,
    at_step,
    ended,
    final_bits,
    finish,
    kill_workers,
    limit_memory,
    lines,
    said,
    sleep_with_the_interpreters_lock,
    spoil,
    spoil_gradients,
    start,
    steps_done,
    wait_for,
)

# -- memory, workers, ranks


def test_out_of_memory_in_a_step(shards: Path, tmp_path: Path) -> None:
    """The data need no memory of their own once the first step is done; the step does."""
    run = tmp_path / "run"
    options = {"global_crops_size": 96, "batch_size_per_gpu": 10}
    assert ended(start(run, shards, at_step, 2, limit_memory, **options)) == 1
    words = said(run)
    assert "out of memory in step 2 on rank 0: weights, gradients" in words
    assert "Take --batch_size_per_gpu 5 --accum_iter 2: the same run resumes" in words
    options |= {"batch_size_per_gpu": 5, "accum_iter": 2}
    assert ended(start(run, shards, **options)) == 0
    assert steps_done(run) == 4 * 20 // 10, "the same steps as planned"


def test_worker_killed(shards: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert ended(start(run, shards, at_step, 7, kill_workers, num_workers=1)) == 0
    assert "starting new workers at step" in said(run)
    assert_nothing_lost(run, whole)


def two_ranks(run: Path, shards: Path, *prepare: Any, **options: Any) -> list[Any]:
    """A run of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = (f"{rank} of 2 at {port}" for rank in range(2))
    return [start(run, shards, *prepare, rank=r, batch_size_per_gpu=2, **options) for r in ranks]


def test_rank_that_hangs_is_named(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = two_ranks(run, shards, watchdog_minutes=1 / 60)
    wait_for(lambda: steps_done(run) >= 3)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    wait_for(lambda: "does not respond" in said(run))
    os.kill(ranks[1].pid, signal.SIGCONT)
    assert [ended(rank) for rank in ranks] == [0, 0]
    words = said(run)
    assert re.search(
        r"no step for \d s after step \d+: rank 0 on \S+ is in: (backward|coll)", words
    )
    assert "rank 1 does not respond (stopped, or its machine is down)" in words
    (stacks,) = list((run / "stalls").glob("*/rank-0.txt"))[:1]
    assert "in train_step" in stacks.read_text()


ABORT = {"watchdog_minutes": 4 / 60, "on_stall": "abort"}  # the first step takes seconds under load


@pytest.mark.faults
def test_hang_that_keeps_the_interpreters_lock(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    frozen = start(run, shards, at_step, 4, sleep_with_the_interpreters_lock, 60, **ABORT)
    assert ended(frozen, 120) == 1
    assert "Timeout (0:00:08)!" in said(run) and "sleep_with_the_interpreters_lock" in said(run)


@pytest.mark.faults
def test_stalled_process_ends_itself(shards: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert ended(start(run, shards, at_step, 7, time.sleep, 60, **ABORT), 120) == 1
    assert "rank 0 ends itself: no step for" in said(run)
    finish(run, shards)
    assert_nothing_lost(run, whole)


# -- numbers that are none


def test_infinite_gradients_are_skipped(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finish_with(run, shards, spoil_gradients, 3, 4)
    metrics = lines(run)
    assert [line["step"] for line in metrics if line["skipped"]] == [3, 4]
    found = noted(run / "nonfinite.jsonl")
    assert [(line["step"], line["in_a_row"]) for line in found] == [(3, 1), (4, 2)]
    assert found[0]["first"].startswith("the gradient of student.head.last_layer.")
    assert len(found[0]["keys"]) == 4 and all(":" in key for key in found[0]["keys"])
    assert "step 3 skipped: non-finite on rank 0: the gradient of student.head" in said(run)


def test_spoilt_state_is_rolled_back_with_a_lower_rate(shards: Path, tmp_path: Path) -> None:
    """Infinite activations spoil batch-norm's statistics: there is no going on from there. On two
    ranks, of which one sees them."""
    run = tmp_path / "run"
    ranks = two_ranks(run, shards, spoil, 7, 9, (1,), 1)
    assert [ended(rank) for rank in ranks] == [0, 0], said(run)
    words = said(run)
    assert "step 7 skipped: non-finite on rank 1: the output of " in words
    assert "rolled back to checkpoint-00000005.pth, now 0.5 of the learning rate" in words
    metrics = lines(run)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert not any(line["skipped"] for line in metrics)
    assert final_bits(run)["rollbacks"] == 1


@pytest.mark.faults
def test_rolling_back_in_vain_ends_in_words(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert ended(start(run, shards, spoil, 7, 7, (0,), 99)) == 1
    assert "despite 3 roll-backs: try --precision" in said(run)
    other = tmp_path / "other"
    assert (
        ended(start(other, shards, spoil_gradients, 7, 99, on_nonfinite="stop", max_skipped=4)) == 1
    )
    assert "non-finite gradients up to step 10 (4 steps in a row)" in said(other)


def finish_with(run: Path, shards: Path, *prepare: Any, **options: Any) -> None:
    assert ended(start(run, shards, *prepare, **options)) == 0, said(run)


def noted(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- for long


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_soak(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """10,000 steps of a tiny model with interruptions at random; memory, file handles and the run
    folder stay as they were. (It keeps the newest checkpoints; those that ``--saveckp_freq`` keeps
    for good are meant to become more.)"""
    steps, run, rng = 10_000, tmp_path / "run", random.Random(3)
    options = {"epochs": steps // 5, "saveckp_freq": steps, "log_every": 100}
    seen: list[tuple[int, int, int, int]] = []  # step, MiB, handles, bytes
    interruptions = 0
    while True:
        process = start(run, shards, **options)
        end = time.monotonic() + rng.uniform(3, 25)
        while process.is_alive() and time.monotonic() < end:
            process.join(1)
            with contextlib.suppress(OSError, ValueError, IndexError):
                seen.append((steps_done(run), *footprint(process.pid), size_of(run)))
        if not process.is_alive():
            break
        interruptions += 1
        os.kill(process.pid, rng.choice([signal.SIGTERM, signal.SIGKILL]))
        process.join()
    assert ended(process) == 0, said(run)
    late = [line for line in seen if line[0] > steps // 10]
    quarter = len(late) // 4
    early, last = late[:quarter], late[-quarter:]
    with capsys.disabled():
        print(f"\n{steps} steps, {interruptions} interruptions; first and last quarter:")
        for name, column in (("MiB", 1), ("handles", 2), ("bytes of the run folder", 3)):
            values = [max(line[column] for line in part) for part in (early, last)]
            print(f"  {name}: {values[0]} -> {values[1]}")
    for column, slack in ((1, 1.1), (2, 1.2), (3, 1.35)):
        before, after = (max(line[column] for line in part) for part in (early, last))
        assert after <= slack * before, (column, before, after)
    assert [line["step"] for line in lines(run)] == list(range(100, steps + 1, 100))


def footprint(pid: int) -> tuple[int, int]:
    """(MiB in memory, open files) of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024  # type: ignore[index]
    return resident, len(os.listdir(f"/proc/{pid}/fd"))


def size_of(run: Path) -> int:
    """Bytes in a run folder."""
    return sum(path.stat().st_size for path in run.rglob("*"))
