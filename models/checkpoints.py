"""The checkpoints of a run folder: which there are, and the newest whole one.

Beside each ``checkpoint-STEP.pth`` lies a small JSON with its step, size and SHA-256, which
``train/state.py`` writes first; a checkpoint that its JSON does not vouch for is damaged.
"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

from xcit_dino.errors import InputError, warn
from xcit_dino.files import file_checksum

FOLDER = "checkpoints"
NAME = re.compile(r"checkpoint-(\d{8})\.pth")


def checkpoint_of(path: Path) -> Path:
    """A weights file as it is; of a run folder its newest whole checkpoint. Nothing is changed.

    Raises:
        InputError: a folder without one.
    """
    if not path.is_dir():
        return path
    for file in reversed(all_checkpoints(path / FOLDER)):
        if is_whole(file):
            return file
        warn(f"{file} is damaged and is passed over")
    raise InputError(f"{path}: this folder holds no checkpoint; name a run folder or a file")


def all_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, whole or not, oldest first."""
    return sorted(p for p in folder.glob("checkpoint-*.pth") if NAME.fullmatch(p.name))


def is_whole(path: Path) -> bool:
    """Whether the JSON beside a checkpoint vouches for it; False too where it is just going."""
    with contextlib.suppress(FileNotFoundError):  # the run that writes here dropped it
        facts, size = facts_of(path), path.stat().st_size
        return size == facts.get("bytes") and file_checksum(path) == facts.get("sha256")
    return False


def facts_of(path: Path) -> dict[str, Any]:
    """What the JSON beside a checkpoint says of it; nothing where that is damaged or gone."""
    try:
        facts = json.loads(path.with_suffix(".json").read_bytes())
    except (ValueError, FileNotFoundError):
        return {}
    return facts if isinstance(facts, dict) else {}
