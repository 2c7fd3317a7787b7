"""What may befall a run, done to real ones: nothing is lost.

``make faults`` (``-m faults``) does it many times; the rest runs with every ``make test``.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import victims
from tests.victims import (
    STEPS,
    at_step,
    clock_back,
    ended,
    fill,
    final_bits,
    limit_memory,
    lines,
    said,
    same,
    sleep_with_the_interpreters_lock,
    spoil,
    spoil_gradients,
    start,
    steps_done,
    wait_for,
    without_privilege,
)
from xcit_dino.data.config import DemoConfig
from xcit_dino.data.demo import make
from xcit_dino.errors import InputError
from xcit_dino.ssl.pretrain import pretrain

OFTEN = {"checkpoint_minutes": 1e-9}  # a checkpoint after every step


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make(DemoConfig(folder, train=20, val=10, size=16))
    return folder


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing befell."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert ended(start(folder, shards)) == 0, said(folder)
    return folder


def assert_nothing_lost(run: Path, whole: Path) -> None:
    """The weights are equal bit for bit, every step is in the metrics once, with the same loss."""
    assert same(final_bits(run), final_bits(whole))
    found, expected = lines(run), lines(whole)
    assert [line["step"] for line in found] == list(range(1, len(expected) + 1))
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]
    left = [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not left


def finish(run: Path, shards: Path, **options: Any) -> None:
    assert ended(start(run, shards, **options)) == 0, said(run)


# -- kill -9


def where(run: Path) -> str:
    """What a stopped victim was doing."""
    if list((run / "checkpoints").glob(".checkpoint-*.tmp")):
        return "in a checkpoint write"
    done = steps_done(run)
    return "at the start" if not done else "at an epoch's end" if done % 5 == 0 else "in a step"


def kill_at_random(
    folder: Path, shards: Path, whole: Path, kills: int, seed: int, **options: Any
) -> Counter[str]:
    """Kill runs until so many kills have happened; each run that comes to its end is compared.

    Half of the moments are anywhere between start and end, half soon after a random step.
    """
    rng, places = random.Random(seed), Counter[str]()
    began = time.monotonic()
    finish(folder / "timed", shards, **OFTEN, **options)
    duration = time.monotonic() - began
    for number in range(kills):  # at most one run a kill
        run = folder / f"run-{number}"
        while True:
            process = start(run, shards, **OFTEN, **options)
            if places.total() == kills:
                break
            if rng.random() < 0.5:
                process.join(rng.uniform(0.05, 1) * duration)
            else:
                step = steps_done(run) + rng.randint(1, 8)
                while process.is_alive() and steps_done(run) < step:
                    time.sleep(0.001)
                process.join(rng.uniform(0, 0.05) * duration)
            if not process.is_alive():
                break
            os.kill(process.pid, signal.SIGSTOP)
            places[where(run)] += 1
            process.kill()
            process.join()
        assert ended(process) == 0, said(run)
        assert_nothing_lost(run, whole)
        if places.total() == kills:
            break
    return places


def test_killed_at_random_moments(shards: Path, whole: Path, tmp_path: Path) -> None:
    assert kill_at_random(tmp_path, shards, whole, kills=4, seed=1).total() == 4


@pytest.mark.faults
@pytest.mark.parametrize("workers", [0, 1])
def test_killed_at_fifty_random_moments(
    workers: int, shards: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = kill_at_random(tmp_path, shards, whole, 50, seed=2 + workers, num_workers=workers)
    with capsys.disabled():
        print(f"\n50 kills, {workers} workers: {dict(places)}")
    assert places.total() == 50 and len(places) >= 3


def die_in_write(number: int) -> None:
    """Let this process kill itself before the n-th call by which a checkpoint reaches the disk."""
    from xcit_dino.train import state

    left = [number]

    def counted(call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    inner = state.Checkpoints._write

    def write(*args: Any) -> None:
        names = [(os, "fsync"), (os, "replace"), (Path, "unlink"), (os, "open")]
        before = [(place, name, getattr(place, name)) for place, name in names]
        for place, name, call in before:
            setattr(place, name, counted(call))
        try:
            inner(*args)
        finally:
            for place, name, call in before:
                setattr(place, name, call)

    state.Checkpoints._write = write


@pytest.mark.faults
def test_killed_before_each_call_of_a_checkpoint_write(
    shards: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third checkpoint is the first that drops an old one: 40 calls reach beyond it."""
    for number in range(1, 41):
        run = tmp_path / f"call-{number}"
        assert ended(start(run, shards, die_in_write, number, **OFTEN)) == -signal.SIGKILL
        finish(run, shards, **OFTEN)
        assert_nothing_lost(run, whole)
    with capsys.disabled():
        print("\n40 kills, one before each call of the first checkpoint writes")


