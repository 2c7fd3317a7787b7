"""Features of a long search, kept part by part until its results are written, so that an
interrupted command goes on where it stopped."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xcit_dino.files import write_atomic

PART = 128
"""Images."""


class Part(NamedTuple):
    """Features of up to ``PART`` consecutive images, computed apart from the others."""

    features: np.ndarray
    """float32 [n, D], NaN where an image cannot be read; D is 0 if that holds for all."""
    reasons: dict[int, str]
    """Rows that cannot be read, and why."""


@dataclass(frozen=True)
class Parts:
    """The folder of the parts, each named after all that its features depend on. Commands may share
    it; where one removes what another has kept, that one would compute it again if interrupted."""

    folder: Path

    def key(self, settings: str, files: Sequence[Path]) -> Path:
        """Where the features of these images are kept.

        settings: network, preprocessing and pooling.
        """
        found = hashlib.sha256(settings.encode())
        for file in files:
            stat = file.stat() if file.exists() else None  # a link to nothing cannot be read
            stamp = stat and (stat.st_size, stat.st_mtime_ns)
            found.update(f"\n{file.resolve()} {stamp}".encode(errors="surrogateescape"))
        return self.folder / f"{found.hexdigest()}.npz"

    def load(self, key: Path) -> Part | None:
        """What an earlier try has kept."""
        try:
            with np.load(key) as kept:
                rows = json.loads(str(kept["reasons"]))
                return Part(kept["features"], {int(row): reason for row, reason in rows.items()})
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            return None

    def save(self, key: Path, part: Part) -> None:
        """Keep a part."""
        buffer = io.BytesIO()
        np.savez(buffer, features=part.features, reasons=json.dumps(part.reasons))
        with suppress(FileNotFoundError):  # another command has just removed the folder
            write_atomic(key, buffer.getvalue())

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
