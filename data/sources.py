"""Where the images of a source lie: in a folder, a tar (of tars), a tar.gz or a zip.

Every source becomes a list of :class:`Image`.
Archives are never unpacked: names inside them are only labels, so that none can climb out of a
folder, and links and devices in them are left out. What is left out is counted, with the reason.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, cast

from xcit_dino.data.imagefile import Image
from xcit_dino.data.shardscan import IMAGE_EXTENSIONS
from xcit_dino.data.tarscan import BLOCK, Damage, scan
from xcit_dino.errors import InputError
from xcit_dino.progress import progress

COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
NESTED_TAR_DEPTH = 2  # ILSVRC2012 is a tar of tars; deeper ones are not data sets


@dataclass
class Listing:
    """What was found in a source."""

    images: list[Image] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """How many files were left out as no images, by reason."""
    is_list: bool = False
    """The source is a list of path,label: folders in the names mean nothing."""
    bad: list[dict[str, Any]] = field(default_factory=list)
    """``{"source", "reason"}`` of what could not be used and should be looked at."""

    def wants(self, name: str) -> bool:
        """True for the name of an image to pack; counts the others."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            self.bad.append({"source": name, "reason": "its name leaves the archive"})
        elif any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
            self.skipped["hidden files"] += 1
        elif path.suffix[1:].lower() not in IMAGE_EXTENSIONS:
            self.skipped[f"{path.suffix[:20].lower() or 'no extension'} files"] += 1
        else:
            return True
        return False


def list_folder(folder: Path) -> Listing:
    """All images below a folder, and in the tars in it: a tar counts as a folder of its name."""
    listing = Listing()
    for path, name in _walk(folder, frozenset()):
        if name.endswith(".tar") and not PurePosixPath(name).name.startswith("."):
            _list_tar(listing, path, name.removesuffix(".tar") + "/")
        elif listing.wants(name):
            try:
                listing.images.append(Image(name, path, size=os.stat(path).st_size))
            except OSError as error:
                reason = f"cannot be read: {error.strerror}"
                listing.bad.append({"source": name, "reason": reason})
    return listing


def _walk(folder: Path | str, above: frozenset[tuple[int, int]], prefix: str = "") -> Iterator:
    """(path, name below the first folder) of every file; follows links, but not in circles."""
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = prefix + entry.name
            if entry.is_dir():
                yield from _walk(entry.path, above | {identity}, name + "/")
            elif entry.is_file() or entry.is_symlink():
                yield entry.path, name


def list_archive(path: Path, work: Path) -> Listing:
    """All images in a tar, compressed tar or zip; the kind is seen in the file, not in its name.

    Args:
        work: folder for the decompressed tar, so that all processes can read from any place.

    Raises:
        InputError: neither.
    """
    with path.open("rb") as file:
        magic = file.read(BLOCK)
    listing, tar = Listing(), path
    if opener := next((o for m, o in COMPRESSED.items() if magic.startswith(m)), None):
        work.mkdir(parents=True, exist_ok=True)
        status = path.stat()
        identity = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
        target = work / f"source-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.tar"
        tar = _decompress(path, cast(Any, opener), target, listing)
    elif magic.startswith(b"PK"):
        _list_zip(listing, path)
        return listing
    elif magic.startswith(b"\x28\xb5\x2f\xfd"):
        raise InputError(f"{path} is compressed with zstd: decompress it first (unzstd)")
    _list_tar(listing, str(tar), "")
    if not listing.images and any(item.get("offset") == 0 for item in listing.bad):
        raise InputError(f"{path} is no tar, tar.gz or zip that holds images")
    return listing


def _decompress(path: Path, opener: Any, target: Path, listing: Listing) -> Path:
    """The decompressed archive beside the shards to be; kept until they are complete."""
    if target.exists():
        return target
    temporary = target.with_suffix(".tmp")
    with path.open("rb") as raw, temporary.open("wb") as out:
        with progress(f"Decompress {path.name}", path.stat().st_size, "bytes") as bar:
            before = 0
            try:
                with opener(raw) as stream:
                    while piece := stream.read1(1 << 20):  # read() would lose what precedes damage
                        out.write(piece)
                        bar.advance(raw.tell() - before)
                        before = raw.tell()
            except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
                reason = f"the compressed archive is damaged or truncated: {error}"
                listing.bad.append({"source": path.name, "reason": reason})
    temporary.replace(target)
    return target


def _list_tar(listing: Listing, path: str, prefix: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _scan_tar(listing, path, descriptor, prefix, 0, os.fstat(descriptor).st_size, 1)
    finally:
        os.close(descriptor)


def _scan_tar(
    listing: Listing, path: str, descriptor: int, prefix: str, start: int, end: int, depth: int
) -> None:
    for member in scan(lambda at, length: os.pread(descriptor, length, at), end, start):
        name = prefix + member.name.removeprefix("./")
        if isinstance(member, Damage):
            listing.bad.append({"source": name, "reason": member.reason, "offset": member.offset})
        elif name.endswith(".tar") and depth < NESTED_TAR_DEPTH:
            inner, inner_end = name.removesuffix(".tar") + "/", member.offset + member.size
            _scan_tar(listing, path, descriptor, inner, member.offset, inner_end, depth + 1)
        elif listing.wants(name):
            listing.images.append(Image(name, path, member.offset, member.size))


def _list_zip(listing: Listing, path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise InputError(f"{path} is no readable zip: {error}") from None
    for entry in entries:
        if entry.is_dir():
            continue
        # Some programs on Windows write its own separator, against the specification (4.4.17).
        windows = entry.create_system == 0
        name = entry.filename.replace("\\", "/") if windows else entry.filename
        reason = (
            "encrypted" if entry.flag_bits & 1
            else "a link" if stat.S_ISLNK(entry.external_attr >> 16)
            else "packed in a way other than stored or deflated"
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            else None
        )  # fmt: skip
        if not listing.wants(name):
            continue
        if reason:
            listing.bad.append({"source": name, "reason": reason})
            continue
        listing.images.append(
            Image(
                name, str(path), entry.header_offset, entry.file_size,
                entry.compress_type, entry.compress_size, entry.CRC,
            )
        )  # fmt: skip
