"""Images in archives: in a tar (of tars), a compressed tar or a zip.

Archives are never unpacked: names inside them are only labels, so that none can climb out of a
folder, and links and devices in them are skipped. What is skipped is counted, with the reason.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import shlex
import stat
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any, cast

from xcit_dino.data.pack.image_file import Image
from xcit_dino.data.pack.listing import ARCHIVE, Listing, archive_stem, hidden
from xcit_dino.data.shards.scan import START
from xcit_dino.data.shards.tar import BLOCK, Damage, scan
from xcit_dino.errors import InputError
from xcit_dino.files import atomic_path
from xcit_dino.progress import progress

COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
TOOLS = ((gzip.open, "gunzip", "gz"), (bz2.open, "bunzip2", "bz2"), (lzma.open, "unxz", "xz"))
NESTED = "an archive inside an archive: unpack it first"
NESTED_TAR_DEPTH = 2  # ILSVRC2012 is a tar of tars; deeper ones are not data sets


def list_archive(path: Path, work: Path | None, prefix: str = "") -> Listing:
    """All images in a tar, compressed tar or zip; recognized by content, not by name.

    Args:
        work: folder for the decompressed tar, so that all processes can read from any place.
        prefix: put in front of the names.

    Raises:
        InputError: neither.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(BLOCK)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    listing, tar = Listing(), path
    if opener := next((o for m, o in COMPRESSED.items() if magic.startswith(m)), None):
        if work is None:
            raise InputError(f"{path} is compressed: decompress it first")
        work.mkdir(parents=True, exist_ok=True)
        status = path.stat()
        identity = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
        target = work / f"source-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.tar"
        tar = _decompress(path, cast(Any, opener), target, listing)
    elif magic.startswith(b"PK"):
        _list_zip(listing, path, prefix)
        return listing
    elif magic.startswith(b"\x28\xb5\x2f\xfd"):
        raise InputError(f"{path} is compressed with zstd: decompress it first (unzstd)")
    _list_tar(listing, str(tar), prefix)
    if not listing.images and any(item.get("offset") == 0 for item in listing.bad):
        raise InputError(f"{path} is no tar, tar.gz or zip that holds images")
    return listing


def _decompress(path: Path, opener: Any, target: Path, listing: Listing) -> Path:
    """The decompressed archive beside the shards to be; kept until they are complete."""
    if target.exists():
        return target
    partial_path = target.with_suffix(".tmp")
    with (
        path.open("rb") as raw,
        atomic_path(target, partial_path),
        partial_path.open("wb") as out,
    ):
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
        elif ARCHIVE.search(name) and not hidden(name):
            start, size = member.offset, member.size
            if depth < NESTED_TAR_DEPTH and _is_tar(os.pread(descriptor, BLOCK, start)):
                inner = archive_stem(name) + "/"
                _scan_tar(listing, path, descriptor, inner, start, start + size, depth + 1)
            else:
                listing.bad.append({"source": name, "reason": NESTED})
        elif listing.wants(name, lambda at=member.offset: os.pread(descriptor, START, at)):
            listing.images.append(Image(name, path, member.offset, member.size))


def compressed_in(folder: Path) -> list[Path]:
    """Tars below a folder that are compressed, whatever their names."""
    paths = sorted(p for p in folder.rglob("*") if ARCHIVE.search(p.name) and p.is_file())
    return [path for path in paths if compressed(path)]


def compressed(path: Path) -> bool:
    return _opener(path) is not None


def decompression(folder: Path, path: Path) -> str:
    """The command that decompresses all tars below a folder that are like ``path``."""
    opener = _opener(path)
    tool, suffix = next((t, s) for o, t, s in TOOLS if o is opener)
    if path.name.endswith(".tar"):  # compressed without such a suffix, which the tools require
        script = f'{tool} -t < "$1" 2> /dev/null && mv "$1" "$1.{suffix}" && {tool} "$1.{suffix}"'
        return (
            f"find {shlex.quote(str(folder))} -name '*.tar' -exec sh -c {shlex.quote(script)} _ "
            "{} ';'"
        )
    name = "*" + path.name.removeprefix(archive_stem(path.name))
    return f"find {shlex.quote(str(folder))} -name {shlex.quote(name)} -exec {tool} {{}} +"


def _opener(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            magic = file.read(6)
    except OSError:
        return None
    return next((o for m, o in COMPRESSED.items() if magic.startswith(m)), None)


def _is_tar(header: bytes) -> bool:
    """False for gzip, zip and the like, whatever their names."""
    return not header.startswith((*COMPRESSED, b"PK\3\4", b"\x28\xb5\x2f\xfd"))


def _list_zip(listing: Listing, path: Path, prefix: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    _list_entry(listing, path, prefix, archive, entry)
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise InputError(f"{path} is no readable zip: {error}") from None


def _list_entry(
    listing: Listing, path: Path, prefix: str, archive: zipfile.ZipFile, entry: zipfile.ZipInfo
) -> None:
    # Some programs on Windows write its own separator, against the specification (4.4.17).
    name = _zip_name(entry, listing)
    name = prefix + (name.replace("\\", "/") if entry.create_system == 0 else name)
    reason = (
        "encrypted" if entry.flag_bits & 1
        else "a link" if stat.S_ISLNK(entry.external_attr >> 16)
        else "packed in a way other than stored or deflated"
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        else None
    )  # fmt: skip
    if ARCHIVE.search(name) and not hidden(name):
        listing.bad.append({"source": name, "reason": NESTED})
    elif not listing.wants(name, partial(_zip_start, archive, entry)):
        return
    elif reason:
        listing.bad.append({"source": name, "reason": reason})
    else:
        listing.images.append(
            Image(
                name, str(path), entry.header_offset, entry.file_size,
                entry.compress_type, entry.compress_size, entry.CRC,
            )
        )  # fmt: skip


def _zip_name(entry: zipfile.ZipInfo, listing: Listing) -> str:
    """The name of an entry. Without the UTF-8 flag the specification means IBM's code
    page 437, but macOS and many others write UTF-8 nevertheless."""
    if entry.flag_bits & 0x800 or entry.filename.isascii():
        return entry.filename
    try:
        return entry.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        listing.foreign_names += 1
        return entry.filename


def _zip_start(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """The first bytes of an entry; b"" where they cannot be read."""
    try:
        with archive.open(entry) as file:
            return file.read(START)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, OSError, zlib.error):
        return b""
