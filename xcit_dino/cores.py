"""How many cores this process may use: its affinity, and the quota of its container."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """At least 1. A container with a quota of 2 cores sees all of its host's in the affinity."""
    quota = cgroup_quota()
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def cgroup_quota(root: Path = CGROUPS, own: Path = OWN) -> float | None:
    """Cores that the control groups of this process allow, the tightest of them; None: no limit.

    Version 2: ``cpu.max`` of the group and of those above it; version 1: ``cpu.cfs_quota_us``.
    """
    found = []
    for folder in _groups(root, own):
        try:
            if (folder / "cpu.max").is_file():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text().strip()
                period = (folder / "cpu.cfs_period_us").read_text()
            if quota not in ("max", "-1"):
                found.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return min(found, default=None)


def _groups(root: Path, own: Path) -> list[Path]:
    """Folders of this process's groups, and those above them; inside a container its own group is
    the root."""
    folders = [root, root / "cpu", root / "cpu,cpuacct"]
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base = root if not controllers else root / controllers
        if not controllers or "cpu" in controllers.split(","):
            place = base / path.strip("/")
            folders += [place, *(above for above in place.parents if above.is_relative_to(base))]
    return folders
