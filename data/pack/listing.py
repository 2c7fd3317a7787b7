"""Images of a source, and what was skipped in it, with the reasons."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from xcit_dino.data.pack.image_file import Image
from xcit_dino.data.shards.scan import ARRAY_EXTENSION, IMAGE_EXTENSIONS, is_image

ARCHIVE = re.compile(r"\.(tar(\.(gz|bz2|xz))?|tgz|tbz2?|txz|zip)$", re.IGNORECASE)
TABLES = ("csv", "tsv", "jsonl", "parquet")
# Files of other extensions are looked into: JPEGs are often called .jpg_large, or nothing at all.
NO_IMAGES = frozenset(
    "txt json xml csv tsv jsonl cls npz mat py pyc md html css js pdf db ini yaml yml gz bz2 "
    "xz zst tar tgz zip rar 7z mp4 avi mov wav mp3 pt pth pkl h5 parquet log lock tmp part".split()
)


@dataclass
class Listing:
    """What was found in a source."""

    images: list[Image] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """Files skipped as no images, by reason."""
    is_list: bool = False
    """The source is a list of path,label: folders in the names mean nothing."""
    bad: list[dict[str, Any]] = field(default_factory=list)
    """``{"source", "reason"}`` of what could not be used and should be looked at."""
    notes: list[str] = field(default_factory=list)
    """What was interpreted, renamed or skipped, a line each."""
    numbers: dict[str, int] | None = None
    """Numbers of the classes, where the source says them."""
    tables: list[str] = field(default_factory=list)
    """Lists beside the images, which may hold their labels."""
    by_content: int = 0
    """Images whose names have no such extension."""
    foreign_names: int = 0
    """Names in zips whose encoding is not known."""

    def finished(self) -> Listing:
        """The same, with a note for each count."""
        if self.by_content:
            self.notes.append(
                f"{self.by_content:,} files are images by their content, not by their extension"
            )
        if self.foreign_names:
            self.notes.append(
                f"{self.foreign_names:,} names are in an unknown encoding (read as code page 437)"
            )
        return self

    def add(self, other: Listing) -> None:
        """Take in what was found in an archive in this source."""
        self.images += other.images
        self.bad += other.bad
        self.skipped += other.skipped
        self.tables += other.tables
        self.by_content += other.by_content
        self.foreign_names += other.foreign_names

    def wants(self, name: str, start: Callable[[], bytes]) -> bool:
        """True for an image to pack; counts the others.

        Args:
            start: reads the first 132 bytes, for names without a known extension.
        """
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            self.bad.append({"source": name, "reason": "its name leaves the archive"})
        elif hidden(name):
            self.skipped["hidden files"] += 1
        elif (extension := path.suffix[1:].lower()) in (*IMAGE_EXTENSIONS, ARRAY_EXTENSION):
            return True
        elif extension not in NO_IMAGES and is_image(start()):
            self.by_content += 1
            return True
        else:
            if extension in TABLES:
                self.tables.append(name)
            self.skipped[f"{path.suffix[:20].lower() or 'no extension'} files"] += 1
        return False


def archive_stem(name: str) -> str:
    """``train.tar.gz`` -> ``train``; other names as they are."""
    return ARCHIVE.sub("", name)


def hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)
