"""The checkpoints of a run folder, for those who read them: which there are, and the newest whole
one, which the run that goes on there does not drop meanwhile.

Beside each ``checkpoint-STEP.pth`` lies a small JSON with its step, size and SHA-256, which
``train/state.py`` writes first; a checkpoint that its JSON does not vouch for is damaged.
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
NAME = re.compile(r"checkpoint-(\d{8})\.pth")
MOST_RESERVED = 8  # a long-lived process reads one run after the other
_reserved: dict[Path, int] = {}  # folder -> the open file of its checkpoint that is being read


def checkpoint_of(path: Path) -> Path:
    """A weights file as it is; of a run folder its newest whole checkpoint. Nothing is changed.

    Raises:
        InputError: a folder without one.
    """
    if not path.is_dir():
        return path
    if (file := newest_whole(path)) is None:
        raise InputError(f"{path}: this folder holds no checkpoint; name a run folder or a file")
    return file


def newest_whole(run_folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder, or None, for reading: nothing is changed.

    A damaged one is passed over, and a run that goes on does not drop the one returned while this
    process lives (or reads another of the same folder).
    """
    paths = all_checkpoints(run_folder / FOLDER)
    for path in reversed(paths):
        try:
            reserve(path)
            if is_whole(path):
                return path
            warn(f"{path} is damaged; passed over")
        except FileNotFoundError:  # just dropped, as there is a newer one now
            if all_checkpoints(run_folder / FOLDER) != paths:
                return newest_whole(run_folder)
    return None


def all_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, whole or not, oldest first."""
    return sorted(p for p in folder.glob("checkpoint-*.pth") if NAME.fullmatch(p.name))


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.rpartition("-")[2])


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is as its JSON says.

    Raises:
        FileNotFoundError: the run that writes here has dropped it.
    """
    facts, size = facts_of(path), path.stat().st_size
    return size == facts.get("bytes") and file_checksum(path) == facts.get("sha256")


def facts_of(path: Path) -> dict[str, Any]:
    """What the JSON beside a checkpoint says of it; nothing where that is damaged or gone."""
    try:
        facts = json.loads(path.with_suffix(".json").read_bytes())
    except (ValueError, FileNotFoundError):
        return {}
    return facts if isinstance(facts, dict) else {}


def reserve(path: Path) -> None:
    """Keep the run from dropping a checkpoint while this process reads it."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_SH)  # who is just dropping it holds it for a moment
    release(path.parent)
    _reserved[path.parent] = file
    while len(_reserved) > MOST_RESERVED:
        release(next(iter(_reserved)))


def release(folder: Path) -> None:
    """Let the run drop the checkpoint of ``folder`` that :func:`reserve` keeps, if any."""
    if (file := _reserved.pop(folder, None)) is not None:
        os.close(file)


def drop_unless_read(path: Path) -> None:
    """Remove a checkpoint; one that another command reads (see :func:`reserve`) stays until the
    next time."""
    with contextlib.suppress(BlockingIOError), open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise
        path.unlink()
        path.with_suffix(".json").unlink()
