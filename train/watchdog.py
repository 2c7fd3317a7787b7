"""Reports where a run hangs: rank, phase, and the stacks of all threads.

The step needs no instrumentation: the phase is read off the main thread's stack, from outside,
once no step has finished for a while. Each rank's watchdog writes a report into the run folder, and
the first to look identifies the ranks for which the others wait, or whose report is missing.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import FrameType

from xcit_dino.errors import warn
from xcit_dino.train.distributed import dist

FOLDER = "stalls"
# innermost known frame: (end of the file name, function or "") -> phase
PHASES = (
    (("torch/distributed/", ""), "collective"),
    (("train/distributed/dist.py", ""), "collective"),
    (("train/distributed/sync_batchnorm.py", ""), "collective"),
    (("train/signals.py", "result"), "collective"),
    (("torch/autograd/", "backward"), "backward"),
    (("torch/_tensor.py", "backward"), "backward"),
    (("data/loader.py", ""), "data"),
    (("data/workers.py", ""), "data"),
    (("torch/utils/data/", ""), "data"),
    (("train/state.py", ""), "checkpoint"),
    (("train/async_copy.py", ""), "checkpoint"),
    (("train/optim.py", ""), "optimizer"),
    (("train/evaluation.py", ""), "evaluation"),
    (("supervised/validation.py", ""), "evaluation"),
    (("", "train_step"), "forward"),
)
EVALUATIONS = ("train/evaluation.py", "supervised/validation.py")


class Watchdog(AbstractContextManager):
    """Monitors the steps of this process from a thread, as a context manager.

    Args:
        folder: of the run; reports and stacks go into its ``stalls/``.
        minutes: time without a step after which the run counts as hanging; 0 disables it.
        abort: end the process after the same time again (unless it evaluates, which may take long),
        so
            that its launcher can restart the run.
    """

    def __init__(self, folder: Path, minutes: float, abort: bool = False):
        self.folder = folder / FOLDER
        self.seconds = 60 * minutes
        self.abort = abort
        self.step = 0
        self.at = time.monotonic()
        self.main = threading.main_thread().ident
        self.leaving = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.seconds:
            self._arm()  # here, as the thread may not get that far before a hang
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.seconds:
            self.leaving.set()
            self.thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self, step: int) -> None:
        """To be called after each step."""
        self.step, self.at = step, time.monotonic()

    def phase(self) -> str:
        """Phase of the main thread."""
        return phase_of(sys._current_frames().get(self.main or 0))

    def evaluates(self) -> bool:
        """Whether the main thread is inside an evaluation, at any depth."""
        return is_evaluation(sys._current_frames().get(self.main or 0))

    def _watch(self) -> None:
        reported = None  # the step after which it hung
        while not self.leaving.wait(min(5.0, self.seconds / 10)):
            self._arm()
            silent = time.monotonic() - self.at
            if silent > self.seconds and reported != self.step:
                reported = self.step
                self._report(silent)
            if self.abort and silent > 2 * self.seconds and not self.evaluates():
                warn(f"rank {dist.rank()} ends itself: no step for {silent:.0f} s")
                os._exit(1)

    def _arm(self) -> None:
        """A timer outside of Python, repeatedly postponed: it fires in a hang that holds
        Python's GIL, which also blocks the watchdog thread."""
        faulthandler.dump_traceback_later(
            2 * self.seconds, exit=self.abort, file=sys.__stderr__ or sys.stderr
        )

    def _report(self, silent: float) -> None:
        """Write this rank's report, then print what is known of all ranks."""
        rank, phase = dist.rank(), self.phase()
        place = self.folder / f"step-{self.step:08d}"
        facts = {"rank": rank, "phase": phase, "host": socket.gethostname(), "pid": os.getpid()}
        with suppress(OSError):  # a full disk may be the cause of the hang
            place.mkdir(parents=True, exist_ok=True)
            with open(place / f"rank-{rank}.txt", "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            (place / f"rank-{rank}.json").write_text(json.dumps(facts))
        warn(
            f"no step for {silent:.0f} s after step {self.step}: rank {rank} on {facts['host']} is "
            f"in: {phase}; stacks in {place}"
        )
        if dist.world_size() > 1 and not self.leaving.wait(self.seconds / 5):
            warn(f"after step {self.step}, {'; '.join(blamed(place, dist.world_size()))}")


def phase_of(frame: FrameType | None) -> str:
    """Phase of a thread, from the innermost known frame."""
    for file, function in stack_of(frame):
        for (part, name), phase in PHASES:
            if part in file and name in ("", function):
                return phase
    return "between steps"


def is_evaluation(frame: FrameType | None) -> bool:
    """Whether a thread's stack passes through an evaluation."""
    return any(file.endswith(EVALUATIONS) for file, _ in stack_of(frame))


def stack_of(frame: FrameType | None) -> Iterator[tuple[str, str]]:
    """(file, function), innermost first."""
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_code.co_name
        frame = frame.f_back


def blamed(place: Path, ranks: int) -> list[str]:
    """The ranks that the others wait for: those without a report, and those that wait for no rank.

    A rank in ``collective`` or ``backward`` (which exchanges gradients) waits for others.
    """
    found = {}
    for path in place.glob("rank-*.json"):
        with suppress(OSError, ValueError):
            facts = json.loads(path.read_text())
            found[facts["rank"]] = facts
    lines = [f"rank {r} does not respond (stopped, or its machine is down)"
             for r in range(ranks) if r not in found]  # fmt: skip
    for rank, facts in sorted(found.items()):
        if facts["phase"] not in ("collective", "backward"):
            lines.append(f"rank {rank} on {facts['host']} is in: {facts['phase']}")
    return lines or ["all ranks wait for one another: network?"]
