"""A copy of the code in the run folder, so that editing the checkout never changes a queued or
running job."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from xcit_dino.provenance import commit

PACKAGE = Path(__file__).resolve().parents[1] / "xcit_dino"
if not PACKAGE.is_dir():  # installed: the folders are inside the package
    PACKAGE = Path(__file__).resolve().parents[1]


def copy_code(folder: Path) -> Path:
    """Copy the package, following links, to ``folder/HASH/xcit_dino``, unless it exists.

    Returns:
        The folder to put on ``PYTHONPATH``.
    """
    files = sorted(sources())
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    place = folder / digest.hexdigest()[:12]
    if place.is_dir():
        return place
    temporary = folder / f".{place.name}.{os.getpid()}.tmp"
    for name, path in files:
        (temporary / "xcit_dino" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, temporary / "xcit_dino" / name)
    (temporary / "COMMIT").write_text(commit() + "\n")  # xcit_dino/provenance.py reads it
    temporary.rename(place)
    return place


def sources() -> Iterator[tuple[str, Path]]:
    """Yield ``(name inside the package, file)`` for all code and recipes."""
    for folder, folders, names in os.walk(PACKAGE, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for path in (Path(folder, name) for name in names):
            yield str(path.relative_to(PACKAGE)), path
