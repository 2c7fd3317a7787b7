"""Training commands pinned to a core each and measured in processor time: on a quiet machine that
is the wall-clock time of one core, and what else runs on the machine does not shorten it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import psutil

COMMAND = (sys.executable, "-m", "xcit_dino.cli")
TRIED = (20, 80)  # steps of two short runs: their difference is free of the start-up


def processor_seconds(process: psutil.Process) -> float:
    """Of a process and all its children, living and dead."""
    try:
        family = [process, *process.children(recursive=True)]
        times = [member.cpu_times() for member in family]
    except psutil.NoSuchProcess:
        return 0.0
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)


def start(words: list[str], core: int, log: Path) -> psutil.Popen:
    """Start a command of xcit-dino with one thread on a core."""
    output = open(log, "a")
    return psutil.Popen(
        ["taskset", "-c", str(core), *COMMAND, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=output, stderr=output,
    )  # fmt: skip


def wait(process: psutil.Popen) -> float:
    """Processor seconds of a command that was started, once it ends well."""
    took = 0.0
    while process.poll() is None:
        took = max(took, processor_seconds(process))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(process.args)}")
    return took


def steps_per_epoch(run: Path) -> float:
    """Of a short run."""
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(logged) if "epoch" in line)
    return last["step"] / last["epoch"]


def epoch_seconds(run: Path, took: list[float]) -> float:
    """Processor seconds of an epoch, from what two short runs of ``TRIED`` steps took, of which the
    second continued the first."""
    return (took[1] - took[0]) / (TRIED[1] - 2 * TRIED[0]) * steps_per_epoch(run)
