"""Says where a run hangs: which rank, in which phase, with the stacks of all its threads.

Nothing has to be marked in the step: the phase is read off the main thread's stack, from outside,
once no step has finished for a while. Each rank's watchdog writes a report into the run folder, and
the first to look finds the ranks whose report says what the others wait for, or is missing.
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
# innermost frame that says something: (end of the file name, function or "") -> phase
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
    (("train/optim.py", ""), "optimiser"),
    (("train/evaluation.py", ""), "evaluation"),
    (("supervised/validation.py", ""), "evaluation"),
    (("", "train_step"), "forward"),
)
EVALUATIONS = ("train/evaluation.py", "supervised/validation.py")


class Watchdog(AbstractContextManager):
    """Watches the steps of this process from a thread, as a context.

    Args:
        folder: of the run; reports and stacks go into its ``stalls/``.
        minutes: without a step after which the run counts as hanging; 0 switches it off.
        abort: end the process after as long again (unless it evaluates, which may take long), so
            that its launcher can start the run anew.
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
            self._arm()  # here, for the thread may not get that far before a hang
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.seconds:
            self.leaving.set()
            self.thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self, step: int) -> None:
        """A step is done."""
        self.step, self.at = step, time.monotonic()

    def phase(self) -> str:
        """What the main thread is doing."""
        return phase_of(sys._current_frames().get(self.main or 0))

    def evaluates(self) -> bool:
        """Whether the main thread is in an evaluation, however deep: reading its images, say."""
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
        """A timer outside of Python, put off again and again: it goes off in a hang that keeps
        Python's own lock, and so the watching thread too, from getting on."""
        faulthandler.dump_traceback_later(
            2 * self.seconds, exit=self.abort, file=sys.__stderr__ or sys.stderr
        )

    def _report(self, silent: float) -> None:
        """Write down where this rank is, then say what is known of all."""
        rank, phase = dist.rank(), self.phase()
        place = self.folder / f"step-{self.step:08d}"
        facts = {"rank": rank, "phase": phase, "host": socket.gethostname(), "pid": os.getpid()}
        with suppress(OSError):  # a full disk may be why it hangs
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
    """What a thread is doing, from its innermost frame inwards out."""
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
    lines = [f"rank {r} does not answer (stopped, or its machine is gone)"
             for r in range(ranks) if r not in found]  # fmt: skip
    for rank, facts in sorted(found.items()):
        if facts["phase"] not in ("collective", "backward"):
            lines.append(f"rank {rank} on {facts['host']} is in: {facts['phase']}")
    return lines or ["all ranks wait for one another: network?"]
