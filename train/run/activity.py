"""Whether a run is active, from its folder alone: the record of its attempts, and the heartbeat of
its owner (:mod:`xcit_dino.train.run.lock`). Read without torch and without taking the lock."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from xcit_dino.progress import clock
from xcit_dino.train.run.folder import LOCK
from xcit_dino.train.run.metrics import Line

WATCH = 35.0  # seconds without a heartbeat after which an owner is considered dead
STALE = 600.0  # seconds without a logged line that are worth a warning


@dataclass(frozen=True)
class Activity:
    """What a run is doing."""

    state: Literal["new", "running", "dead", "ended", "unknown"]
    text: str
    """The same in words; "" for a run that has not started."""
    stale: bool = False
    """Whether nothing has been logged for long, though it has not ended."""


def activity(folder: Path, tries: Sequence[Line], lines: Sequence[Line]) -> Activity:
    """Whether a run is active, has ended, or was killed.

    Args:
        folder: of the run.
        tries: lines of ``tries.jsonl``.
        lines: lines of ``metrics.jsonl``.
    """
    if not tries:
        return Activity("new", "")
    last = tries[-1]
    if last["event"] == "end":
        return Activity("ended", f"ended at step {last['step']:,}: {last.get('reason', '')}")
    owner, silence = heartbeat(folder)
    at = next((line for line in reversed(lines) if "step" in line), last)
    where = f"step {at['step']:,} of {last.get('total_steps', 0):,}"
    ago = since(next((line["time"] for line in (*reversed(lines), last) if "time" in line), None))
    logged = where if ago is None else f"{where}, last update {clock(ago)} ago"
    stale = ago is not None and ago > STALE
    if not owner:
        text = f"active, or was killed: the folder does not record which ({logged})"
        return Activity("unknown", text, stale)
    who = f"process {owner.get('pid')} on {owner.get('host')}"
    if silence > WATCH:
        text = f"not active: no heartbeat of {who} for {clock(silence)} ({logged}); it was killed, "
        return Activity("dead", f"{text}or its machine has failed or is suspended", stale)
    note = "; nothing logged for long: evaluating, or hung" if stale else ""
    return Activity("running", f"active: {who}, {logged}{note}", stale)


def heartbeat(folder: Path) -> tuple[dict[str, Any], float]:
    """The owner recorded in a run folder, and the seconds since its last heartbeat; ({}, 0) where
    none is recorded: before the first start, after a clean exit."""
    path = folder / LOCK
    try:
        owner, touched = json.loads(path.read_bytes()), path.stat().st_mtime
    except (OSError, ValueError):
        return {}, 0.0
    return (owner, max(0.0, time.time() - touched)) if isinstance(owner, dict) else ({}, 0.0)


def since(moment: str | None) -> float | None:
    """Seconds since an ISO time, at least 0; None if it is not known."""
    if moment is None:
        return None
    return max(0.0, time.time() - datetime.fromisoformat(moment).timestamp())
