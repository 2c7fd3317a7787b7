"""Log files of a run, written during training; read and written without torch.

``metrics.jsonl``: one line every ``--log_every`` steps and at evaluations, one curve over all
attempts. ``tries.jsonl``: how each attempt started (step, processes, commit, versions, hardware)
and ended; for an attempt that was killed, the next one adds the end.
"""

from __future__ import annotations

import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xcit_dino.errors import warn
from xcit_dino.files import write_atomic
from xcit_dino.provenance import now, provenance

READ = time.monotonic()  # when this file was

METRICS, TRIES = "metrics.jsonl", "tries.jsonl"
Line = dict[str, Any]


def read_metrics(folder: Path) -> list[Line]:
    """Lines of ``metrics.jsonl``, in order; incomplete ones are skipped."""
    return read_lines(folder / METRICS)


def read_tries(folder: Path) -> list[Line]:
    """Lines of ``tries.jsonl``: ``event`` is ``start`` or ``end``."""
    return read_lines(folder / TRIES)


def read_lines(path: Path) -> list[Line]:
    """The JSON objects of a file, one per line; none if there is no file."""
    if not path.is_file():
        return []
    lines = []
    *whole, last = path.read_text(errors="replace").split("\n")
    for text in filter(None, whole):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            warnings.warn(f"{path}: skipped a damaged line", stacklevel=3)
    return lines if not last else lines + complete(last)


def complete(text: str) -> list[Line]:
    """The last line of a file that is being written, if complete."""
    try:
        return [json.loads(text)]
    except json.JSONDecodeError:
        return []


class RunFiles:
    """Writes the two files for one attempt.

    Lines written by earlier attempts after ``step`` are dropped: this attempt writes them again.

    Args:
        folder: of the run.
        step: steps done when this attempt starts.
        facts: of the attempt: ``total_steps``, ``processes``, ``global_batch``.
    """

    def __init__(self, folder: Path, step: int, facts: Line):
        self.folder = folder
        before = read_metrics(folder)
        tries = read_tries(folder)
        if tries and tries[-1]["event"] == "start":
            seen = before[-1] if before else tries[-1]
            self.note("end", step=seen["step"], time=seen.get("time"), reason="no word: killed")
        kept = [line for line in before if line["step"] <= step]
        write_atomic(folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(folder / METRICS, "ab", buffering=0)
        self.unwritten = b""
        self.note("start", step=step, host=socket.gethostname(), **facts, **provenance())

    def note(self, event: str, **facts: Any) -> None:
        """Add a line to ``tries.jsonl``."""
        line = {"event": event, "time": now()} | facts
        with tolerated(self.folder / TRIES), open(self.folder / TRIES, "a") as file:
            file.write(json.dumps(line) + "\n")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a line to ``metrics.jsonl``; what a full disk refuses is retried later."""
        self.unwritten += json.dumps({"step": step, "time": now(), **values}).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Write pending lines to the file, as far as possible."""
        with tolerated(self.folder / METRICS):
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def close(self, step: int, reason: str) -> None:
        """Record the end of the attempt after ``step``."""
        self.flush()
        self.file.close()
        self.note("end", step=step, reason=reason)


@contextmanager
def tolerated(path: Path) -> Iterator[None]:
    """Turn a failed write into a warning: it must not end a training."""
    try:
        yield
    except OSError as error:
        warn(f"{path}: {error.strerror}; training continues")


def process_seconds() -> float:
    """Seconds since this process was started; without /proc (macOS) since it read this file."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return time.monotonic() - READ
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
