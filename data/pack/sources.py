"""Where the images of a folder lie, and those in the archives in it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from xcit_dino.data.pack.archives import list_archive
from xcit_dino.data.pack.image_file import Image
from xcit_dino.data.pack.listing import ARCHIVE, Listing, archive_stem
from xcit_dino.data.shards.scan import START
from xcit_dino.errors import InputError


def list_folder(
    folder: Path,
    work: Path | None = None,
    ignore: Collection[str] = (),
    besides: Path | None = None,
) -> Listing:
    """All images below a folder, and in the archives in it: each counts as a folder of its name.

    Args:
        work: folder for decompressed tars; None: compressed tars are skipped.
        ignore: names of files that are no sources of images.
        besides: a folder in it that is none either: the shards to be.
    """
    listing, empty = Listing(), []
    shards = str(besides.resolve()) + os.sep if besides else None
    for path, name in _walk(folder, frozenset(), listing):
        if shards and os.path.realpath(path).startswith(shards):
            continue
        if name.endswith("/"):
            empty.append(name)
        elif ARCHIVE.search(name) and not PurePosixPath(name).name.startswith("."):
            if PurePosixPath(name).name not in ignore:
                _list_inside(listing, Path(path), archive_stem(name) + "/", work)
        elif listing.wants(name, partial(_start_of, path)):
            try:
                listing.images.append(Image(name, path, size=os.stat(path).st_size))
            except OSError as error:
                reason = f"cannot be read: {error.strerror}"
                listing.bad.append({"source": name, "reason": reason})
    if empty and listing.images:
        more = f" and {len(empty) - 3:,} more" if len(empty) > 3 else ""
        listing.notes.append(f"skipped: empty folders, {', '.join(empty[:3])}{more}")
    return listing


def _list_inside(listing: Listing, path: Path, prefix: str, work: Path | None) -> None:
    """The images of an archive that lies in a folder."""
    try:
        listing.add(list_archive(path, work, prefix))
    except InputError as error:
        listing.bad.append({"source": prefix.rstrip("/"), "reason": str(error)})


def _walk(
    folder: Path | str, above: frozenset[tuple[int, int]], listing: Listing, prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """(path, name below the first folder) of every file, and of every empty folder, whose name
    ends with a slash; follows links, but not in circles."""
    try:
        status = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        listing.bad.append({"source": prefix, "reason": f"cannot be read: {error.strerror}"})
        return
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        listing.skipped["links in a circle"] += 1
        return
    if prefix and not entries and not PurePosixPath(prefix).name.startswith("."):
        yield str(folder), prefix
    for entry in entries:
        name = prefix + entry.name
        if entry.is_dir():
            yield from _walk(entry.path, above | {identity}, listing, name + "/")
        elif entry.is_file() or entry.is_symlink():
            yield entry.path, name


def _start_of(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(START)
    except OSError:
        return b""
