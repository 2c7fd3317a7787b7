"""Index one WebDataset shard by its headers: its samples' places, sizes, labels and keys."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xcit_dino.data.decode.native import family_of
from xcit_dino.data.shards.index import ARRAYS, KEY, MAX_LABEL, TARGET_ARRAYS, TARGETS
from xcit_dino.data.shards.index_writer import ShardPart
from xcit_dino.data.shards.members import WEBDATASET, Members, read_label
from xcit_dino.data.shards.tar import Damage, Member, ReadAt, scan
from xcit_dino.errors import InputError
from xcit_dino.files import file_sha256

IMAGE_EXTENSIONS = frozenset(
    "jpg jpeg jpe jfif png webp bmp gif tif tiff ppm pgm pbm heic heif avif jp2 j2k jxl dcm".split()
)
ARRAY_EXTENSION = "npy"  # an image where there is no other: it may as well be an embedding
NO_IMAGES = frozenset("cls json txt npz pyd pth pt mp4 mp3 wav xml csv".split())
START = 132  # bytes by which formats are recognized
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")
APART = "members that lie apart from their image"


def is_image(start: bytes) -> bool:
    """Whether a file with these first ``START`` bytes is one, whatever its name."""
    webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    return webp or start.startswith(SIGNATURES) or family_of(start) is not None


class Row(NamedTuple):
    """What the headers of a tar say of one sample."""

    offset: int
    """Of its image, and then the image's length in bytes."""
    size: int
    label: int
    key: str
    target_offset: int = 0
    """Of its mask or boxes, and then their length; 0: none."""
    target_size: int = 0
    target: str | None = None
    """``mask`` or ``boxes``."""


def split_key(name: str) -> tuple[str, str]:
    """(key, extension) of a member as WebDataset splits them; ("", "") when there is no dot."""
    match = KEY.match(name)
    return (match[1], match[2].lower()) if match else ("", "")


def scan_shard(
    root: str | Path, name: str, *, with_sha256: bool, members: Members = WEBDATASET
) -> ShardPart:
    """Index one shard by its headers; its image data are only read for the checksum.

    A sample is a run of members with one key, as WebDataset has it; members of its key that lie
    elsewhere in the tar belong to it too. Its image is its first member with an image extension,
    its label the number in ``.cls``, or what ``members`` says, its target the ``.mask`` or
    ``.boxes``; a sample with an unreadable label keeps its place with label -1 and is listed in
    ``damage``, and so are samples without an image and whatever is not a member.
    """
    path = Path(root) / name
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDONLY)
    try:
        rows, damage = scan_samples(
            lambda at, length: os.pread(descriptor, length, at), size, members=members
        )
    finally:
        os.close(descriptor)
    table = np.array([row[:3] for row in rows], np.int64).reshape(-1, 3)
    sha256 = file_sha256(path) if with_sha256 else None
    offsets, sizes, labels = (table[:, i].astype(d) for i, d in enumerate(ARRAYS.values()))
    part = ShardPart(
        name, size, sha256, offsets, sizes, labels, [{"shard": name, **item} for item in damage]
    )
    kinds = {row.target: row.key for row in rows if row.target}
    if not kinds:
        return part
    if len(kinds) > 1:
        (first, one), (second, other) = sorted(kinds.items(), reverse=True)[:2]
        raise InputError(
            f"{path}: {one} has a {first} and {other} {second}; put each kind into "
            "shards of its own"
        )
    table = np.array([row[4:6] for row in rows], np.int64).reshape(-1, 2)
    columns = {n: table[:, i].astype(d) for i, (n, d) in enumerate(TARGET_ARRAYS.items())}
    return part._replace(targets=next(iter(kinds)), **columns)


class _Sample:
    """A run of members with one key."""

    def __init__(self, key: str):
        self.key, self.label = key, -1
        self.image: Member | None = None
        self.second: list[tuple[str, Member]] = []
        """Images whose extension has dots (``22.05.png``: key 22, extension 05.png)."""
        self.others: list[tuple[str, Member]] = []
        self.target: tuple[str, Member] | None = None
        """A mask or boxes."""
        self.guess: tuple[str, Member] | None = None
        """An image by its content alone."""


def scan_samples(
    read_at: ReadAt,
    end: int,
    passed: Counter[str] | None = None,
    members: Members = WEBDATASET,
) -> tuple[list[Row], list[dict[str, Any]]]:
    """(rows, [{"key", "reason", "offset"}]) of the samples of one tar.

    Members without a key (macOS's ``._x``) are passed over, as the webdataset library does, unless
    they begin as images do: names without an extension.

    Args:
        passed: counts the members that are neither image, label nor target, by extension, and those
            APART.
        members: which ones are the image and the label.
    """
    rows: list[Row] = []
    damage: list[dict[str, Any]] = []
    orphans: list[tuple[dict[str, Any], _Sample]] = []
    passed = Counter() if passed is None else passed
    sample = _Sample("")
    for member in scan(read_at, end):
        key, extension = split_key(member.name)
        if isinstance(member, Damage):
            damage.append({"key": key, "reason": member.reason, "offset": member.offset})
            continue
        if not key:
            hidden = member.name.rpartition("/")[2].startswith(".")
            if hidden or not is_image(read_at(member.offset, min(member.size, START))):
                hidden = member.name.rpartition("/")[2].startswith("._")
                passed["._ files of macOS" if hidden else "without a key"] += 1
                continue
            key, extension = member.name, "jpg"  # an image without an extension
        if key != sample.key:
            _close(sample, rows, damage, orphans, passed, members, read_at)
            sample = _Sample(key)
        _take(sample, extension, member, read_at, damage, members)
    _close(sample, rows, damage, orphans, passed, members, read_at)
    return rows, damage + _join(rows, orphans, passed)


