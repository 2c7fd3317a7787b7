"""An evaluation's outcome: into ``results.json``, and beside the options into TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xcit_dino.errors import warn
from xcit_dino.eval.runs import EVALUATIONS, Run, read_run
from xcit_dino.train.board import write_hparams
from xcit_dino.train.provenance import record_result
from xcit_dino.train.run import FREE


def write_result(
    folder: Path, name: str, metrics: dict[str, float], protocol: dict[str, Any], **facts: Any
) -> None:
    """Keep one evaluation of a run; the arguments are those of ``record_result``."""
    record_result(folder, name, metrics, protocol, **facts)
    run = read_run(folder)
    if not run.config:
        return  # weights from elsewhere, which no options led to
    telling = {name: value for name, value in run.config.items() if name not in FREE}
    try:
        write_hparams(folder, telling, final_accuracies(run))
    except OSError as error:
        warn(f"TensorBoard: {error}; its page of hyper-parameters lacks this result")


def final_accuracies(run: Run) -> dict[str, float]:
    """Top-1 of every evaluation of the trained network."""
    found = {name: run.top1(name) for name in EVALUATIONS}
    return {name: value for name, value in found.items() if value is not None}
