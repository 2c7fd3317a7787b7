"""Show a run's logs and progress while it runs."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from xcit_dino.progress import RichBar
from xcit_dino.slurm import attempts

POLL = 0.2  # seconds


def show(run: Path, stage: str, job_id: str, active: Callable[[], bool], rank: int = 0) -> None:
    """Print a rank's log while ``active()`` holds; on a terminal with the stage's progress bar."""
    tails = [(Tail(log_path(run, job_id, rank, kind)), out) for kind, out in streams()]
    bar = LiveBar(attempts.progress_file(run, stage)) if sys.stderr.isatty() else None
    with bar or contextlib.nullcontext():
        last = False
        while True:
            for tail, out in tails:
                for line in tail:
                    if not (bar and bar.shows(line)):
                        print(line, file=out, flush=True)
            if bar:
                bar.refresh()
            if last:
                return
            last = not active()
            time.sleep(0 if last else POLL)


def streams() -> list[tuple[str, TextIO]]:
    """(kind of log, stream to which it is printed)."""
    return [("out", sys.stdout), ("err", sys.stderr)]


def log_path(run: Path, job_id: str, rank: int, kind: str) -> Path:
    """Path of a rank's log, as named by submitit."""
    return attempts.job_folder(run, job_id) / f"{job_id}_{rank}_log.{kind}"


class Tail:
    """Iterating yields the complete lines added to a file since the last iteration; all lines if
    the file has become shorter."""

    def __init__(self, path: Path):
        self.path, self.position = path, 0

    def __iter__(self) -> Iterator[str]:
        if not self.path.is_file():
            return
        with open(self.path, "rb") as file:
            if self.path.stat().st_size < self.position:
                self.position = 0
            file.seek(self.position)
            content = file.read()
        whole = content.rpartition(b"\n")[0]
        if not whole:
            return
        self.position += len(whole) + 1
        for line in whole.decode(errors="replace").split("\n"):
            if not line.startswith("submitit "):  # submitit's own messages are not shown
                yield line


class LiveBar:
    """A job's published progress (see :mod:`xcit_dino.progress`) as a bar on this terminal."""

    def __init__(self, path: Path):
        self.path = path
        self.bar: RichBar | None = None
        self.key: tuple[Any, ...] = ()
        self.label = ""

    def __enter__(self) -> LiveBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.__exit__()

    def shows(self, line: str) -> bool:
        """Whether a log line merely repeats this bar."""
        return bool(self.label) and line.startswith(f"{self.label}: ")

    def refresh(self) -> None:
        """Read the job's newest progress and draw it."""
        state = read_state(self.path)
        if state is None:
            return
        key = (state["label"], state["start"], state["total"])
        if key != self.key:
            self.__exit__()
            self.key, self.label = key, state["label"]
            self.bar = RichBar(state["label"], state["total"], state["start"]).__enter__()
        assert self.bar is not None
        self.bar.move_to(state["done"], state["shown"])


def read_state(path: Path) -> dict[str, Any] | None:
    """The newest published progress, or None."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
