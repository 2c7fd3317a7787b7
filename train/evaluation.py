"""Evaluations between two steps, after the checkpoint; a failure never ends a training."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from xcit_dino.errors import one_line, warn
from xcit_dino.files import write_atomic
from xcit_dino.train import compiler
from xcit_dino.train.distributed import dist
from xcit_dino.train.run.log import RunLog
from xcit_dino.train.run.metrics import tolerated

MARK = "evaluating.json"  # in the run folder while an evaluation runs
MAX_DEATHS = 2  # process deaths in one evaluation after which it is skipped


class Evaluations:
    """Runs and logs a training's evaluations.

    An exception is logged, and training continues. If the process dies in an evaluation (memory, a
    time limit), it is retried from the checkpoint before it, and skipped after ``MAX_DEATHS``
    deaths, so that the run gets past it.

    Args:
        folder: of the run.
        log: of the run.
        compute: step -> metrics and pictures to log; empty if none is due. All ranks call it,
            and it raises on all of them or on none (``dist.together``).
    """

    def __init__(self, folder: Path, log: RunLog, compute: Callable[[int], dict[str, Any]]):
        self.mark, self.log, self.compute = folder / MARK, log, compute

    def __call__(self, step: int) -> dict[str, Any]:
        """Evaluate what there is after ``step``; returns what was found."""
        if not dist.from_main(lambda: self._begin(step)):
            return {}
        with self.log.untimed(), compiler.eager():
            try:
                found = self.compute(step)
            except Exception as error:
                found = {}
                if dist.is_main():
                    reason = one_line(error, 300)
                    warn(
                        f"step {step}: the evaluation failed; training continues "
                        f"({type(error).__name__}: {reason})"
                    )
        self.log.write(step, found)
        if dist.is_main():
            with suppress(OSError):
                self.mark.unlink()
        return found

    def catch_up(self, step: int) -> dict[str, Any]:
        """Evaluate at the start of an attempt what the one before skipped or did not finish;
        returns what either found."""
        return self.log.evaluated(step) or self(step)

    def _begin(self, step: int) -> bool:
        """Record the start of an evaluation; False if too many attempts died in it."""
        deaths = 0
        with suppress(OSError, ValueError, TypeError, KeyError):
            before = json.loads(self.mark.read_text())
            deaths = before["tries"] if before["step"] == step else 0
        if deaths >= MAX_DEATHS:
            warn(
                f"step {step}: {deaths} attempts died in its evaluation, which is now "
                "skipped; the machine may have too little memory for it"
            )
            self.mark.unlink(missing_ok=True)
            return False
        with tolerated(self.mark):
            write_atomic(self.mark, json.dumps({"step": step, "tries": deaths + 1}))
        return True
