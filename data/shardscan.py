"""Index one WebDataset shard by its headers: its samples' places, sizes, labels and keys."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from xcit_dino.data.files import file_sha256
from xcit_dino.data.index import ARRAYS, KEY, MAX_LABEL
from xcit_dino.data.indexwriter import ShardPart
from xcit_dino.data.tarscan import Damage, ReadAt, scan

IMAGE_EXTENSIONS = frozenset("jpg jpeg jpe png webp bmp gif tif tiff ppm pgm pbm".split())


def split_key(name: str) -> tuple[str, str]:
    """(key, extension) of a member as WebDataset splits them; ("", "") when there is no dot."""
    match = KEY.match(name)
    return (match[1], match[2].lower()) if match else ("", "")


def scan_shard(root: str | Path, name: str, *, with_sha256: bool) -> ShardPart:
    """Index one shard by its headers; its image data are only read for the checksum.

    A sample is a run of members with one key, as WebDataset has it. Its image is its first member
    with an image extension, its label the number in ``.cls``; a sample with an unreadable label
    keeps its place with label -1 and is listed in ``damage``, and so are samples without an image
    and whatever is not a member.
    """
    path = Path(root) / name
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDONLY)
    try:
        rows, damage = scan_samples(lambda at, length: os.pread(descriptor, length, at), size)
    finally:
        os.close(descriptor)
    table = np.array([row[:3] for row in rows], np.int64).reshape(-1, 3)
    sha256 = file_sha256(path) if with_sha256 else None
    offsets, sizes, labels = (table[:, i].astype(d) for i, d in enumerate(ARRAYS.values()))
    return ShardPart(
        name, size, sha256, offsets, sizes, labels, [{"shard": name, **item} for item in damage]
    )


def scan_samples(
    read_at: ReadAt, end: int
) -> tuple[list[tuple[int, int, int, str]], list[dict[str, Any]]]:
    """([(offset, size, label, key)], [{"key", "reason", "offset"}]) of the samples of one tar."""
    rows: list[tuple[int, int, int, str]] = []
    damage: list[dict[str, Any]] = []
    current, image, label, others = "", None, -1, []

    def close() -> None:
        if image is not None:
            rows.append((image.offset, image.size, label, current))
        elif current:
            reason = f"no image among its members: .{' .'.join(kind for kind, _ in others)}"
            damage.append({"key": current, "reason": reason[:200], "offset": others[0][1]})

    for member in scan(read_at, end):
        if isinstance(member, Damage):
            damage.append({"key": split_key(member.name)[0], "reason": member.reason,
                           "offset": member.offset})  # fmt: skip
            continue
        key, extension = split_key(member.name)
        if key != current:
            close()
            current, image, label, others = key, None, -1, []
        if extension in IMAGE_EXTENSIONS and image is None and key:
            image = member
        elif extension == "cls":
            label = _label(read_at(member.offset, min(member.size, 16)))
            if label < 0:
                damage.append({"key": key, "reason": "unreadable label", "offset": member.offset})
        if image is None and key:
            others.append((extension, member.offset))
    close()
    return rows, damage


def _label(raw: bytes) -> int:
    digits = raw.strip()
    return int(digits) if digits.isdigit() and int(digits) <= MAX_LABEL else -1