# -- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for three checkpoints: two that stay and one being written."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(small_disk: Path, shards: Path, whole: Path) -> None:
    """Filled during the run: it trains on to its end, says so, keeps the checkpoint that is there;
    with room again, the same command goes on from it."""
    run, filler = small_disk / "run", small_disk / "filler"
    full = start(run, shards, at_step, 7, fill, filler)
    assert ended(full) == 1
    words = said(run)
    assert "No space left on device" in words and "training goes on" in words
    assert "checkpoint-00000005.pth is intact" in words
    assert steps_reached(words) == STEPS
    filler.unlink()
    finish(run, shards)
    assert_nothing_lost(run, whole)


def steps_reached(words: str) -> int:
    """The last step on the progress lines."""
    return int(re.findall(r"pretraining: (\d+)/", words)[-1])


@pytest.mark.faults
def test_full_disk_for_a_while(small_disk: Path, shards: Path, whole: Path) -> None:
    """Room comes back during the run: it ends well, and no line of the metrics is missing."""
    run, filler = small_disk / "run", small_disk / "filler"
    process = start(run, shards, full_between, 7, 12, filler)
    assert ended(process) == 0 and "No space left on device" in said(run)
    assert_nothing_lost(run, whole)


def full_between(first: int, last: int, filler: Path) -> None:
    at_step(first, victims.fill, filler)
    at_step(last, filler.unlink)


