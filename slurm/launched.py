"""``RUN/launch/launch.json``: what was launched in a run folder, and whether it was cancelled."""

from __future__ import annotations

import glob
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from xcit_dino.errors import InputError
from xcit_dino.files import write_atomic
from xcit_dino.provenance import now

PROC = Path("/proc")


def folder(run: Path) -> Path:
    """The folder of a run's launcher files."""
    return run / "launch"


def write_launch(run: Path, launch: dict[str, Any]) -> None:
    """Write the record of a launch: cluster, host, code, stages with job ids and configs, and in
    ``earlier`` the stages of previous launches."""
    write_atomic(folder(run) / "launch.json", json.dumps(launch, indent=1) + "\n")


def is_launched(run: Path) -> bool:
    """Whether a folder is the run folder of a launch."""
    return (folder(run) / "launch.json").is_file()


def seed_of(run: Path) -> str:
    """The text after ``-seed`` in a run folder's name."""
    return run.name.rpartition("-seed")[2]


def read_launch(run: Path) -> dict[str, Any]:
    """Read the record of the last launch in a run folder.

    Raises:
        InputError: nothing was launched there.
    """
    if not is_launched(run):
        seeds = ", ".join(map(str, seed_runs(run)))
        raise InputError(
            f"{run}: not a run folder of the launcher (no launch/launch.json)"
            + (f"; there are {seeds}" if seeds else "")
        )
    return json.loads((folder(run) / "launch.json").read_text())


def all_stages(launch: dict[str, Any]) -> dict[str, Any]:
    """Stages of previous launches, then of this one."""
    return launch.get("earlier", {}) | launch["stages"]


def seed_runs(run: Path) -> list[Path]:
    """The runs ``RUN-seed0``, ``RUN-seed1`` ... of ``--seeds``, if ``run`` itself is not a run."""
    if is_launched(run):
        return []
    found = (p for p in run.parent.glob(f"{glob.escape(run.name)}-seed*") if is_launched(p))
    return sorted((p for p in found if seed_of(p).isdigit()), key=lambda p: int(seed_of(p)))


def cancel(run: Path) -> None:
    """Prevent this run's jobs from starting or restarting."""
    write_atomic(folder(run) / "cancelled", now() + "\n")


def cancelled(run: Path) -> bool:
    """Whether :func:`cancel` was called since the last submission."""
    return (folder(run) / "cancelled").is_file()


def clear_cancel(run: Path) -> None:
    """Undo :func:`cancel`."""
    (folder(run) / "cancelled").unlink(missing_ok=True)


def process_start_time(pid: int | None = None) -> str:
    """Start time of a process in clock ticks since boot, or without /proc (macOS) as `ps` prints
    it; '' if there is none. With the pid it identifies a process, as pids are reused."""
    pid = pid or os.getpid()
    if not (PROC / "self").exists():
        line = ["ps", "-o", "lstart=", "-p", str(pid)]
        return subprocess.run(line, capture_output=True, text=True).stdout.strip()
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]
