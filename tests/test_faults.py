"""Faults provoked in real runs: nothing is lost.

``make faults`` (``-m faults``) does it many times; the rest runs with every ``make test``.
"""

from __future__ import annotations

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

from tests.victims import (
    FIRST,
    STEPS,
    after_saving,
    assert_nothing_lost,
    at_step,
    clock_back,
    config,
    die_in_write,
    ended,
    fill,
    finish,
    full_between,
    pause,
    said,
    start,
    steps_done,
    wait_for,
    without_privilege,
)
from xcit_dino.data.pack.demo import make
from xcit_dino.data.shards.config import DemoConfig
from xcit_dino.errors import InputError
from xcit_dino.models import checkpoints
from xcit_dino.ssl.pretrain import pretrain

OFTEN = {"checkpoint_minutes": 1e-9}  # a checkpoint after every step


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
    checkpoints.release(folder / "run" / "checkpoints")
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(small_disk: Path, shards: Path, whole: Path, tmp_path: Path) -> None:
    """Filled during the run: it trains on to its end, says so, keeps the checkpoint that is there;
    with room again, the same command goes on from it."""
    run, filler = small_disk / "run", small_disk / "filler"
    Path(f"{run}.log").symlink_to(tmp_path / "run.log")  # so that what it says has room
    first = run / "checkpoints" / FIRST
    full = start(run, shards, at_step, 7, after_saving, first, fill, filler)
    assert ended(full) == 1
    words = said(run)
    assert "No space left on device" in words and "training continues" in words
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
            pretrain(config(shards, small_disk / "run"))
    finally:
        subprocess.run([*remount[:2], "remount,rw", str(small_disk)], check=True)


# -- data that change, clocks that step back


def test_shards_changed_under_a_run(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "shards"
    shutil.copytree(shards, mine)
    run = tmp_path / "run"
    pretrain(config(mine, run, max_steps=1))
    shard = next((mine / "train").glob("*.tar"))
    os.truncate(shard, shard.stat().st_size - 512)
    pretrain(config(mine, run, max_steps=2))
    assert re.search(
        r"WARNING: --data_path: .*tar has [\d,]+ bytes and had", capsys.readouterr().err
    )
    make(DemoConfig(mine, train=20, val=10, size=16, seed=1))
    with pytest.raises(InputError, match="--data_path: the shards changed under this run"):
        pretrain(config(mine, run))


@pytest.mark.faults
def test_clock_that_steps_back(shards: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    back = start(run, shards, at_step, 3, clock_back, 1e6, max_steps=7, **OFTEN)
    assert ended(back) == 0
    for path in run.rglob("*"):  # all files are from the future
        os.utime(path, (time.time() + 1e6,) * 2)
    forward = start(run, shards, at_step, 9, clock_back, -1e6, max_steps=14, **OFTEN)
    assert ended(forward) == 0
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
    wait_for((tmp_path / "go.awaited").exists)
    os.kill(process.pid, number)
    os.kill(process.pid, number)  # the same keystroke, by way of torchrun
    (tmp_path / "go").touch()
    assert ended(process) == 1
    # ranks vote at the beginning of a step: of what is heard in the third, the fourth learns
    assert f"{number.name} after step 4; the same command" in said(run)
    process = start(run, shards, at_step, 6, pause, tmp_path / "never")
    wait_for((tmp_path / "never.awaited").exists)
    os.kill(process.pid, number)
    time.sleep(0.7)
    os.kill(process.pid, number)
    assert ended(process) == 128 + number
    finish(run, shards)
    assert_nothing_lost(run, whole)
