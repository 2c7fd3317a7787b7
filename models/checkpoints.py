"""Read access to a run folder's checkpoints: list them, and find the newest intact one, which a
running training does not delete while it is read.

Next to each ``checkpoint-STEP.pth`` is a small JSON with its step, size and SHA-256, which
``train/state.py`` writes first; a checkpoint that does not match its JSON is damaged.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from pathlib import Path
from typing import Any

from xcit_dino.errors import InputError, warn
from xcit_dino.files import file_checksum

FOLDER = "checkpoints"
HUB_WEIGHTS = "model.safetensors"  # in a folder for timm and the hub
NAME = re.compile(r"checkpoint-(\d{8})\.pth")
MOST_RESERVED = 8  # a long-lived process reads one run after the other
_reserved: dict[Path, int] = {}  # folder -> open file of its checkpoint being read


def resolve_checkpoint(path: Path) -> Path:
    """The path itself if it is a file; for a folder, see :func:`weights_in`. Read-only.

    Raises:
        InputError: a folder without an intact checkpoint.
    """
    if not path.is_dir():
        return path
    if (file := weights_in(path)) is None:
        raise InputError(f"{path}: no checkpoint in this folder; name a run folder or a file")
    return file


def weights_in(folder: Path) -> Path | None:
    """The newest intact checkpoint of a run folder, or the weights of a folder for timm and the
    hub (``weights export --format timm-hub``); None where it has neither."""
    exported = folder / HUB_WEIGHTS
    return newest_intact(folder) or (exported if exported.is_file() else None)


def newest_intact(run_folder: Path) -> Path | None:
    """The newest intact checkpoint of a run folder, or None. Read-only.

    Damaged ones are skipped. A running training does not delete the one returned while this
    process lives (or until it reads another of the same folder).
    """
    paths = all_checkpoints(run_folder / FOLDER)
    for path in reversed(paths):
        try:
            reserve(path)
            if is_intact(path):
                return path
            warn(f"{path} is damaged; skipped")
        except FileNotFoundError:  # just deleted: there is a newer one now
            if all_checkpoints(run_folder / FOLDER) != paths:
                return newest_intact(run_folder)
    return None


def all_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, intact or not, oldest first."""
    return sorted(p for p in folder.glob("checkpoint-*.pth") if NAME.fullmatch(p.name))


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.rpartition("-")[2])


def is_intact(path: Path) -> bool:
    """Whether a checkpoint matches the size and SHA-256 in its JSON.

    Raises:
        FileNotFoundError: deleted by the running training.
    """
    facts, size = read_metadata(path), path.stat().st_size
    return size == facts.get("bytes") and file_checksum(path) == facts.get("sha256")


def read_metadata(path: Path) -> dict[str, Any]:
    """Content of a checkpoint's JSON; {} if damaged or missing."""
    try:
        facts = json.loads(path.with_suffix(".json").read_bytes())
    except (ValueError, FileNotFoundError):
        return {}
    return facts if isinstance(facts, dict) else {}


def reserve(path: Path) -> None:
    """Keep the training from deleting a checkpoint while this process reads it."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_SH)  # waits briefly if it is just being deleted
    release(path.parent)
    _reserved[path.parent] = file
    while len(_reserved) > MOST_RESERVED:
        release(next(iter(_reserved)))


def release(folder: Path) -> None:
    """Release the checkpoint of ``folder`` kept by :func:`reserve`, if any."""
    if (file := _reserved.pop(folder, None)) is not None:
        os.close(file)


def remove_unless_in_use(path: Path) -> None:
    """Remove a checkpoint, unless another command reads it (see :func:`reserve`); then it stays
    until the next call."""
    with contextlib.suppress(BlockingIOError), open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise
        path.unlink()
        path.with_suffix(".json").unlink()
