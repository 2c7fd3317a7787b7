"""``launch status | logs | cancel RUN``."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

from xcit_dino.slurm import record, scheduler


def owner(run: Path) -> str:
    """Who is at work in a run folder, in words; '' when nobody is."""
    if not (record.folder(run) / "launch.json").is_file():
        return ""
    launch = record.read_launch(run)
    if launch["cluster"] == "slurm":
        alive = scheduler.queue([s["job_id"] for s in launch["stages"].values() if s["job_id"]])
        return next((f"SLURM job {job_id} ({job['state']})" for job_id, job in alive.items()), "")
    if launch["host"] == socket.gethostname() and record.host_alive(
        launch["pid"], launch["pid_start"]
    ):
        return f"process {launch['pid']} on {launch['host']}"
    return ""
