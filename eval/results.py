"""Store an evaluation's results in ``results.json``, and with the options in TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xcit_dino.errors import RunError, warn
from xcit_dino.files import locked
from xcit_dino.provenance import LOCK, record_result
from xcit_dino.train.run.folder import FREE
from xcit_dino.train.run.reader import EVALUATIONS, Run, read_run
from xcit_dino.train.run.tensorboard_log import write_hparams
from xcit_dino.train.run.trackers import mirror_result


def write_result(
    folder: Path, name: str, metrics: dict[str, float], protocol: dict[str, Any], **facts: Any
) -> None:
    """Store one evaluation of a run; the arguments are those of ``record_result``. It is printed
    before, so that it is not lost if it cannot be stored.

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        record_result(folder, name, metrics, protocol, **facts)
    except OSError as error:
        raise RunError(
            f"the result above is not stored, as {folder} cannot be written ({error.strerror}); "
            "fix that, or name another folder with --output_dir, and run the command again"
        ) from error
    run = read_run(folder)
    if not run.config:
        return  # weights from elsewhere: no options to show
    mirror_result(
        folder,
        run.config.get("logger") or (),
        int(run.metrics[-1]["step"]) if run.metrics else 0,
        {f"final/{name}/{key}": float(value) for key, value in metrics.items()},
    )
    logged_options = {name: value for name, value in run.config.items() if name not in FREE}
    try:
        with locked(folder / LOCK):
            write_hparams(folder, logged_options, final_accuracies(read_run(folder)))
    except OSError as error:
        warn(f"TensorBoard: {error}; its page of hyper-parameters lacks this result")


def final_accuracies(run: Run) -> dict[str, float]:
    """Top-1 of the newest result of every evaluation of the trained network."""
    found = {name: run.top1(name) for name in EVALUATIONS}
    return {name: value for name, value in found.items() if value is not None}