def _join(
    rows: list[Row], orphans: list[tuple[dict[str, Any], _Sample]], passed: Counter[str]
) -> list[dict[str, Any]]:
    """Give samples the labels and targets that lie apart; returns what has no image anywhere.

    What is an image by its content alone (``.npy``) is none where its key names one elsewhere.
    """
    if not orphans:
        return []
    guesses = {sample.guess[1].offset for _, sample in orphans if sample.guess}
    named = {row.key for row in rows if row.offset not in guesses}
    rows[:] = [row for row in rows if row.offset not in guesses or row.key not in named]
    left, place = [], {row.key: n for n, row in enumerate(rows)}
    counts = Counter(row.key for row in rows)
    for item, sample in orphans:
        if sample.guess and item["key"] not in named:
            continue  # it is the image
        if sample.guess:
            passed[f".{sample.guess[0]}"] += 1
        row = place.get(item["key"])
        if row is None:
            left.append(item)
        elif counts[item["key"]] > 1:
            item["reason"] = "its key names several images elsewhere in the tar"
            left.append(item)
        else:
            passed[APART] += 1
            if rows[row].label < 0 <= sample.label:
                rows[row] = rows[row]._replace(label=sample.label)
            if rows[row].target is None:
                rows[row] = _with_target(rows[row], sample)
    return left


def _take(
    sample: _Sample, extension: str, member: Member, read_at: ReadAt, damage: list[dict[str, Any]],
    members: Members,
) -> None:  # fmt: skip
    kind, wanted = extension.rpartition(".")[2], members.image
    if sample.image is None and extension in ((wanted,) if wanted else IMAGE_EXTENSIONS):
        sample.image = member
    elif not wanted and kind in IMAGE_EXTENSIONS and extension not in IMAGE_EXTENSIONS:
        sample.second.append((extension, member))
    elif extension in TARGETS and (sample.target is None or sample.target[0] == extension):
        sample.target = (extension, member)
    elif extension in TARGETS and sample.target is not None:
        reason = f"{sample.target[0]} and {extension} in one sample: the second is not used"
        damage.append({"key": sample.key, "reason": reason, "offset": member.offset})
    else:
        sample.others.append((extension, member))
        inner = members.label == "cls" and kind == "cls" and sample.label < 0
        if extension == members.extension or inner:
            sample.label, shown = read_label(member, read_at, members)
            if sample.label < 0:
                reason = _unreadable(shown, members)
                damage.append({"key": sample.key, "reason": reason, "offset": member.offset})


def _unreadable(shown: str, members: Members) -> str:
    if members.numbers is not None:
        return f"label {shown[:60]!r} is none of the classes"
    what = f".{members.label} holds" if shown or members.label == "cls" else f"no {members.label}:"
    return f"unreadable label {shown[:60]!r}: {what} a number from 0 to {MAX_LABEL:,}"


def _close(
    sample: _Sample, rows: list[Row], damage: list[dict[str, Any]],
    orphans: list[tuple[dict[str, Any], _Sample]], passed: Counter[str], members: Members,
    read_at: ReadAt,
) -> None:  # fmt: skip
    """Take in a sample whose members are all read."""
    if not sample.key:
        return
    image, second = sample.image, sample.second
    if image is None and second:
        image = second[0][1]
        if len(second) > 1:
            taken, *left = (f".{extension}" for extension, _ in second)
            reason = (
                f"{len(second)} images in one sample: {taken} is taken, {' '.join(left)} not, "
                f"because a key ends at its first dot; rename the files, or choose with --rebuild "
                f"--image_key {second[0][0]}"
            )
            damage.append({"key": sample.key, "reason": reason[:300], "offset": image.offset})
        second = second[1:]
    if image is None and not members.image:
        sample.guess = _unnamed_image(sample, read_at)
        image = sample.guess[1] if sample.guess else None
    for extension in [e for e, _ in second] + [e for e, _ in sample.others]:
        if extension.rpartition(".")[2] != "cls" and extension != members.extension:
            passed[f".{extension}"] += 1
    if image is not None:
        row = Row(image.offset, image.size, sample.label, sample.key)
        rows.append(_with_target(row, sample))
        if sample.guess:
            orphans.append(({"key": sample.key, "reason": "", "offset": image.offset}, sample))
        return
    others = sample.others
    if sample.target is not None:
        others = [*others, sample.target]
    kinds = " .".join(extension for extension, _ in others)
    wanted = f".{members.image}" if members.image else "image"
    reason = f"no {wanted} among its members: .{kinds}"[:200]
    orphans.append(({"key": sample.key, "reason": reason, "offset": others[0][1].offset}, sample))


def _unnamed_image(sample: _Sample, read_at: ReadAt) -> tuple[str, Member] | None:
    """The member that is an image by its content: .npy, or of an extension that is no image's."""
    for number, (extension, member) in enumerate(sample.others):
        known = extension.rpartition(".")[2] in NO_IMAGES
        if not known and is_image(read_at(member.offset, min(member.size, START))):
            del sample.others[number]
            return extension, member
    return None


def _with_target(row: Row, sample: _Sample) -> Row:
    if sample.target is None:
        return row
    kind, member = sample.target
    return row._replace(target_offset=member.offset, target_size=member.size, target=kind)
