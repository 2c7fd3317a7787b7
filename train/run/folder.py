"""The run folder: one run, one config."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
from pathlib import Path
from typing import Any

import yaml

from xcit_dino.errors import InputError, suggest
from xcit_dino.files import check_writable, write_atomic
from xcit_dino.options import absolute, dump_yaml, ineffective, options, read_yaml, replace
from xcit_dino.train.config import RunConfig
from xcit_dino.train.run.metrics import METRICS
from xcit_dino.train.run.trackers import check_installed

CONFIG_FILE, LOCK = "config.yaml", "owner.lock"
# These may differ between two attempts of a run: they do not affect what is learned.
FREE = frozenset(
    "output_dir max_steps may_change saveckp_freq keep_checkpoints checkpoint_minutes log_every "
    "logger max_skipped on_nonfinite on_collapse on_stall watchdog_minutes "
    "on_forgetting forgetting_every forgetting_threshold "
    "device batch_size_per_gpu accum_iter compile grad_checkpointing group_backward fsdp "
    "data_path shard_url num_workers prefetch_factor cache_dir cache_gb max_bad_fraction "
    "knn_every knn_data_path show_channels eval_every eval_batch_size".split()
)
FILLED_IN = ("window", "mean", "std")  # if not given, those of the run folder


def holder(folder: Path) -> str:
    """Which process keeps a run folder (see :mod:`xcit_dino.train.run.lock`), in words; "" where
    none does, as far as the operating system's lock shows."""
    try:
        with open(folder / LOCK, "rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return ""
        with contextlib.suppress(OSError, ValueError, KeyError):
            owner = json.loads((folder / LOCK).read_bytes())
            return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
        return "another process"
    return ""


def check_output(run: RunConfig) -> None:
    """Refuse a run folder that cannot be written to, and a logger that is not installed, before any
    work.

    Raises:
        InputError: names it and the option.
    """
    check_installed(run.logger)
    check_writable(run.output_dir, "name another folder: --output_dir ELSEWHERE")


def check_run(config: Any, run: RunConfig) -> None:
    """Check that the run folder is free, or contains this run; changes nothing.

    ``batch_size_per_gpu`` and ``accum_iter`` are free because the global batch is checked when the
    state is loaded; ``data_path`` because the index checksum is.

    Raises:
        InputError: the folder holds another run (lists the differing options); ``--may_change``
            names no option.
    """
    known = dict(options(config))
    for name in run.may_change:
        if name not in known:
            raise InputError(f"--may_change {name}: no such option{suggest(name, known)}")
    path = run.output_dir / CONFIG_FILE
    if not path.is_file() or not begun(run):
        return
    before = replace(config, read_yaml(path), source=str(path))
    changed = {k: v for k, v in bearing(before, config).items() if k not in run.may_change}
    if changed:
        raise InputError(
            f"--output_dir {run.output_dir} holds a run with other options ({words(changed)}); "
            f"choose another folder, or allow it with --may_change {' '.join(changed)}"
        )


def begun(run: RunConfig) -> bool:
    """Whether a run folder contains anything learned, so that its options are fixed."""
    folder, metrics = run.output_dir, run.output_dir / METRICS
    logged = metrics.is_file() and metrics.stat().st_size > 0
    saved = any(folder.glob("checkpoints/checkpoint-*.pth*"))
    return saved or logged or (folder / "results.json").is_file()


def open_run(config: Any, run: RunConfig) -> None:
    """Create the run folder, or find this run in it; its config exists afterwards.

    For the folder's owner, once the run can no longer be refused.

    Raises:
        InputError: the folder holds another run (see :func:`check_run`), or is read-only.
    """
    check_run(config, run)
    try:
        write_atomic(run.output_dir / CONFIG_FILE, dump_yaml(absolute(config)))
    except OSError as error:
        raise InputError(f"--output_dir {run.output_dir}: {error.strerror}") from error


def bearing(before: Any, now: Any) -> dict[str, tuple[Any, Any]]:
    """``name -> (before, now)`` of the differing options that affect what is learned."""
    free = FREE | (ineffective(before).keys() & ineffective(now).keys())
    pairs = zip(options(absolute(before)), options(absolute(now)), strict=True)
    return {
        name: (old, value)
        for (name, old), (_, value) in pairs
        if old != value and name not in free and not (value is None and name in FILLED_IN)
    }


def say_changes(saved: str, config: Any, step: int) -> None:
    """Report differing options that affect what is learned, with which a checkpoint was reached.

    saved: the checkpoint's config, as :func:`dump_yaml` writes it.
    """
    known = dict(options(config))
    before = {k: v for k, v in (yaml.safe_load(saved) or {}).items() if k in known}
    if changed := bearing(replace(config, before, source="the checkpoint"), config):
        print(f"step {step} was reached with other options: {words(changed)}", flush=True)


def words(changed: dict[str, tuple[Any, Any]]) -> str:
    """``lr 0.1 -> 0.2, epochs 3 -> 4``."""
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
