"""Write one WebDataset shard (``<key>.cls <key>.jpg <key>.json``), the same bytes every time.

The members are those of WebDataset's ``TarWriter`` (a test compares the bytes). It is not called
here because importing it imports torch: seconds, and hundreds of megabytes in every process that
packs.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from xcit_dino.data.shards.index_writer import ShardPart
from xcit_dino.data.shards.scan import scan_shard
from xcit_dino.data.shards.tar import BLOCK
from xcit_dino.files import atomic_path

SHARD_NAME = "shard-{:06d}.tar"  # the usual WebDataset naming: shard-{000000..000099}.tar


class Sample(NamedTuple):
    """What a shard stores of one image."""

    key: str
    extension: str
    """Format of ``image`` as WebDataset names it: jpg, png, webp ..."""
    image: bytes
    label: int
    """-1: none, and no ``.cls`` member."""
    meta: dict[str, Any]
    """Goes into ``.json``, unless it is empty."""
    target: tuple[str, bytes] | None = None
    """``mask`` or ``boxes``, and its content (``data/targets/formats.py``)."""


def write_shard(folder: Path, name: str, samples: Iterable[Sample]) -> ShardPart:
    """Write ``folder/name`` atomically and return its share of the index.

    Plain ustar members, sorted by extension, with times and owners fixed: equal samples make equal
    files. The index entry is read back from the shard, which verifies it.
    """
    # Of one name in all processes, so that the next attempt overwrites what a killed one left.
    with atomic_path(folder / name, folder / f".{name}.tmp") as temporary:
        _write_tar(temporary, samples)
        part = scan_shard(folder, temporary.name, with_sha256=True)
        assert not part.damage, part.damage
    return part._replace(name=name)


def _write_tar(path: Path, samples: Iterable[Sample]) -> None:
    with path.open("wb") as file:
        for sample in samples:
            for extension, data in sorted(_members(sample).items()):
                file.write(_header(f"{sample.key}.{extension}", len(data)))
                file.write(data)
                file.write(bytes(-len(data) % BLOCK))
        file.write(bytes(2 * BLOCK))  # the end of an archive, filled up to a whole record
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE))


def _header(name: str, size: int) -> bytes:
    header = tarfile.TarInfo(name)  # mtime, uid and gid are 0
    header.size, header.mode, header.uname, header.gname = size, 0o444, "bigdata", "bigdata"
    return header.tobuf(tarfile.USTAR_FORMAT)


def _members(sample: Sample) -> dict[str, bytes]:
    members = {sample.extension: sample.image}
    if sample.label >= 0:
        members["cls"] = b"%d" % sample.label
    if sample.meta:
        meta = json.dumps(sample.meta, sort_keys=True, separators=(",", ":"))
        members["json"] = meta.encode()
    if sample.target is not None:
        members[sample.target[0]] = sample.target[1]
    return members
