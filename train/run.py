"""The run folder: one run, one config."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from xcit_dino.errors import InputError
from xcit_dino.train.config import RunConfig, absolute, dump_yaml, options, read_yaml, replace
from xcit_dino.train.provenance import write_atomic

CONFIG_FILE = "config.yaml"
# These may differ between two tries of one run: they change nothing of what is learnt.
FREE = frozenset(
    "output_dir num_workers log_every keep_checkpoints saveckp_freq checkpoint_minutes max_steps "
    "may_change device cache_dir batch_size_per_gpu accum_iter data_path knn_every eval_every "
    "on_collapse on_nonfinite max_skipped on_stall watchdog_minutes "
    "compile grad_checkpointing group_backward fsdp".split()
)


def check_run(config: Any, run: RunConfig) -> None:
    """Check that the run folder is free, or holds this very run.

    ``batch_size_per_gpu`` and ``accum_iter`` are free because the global batch is checked when the
    state is loaded; ``data_path`` because the index checksum is.

    Raises:
        InputError: the folder holds another run (lists the differing options).
    """
    path = run.output_dir / CONFIG_FILE
    if path.is_file():
        before = options(absolute(replace(config, read_yaml(path), source=str(path))))
        changed = {
            name: (old, value)
            for (name, old), (_, value) in zip(before, options(absolute(config)), strict=True)
            if old != value and name not in FREE and name not in run.may_change
        }
        if changed:
            words = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
            raise InputError(
                f"--output_dir {run.output_dir} holds a run with other options ({words}); choose "
                f"another folder, or allow it with --may_change {' '.join(changed)}"
            )


def open_run(config: Any, run: RunConfig) -> None:
    """Make the run folder, or find this very run in it; its config is there afterwards.

    Raises:
        InputError: the folder holds another run (see :func:`check_run`), or is read-only.
    """
    check_run(config, run)
    try:
        write_atomic(run.output_dir / CONFIG_FILE, dump_yaml(absolute(config)))
    except OSError as error:
        raise InputError(f"--output_dir {run.output_dir}: {error.strerror}") from error


def fingerprint(config: Any) -> str:
    """Checksum of the options that bear on what is learnt."""
    given = options(absolute(config))
    bearing = {name: str(value) for name, value in given if name not in FREE}
    return hashlib.sha256(json.dumps(bearing, sort_keys=True).encode()).hexdigest()[:16]
