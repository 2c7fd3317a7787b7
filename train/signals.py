"""Coordinated stop between two steps: signals set a flag, ranks agree, the loop saves and exits.

A signal reaches the ranks at different times, or only one of them. Every rank therefore brings
its flag to a tiny all-reduce each step; any rank that received a signal stops all of them after the
same step.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a job installs its handlers before it spends seconds on importing torch
    import torch.distributed as dist

TOGETHER = 0.5  # seconds
SAVE, STOP = 1, 2  # votes; stopping includes saving
_reason: str | None = None


def request(reason: str) -> None:
    """Request this process to stop after the current step."""
    global _reason
    _reason = _reason or reason


def clear() -> None:
    """Forget an earlier request (a new run in the same process)."""
    global _reason
    _reason = None


def requested() -> str | None:
    """Reason of the stop request, or None."""
    return _reason


def install(*signals: signal.Signals) -> None:
    """Let signals request a stop; a second one of the same kind exits at once.

    Ctrl-C in a terminal reaches a rank from the terminal and from torchrun: repeats that follow
    within ``TOGETHER`` seconds are the same request.
    """
    heard: dict[int, float] = {}

    def handler(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now > heard.setdefault(number, now) + TOGETHER:
            os._exit(128 + number)
        request(signal.Signals(number).name)

    for number in signals:
        signal.signal(number, handler)


class Vote:
    """Votes of all ranks, combined while the step runs: the maximum counts.

    ``cast`` starts the all-reduce at the beginning of a step and ``result`` reads it at the end, so
    that the vote costs no waiting. It runs on CPU tensors (gloo) and never touches the GPU.
    """

    def __init__(self) -> None:
        import torch

        self.flag = torch.zeros((), dtype=torch.int32)
        self.work: dist.Work | None = None

    def cast(self, save: bool = False) -> None:
        """Begin; ``save``: a checkpoint is overdue on this rank."""
        import torch.distributed as dist

        self.flag.fill_(STOP if _reason is not None else SAVE if save else 0)
        if dist.is_initialized():
            self.work = dist.all_reduce(self.flag, dist.ReduceOp.MAX, async_op=True)

    def result(self) -> int:
        """STOP, SAVE or 0, the same on all ranks: the votes at the time of :meth:`cast`."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return int(self.flag)