def test_permission_lost(shards: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = run / "checkpoints"
    assert ended(start(run, shards, without_privilege, 7, folder, 0o555)) == 1
    words = said(run)
    assert "Permission denied" in words and "checkpoint-00000005.pth is intact" in words
    folder.chmod(0o755)
    finish(run, shards)
    assert_nothing_lost(run, whole)


@pytest.mark.faults
def test_read_only_folder_is_named(small_disk: Path, shards: Path) -> None:
    (small_disk / "run").mkdir()
    log = small_disk / "run.log"
    log.touch()
    remount = ["mount", "-o", "remount", str(small_disk)]
    subprocess.run([*remount[:2], "remount,ro", str(small_disk)], check=True)
    try:
        with pytest.raises(InputError, match="--output_dir .*Read-only file system"):
            pretrain(victims.config(shards, small_disk / "run"))
    finally:
        subprocess.run([*remount[:2], "remount,rw", str(small_disk)], check=True)


# -- data that change, clocks that step back


def test_shards_changed_under_a_run(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "shards"
    shutil.copytree(shards, mine)
    run = tmp_path / "run"
    pretrain(victims.config(mine, run, max_steps=1))
    shard = next((mine / "train").glob("*.tar"))
    os.truncate(shard, shard.stat().st_size - 512)
    pretrain(victims.config(mine, run, max_steps=2))
    assert re.search(
        r"WARNING: --data_path: .*tar has [\d,]+ bytes and had", capsys.readouterr().err
    )
    make(DemoConfig(mine, train=20, val=10, size=16, seed=1))
    with pytest.raises(InputError, match="--data_path: the shards changed under this run"):
        pretrain(victims.config(mine, run))


@pytest.mark.faults
def test_clock_that_steps_back(shards: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert ended(start(run, shards, at_step, 3, clock_back, 1e6, max_steps=7, **OFTEN)) == 1
    for path in run.rglob("*"):  # all files are from the future
        os.utime(path, (time.time() + 1e6,) * 2)
    assert ended(start(run, shards, at_step, 9, clock_back, -1e6, max_steps=14, **OFTEN)) == 1
    finish(run, shards, **OFTEN)
    assert_nothing_lost(run, whole)


# -- others on the same folder, signals


def test_second_process_is_refused(shards: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = start(run, shards, at_step, 3, pause, tmp_path / "go")
    wait_for(lambda: steps_done(run) >= 1)
    assert ended(start(run, shards)) == 2
    (tmp_path / "go").touch()
    who = f"is in use by process {first.pid} on {socket.gethostname()}, since 20"
    assert who in said(run)
    assert ended(first) == 0
    assert_nothing_lost(run, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_saves_second_leaves(
    number: signal.Signals, shards: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(run, shards, at_step, 3, pause, tmp_path / "go")
    wait_for(lambda: steps_done(run) >= 2)
    os.kill(process.pid, number)
    os.kill(process.pid, number)  # the same keystroke, by way of torchrun
    (tmp_path / "go").touch()
    assert ended(process) == 1
    assert f"{number.name} after step 3; the same command" in said(run)
    process = start(run, shards, at_step, 5, pause, tmp_path / "never")
    wait_for(lambda: steps_done(run) >= 4)
    os.kill(process.pid, number)
    time.sleep(0.7)
    os.kill(process.pid, number)
    assert ended(process) == 128 + number
    finish(run, shards)
    assert_nothing_lost(run, whole)


def pause(until: Path) -> None:
    """Wait for a file."""
    wait_for(until.exists, 500)


# -- memory, workers, ranks


def test_out_of_memory_in_a_step(shards: Path, tmp_path: Path) -> None:
    """The data need no memory of their own once the first step is done; the step does."""
    run = tmp_path / "run"
    options = {"global_crops_size": 96, "batch_size_per_gpu": 10}
    assert ended(start(run, shards, at_step, 2, limit_memory, **options)) == 1
    words = said(run)
    assert "out of memory in step 2 on rank 0: weights, gradients" in words
    assert "Take --batch_size_per_gpu 5 --accum_iter 2: the same run goes on" in words


def test_worker_killed(shards: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert ended(start(run, shards, at_step, 7, kill_workers, num_workers=1)) == 0
    assert "starting new workers at step" in said(run)
    assert_nothing_lost(run, whole)


def kill_workers() -> None:
    """SIGKILL, as the kernel does where memory runs out."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)


def two_ranks(run: Path, shards: Path, *prepare: Any, **options: Any) -> list[Any]:
    """A run of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start(
            run, shards, *prepare, batch_size_per_gpu=2, **options,
            env={"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(port)},
        )
        for rank in range(2)
    ]  # fmt: skip


def test_rank_that_hangs_is_named(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = two_ranks(run, shards, watchdog_minutes=1 / 60)
    wait_for(lambda: steps_done(run) >= 3)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    wait_for(lambda: "does not answer" in said(run))
    os.kill(ranks[1].pid, signal.SIGCONT)
    assert [ended(rank) for rank in ranks] == [0, 0]
    words = said(run)
    assert re.search(
        r"no step for \d s after step \d+: rank 0 on \S+ is in: (backward|coll)", words
    )
    assert "rank 1 does not answer (stopped, or its machine is gone)" in words
    (stacks,) = list((run / "stalls").glob("*/rank-0.txt"))[:1]
    assert "in train_step" in stacks.read_text()


@pytest.mark.faults
def test_hang_that_keeps_the_interpreters_lock(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = {"watchdog_minutes": 1 / 60, "on_stall": "abort"}
    frozen = start(run, shards, at_step, 4, sleep_with_the_interpreters_lock, 30, **options)
    assert ended(frozen, 60) == 1
    assert "Timeout (0:00:02)!" in said(run) and "sleep_with_the_interpreters_lock" in said(run)


@pytest.mark.faults
def test_stalled_process_ends_itself(shards: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = {"watchdog_minutes": 1 / 60, "on_stall": "abort"}
    assert ended(start(run, shards, at_step, 7, time.sleep, 60, **options), 60) == 1
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
    assert "step 3 skipped: not finite on rank 0: the gradient of student.head" in said(run)


def test_spoilt_state_is_rolled_back_with_a_lower_rate(shards: Path, tmp_path: Path) -> None:
    """Infinite activations spoil batch-norm's statistics: there is no going on from there. On two
    ranks, of which one sees them."""
    run = tmp_path / "run"
    ranks = two_ranks(run, shards, spoil, 7, 9, (1,), 1)
    assert [ended(rank) for rank in ranks] == [0, 0], said(run)
    words = said(run)
    assert "step 7 skipped: not finite on rank 1: the output of " in words
    assert "back to checkpoint-00000005.pth, on with 0.5 of the learning rate" in words
    metrics = lines(run)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert not any(line["skipped"] for line in metrics)
    assert final_bits(run)["rollbacks"] == 1


@pytest.mark.faults
def test_rolling_back_in_vain_ends_in_words(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert ended(start(run, shards, spoil, 7, 7, (0,), 99)) == 1
    assert "in spite of 3 roll-backs: try --precision" in said(run)
    other = tmp_path / "other"
    assert (
        ended(start(other, shards, spoil_gradients, 7, 99, on_nonfinite="stop", max_skipped=4)) == 1
    )
    assert "gradients were not finite up to step 10 (4 steps in a row)" in said(other)


def finish_with(run: Path, shards: Path, *prepare: Any, **options: Any) -> None:
    assert ended(start(run, shards, *prepare, **options)) == 0, said(run)


def noted(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- for long


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_soak(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """10,000 steps of a tiny model with interruptions at random; memory, file handles and the
    folder of checkpoints stay as they were."""
    steps, run, rng = 10_000, tmp_path / "run", random.Random(3)
    options = {"epochs": steps // 5, "log_every": 100, "checkpoint_minutes": 0.1}
    seen: list[tuple[int, int, int, int]] = []  # step, KiB, handles, bytes
    interruptions = 0
    while True:
        process = start(run, shards, **options)
        end = time.monotonic() + rng.uniform(10, 60)
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
        for name, column in (("MiB", 1), ("handles", 2), ("bytes of checkpoints", 3)):
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
    """Bytes in the folder of checkpoints."""
    return sum(path.stat().st_size for path in (run / "checkpoints").iterdir())
