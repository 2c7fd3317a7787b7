"""Compare shards with their index and decode their images: the core of ``shards check``."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xcit_dino.data.decode.native import NativeHeader, decode_native, read_native_header
from xcit_dino.data.decode.rgb import (
    MAX_PIXELS,
    BadImage,
    Deep,
    Header,
    Scratch,
    decode,
    read_header,
)
from xcit_dino.data.io.storage import MAX_BYTES
from xcit_dino.data.parallel import Advance, map_processes
from xcit_dino.data.pixels import PixelFormat
from xcit_dino.data.shards.index import (
    ARRAYS,
    INDEX,
    MAX_LABEL,
    TARGET_ARRAYS,
    ShardIndex,
    arrays_of,
    printable,
    sparse_labels,
)
from xcit_dino.data.shards.members import WEBDATASET, Members, members_of
from xcit_dino.data.shards.scan import Row, scan_samples
from xcit_dino.data.targets.formats import check_target, decode_target
from xcit_dino.files import file_sha256
from xcit_dino.progress import progress

MAX_KEYS = 100_000_000  # keys compared across shards at most: 0.8 GB of digests
Report = Callable[[str, str], None]
"""``report(key, reason)`` records a problem of the current shard; key "" is the shard itself."""


@dataclass
class Finding:
    """Results of one shard, or of all."""

    decoded: int = 0
    seconds: float = 0.0
    """Spent reading and decoding, summed over processes."""
    hashed: int = 0
    """Shards whose checksum was compared."""
    bad: list[dict[str, Any]] = field(default_factory=list)
    deep: Deep = Deep()
    """Images of 16 bits."""
    passed: Counter[str] = field(default_factory=Counter)
    """Members that are neither image, label nor target, by extension."""
    targets: int = 0
    """Masks or lists of boxes that were decoded."""
    instances: Counter[int] = field(default_factory=Counter)
    """How many of these have each class."""
    members: Members = WEBDATASET
    """Which members the index takes."""
    keys: list[np.ndarray] = field(default_factory=list)
    """64-bit digests of the keys, one array a shard."""

    @property
    def keys_across(self) -> int:
        """How many keys are in several shards."""
        keys = np.concatenate(self.keys) if self.keys else np.zeros(0)
        return len(keys) - len(np.unique(keys))


@dataclass(frozen=True)
class _Task:
    path: str
    name: str
    bytes: int
    sha256: str | None
    expected: np.ndarray
    """int64 [samples, 5]: offset, size, label, and the target's offset and size, as the index has
    them."""
    picked: np.ndarray
    """Which of them to decode."""
    labeled: bool
    """The set has labels, so that a sample without one is a problem."""
    num_classes: int
    targets: str | None
    """Kind of the samples' targets, and the number of their classes."""
    target_classes: int | None
    pixels: PixelFormat
    members: Members


def verify_shards(index: ShardIndex, sample: int | None, num_workers: int | None) -> Finding:
    """Compare every shard with its index; decode all images, or ``sample`` evenly spread ones."""
    chosen = np.arange(index.num_samples)
    if sample is not None and sample < index.num_samples:
        chosen = np.linspace(0, index.num_samples - 1, sample).astype(np.int64)
    total = Finding(bad=_damaged_arrays(index))
    if gaps := sparse_labels(index.labels):
        reason = f"{gaps}; number the classes from 0 on (--label_map does, where they are packed)"
        total.bad.append({"shard": "index.labels.npy", "key": "", "reason": reason})
    tasks = _Tasks(index, chosen)
    total.members = tasks.members
    with progress(f"Check {Path(index.root).name}", len(chosen), "images") as bar:
        for finding in map_processes(_verify_shard, tasks, num_workers, bar):
            total.decoded += finding.decoded
            total.seconds += finding.seconds
            total.hashed += finding.hashed
            total.bad += finding.bad
            total.deep += finding.deep
            total.passed += finding.passed
            total.targets += finding.targets
            total.instances += finding.instances
            if index.num_samples <= MAX_KEYS:
                total.keys += finding.keys
    return total


class _Tasks(Sequence[_Task]):
    """The tasks of all shards, each made when it is requested."""

    def __init__(self, index: ShardIndex, chosen: np.ndarray):
        self.shard_index, self.chosen = index, chosen
        self.members = members_of(_meta(index), index.classes)
        self.labeled = bool(index.classes) or bool((np.asarray(index.labels) >= 0).any())

    def __len__(self) -> int:
        return len(self.shard_index.shards)

    def __getitem__(self, shard: int) -> _Task:  # type: ignore[override]
        if shard >= len(self):
            raise IndexError
        index = self.shard_index
        start = int(index.starts[shard])
        rows = slice(start, start + int(index.counts[shard]))
        count = int(index.counts[shard])
        columns = [
            np.zeros(count, np.int64) if (array := getattr(index, name)) is None
            else np.asarray(array[rows], np.int64)
            for name in ARRAYS | TARGET_ARRAYS
        ]  # fmt: skip
        first, last = np.searchsorted(self.chosen, [rows.start, rows.stop])
        return _Task(
            index.path(shard), index.shards[shard], int(index.shard_bytes[shard]),
            index.sha256[shard], np.stack(columns, 1), self.chosen[first:last] - start,
            self.labeled, len(index.classes) if index.classes else MAX_LABEL + 1,
            index.targets, len(index.target_classes) if index.target_classes else None,
            index.pixels,
            self.members,
        )  # fmt: skip


def _damaged_arrays(index: ShardIndex) -> list[dict[str, Any]]:
    meta = _meta(index)
    digests = meta["arrays"]
    return [
        {"shard": f"index.{name}.npy", "key": "", "reason": "checksum differs from index.json's"}
        for name in arrays_of(meta)
        if file_sha256(Path(index.root) / f"index.{name}.npy") != digests[name]
    ]


def _meta(index: ShardIndex) -> dict[str, Any]:
    return json.loads((Path(index.root) / INDEX).read_bytes())


def _verify_shard(task: _Task, advance: Advance) -> Finding:
    finding = Finding()

    def report(key: str, reason: str) -> None:
        bad = {"shard": task.name, "key": printable(key), "reason": printable(reason)}
        finding.bad.append(bad)

    try:
        descriptor = os.open(task.path, os.O_RDONLY)
    except OSError as error:
        report("", f"cannot be opened: {error.strerror}")
        advance(len(task.picked))
        return finding
    try:
        size = os.fstat(descriptor).st_size
        if size != task.bytes:
            report("", f"has {size} bytes, the index says {task.bytes}")
        if task.sha256 is not None:
            finding.hashed = 1
            if file_sha256(Path(task.path)) != task.sha256:
                report("", "checksum differs from the index's")
        rows, damage = scan_samples(
            lambda at, n: os.pread(descriptor, n, at), size, finding.passed, task.members
        )
        for item in damage:
            report(item["key"], f"{item['reason']} at byte {item['offset']}")
        found = np.array([(*row[:3], *row[4:6]) for row in rows], np.int64).reshape(-1, 5)
        if not np.array_equal(found, task.expected):
            report(
                "",
                f"{len(found)} samples, which are not the {len(task.expected)} of the index; if "
                "the shard was changed on purpose, shards check --rebuild makes another index",
            )
            if not damage:  # another tar: what the index says of it means nothing
                advance(len(task.picked))
                return finding
        keys = {row.offset: row.key for row in rows}
        _check_keys(list(keys.values()), finding, report)
        _check_labels(rows, {item["key"] for item in damage}, task, report)
        _decode(descriptor, task, keys, finding, report, advance)
    finally:
        os.close(descriptor)
    return finding


def _check_keys(keys: list[str], finding: Finding, report: Report) -> None:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            report(key, "duplicate key")
        seen.add(key)
    digests = [hashlib.blake2b(k.encode("utf-8", "replace"), digest_size=8).digest() for k in seen]
    finding.keys.append(np.frombuffer(b"".join(digests), np.uint64))


def _check_labels(rows: list[Row], reported: set[str], task: _Task, report: Report) -> None:
    for row in rows:
        label, key = row.label, row.key
        if task.labeled and label < 0 and key not in reported:
            report(key, "no label")
        elif label >= task.num_classes:
            report(key, f"label {label} out of range: there are {task.num_classes} classes")


def _decode(
    descriptor: int, task: _Task, keys: dict[int, str], finding: Finding, report: Report,
    advance: Advance,
) -> None:  # fmt: skip
    scratch, began = Scratch(), time.perf_counter()
    for offset, size, _, target, length in task.expected[task.picked].tolist():
        try:
            if not 0 < size <= MAX_BYTES:
                raise BadImage(f"{size} bytes are no image")
            raw = os.pread(descriptor, size, offset)
            if len(raw) < size:
                raise BadImage("the shard is truncated")
            header = _decode_one(raw, task.pixels, scratch)
            finding.decoded += 1
            if length and task.targets:
                content = decode_target(task.targets, os.pread(descriptor, length, target))
                found = check_target(content, header.height, header.width, task.target_classes)
                finding.targets += 1
                finding.instances.update(found)
        except (BadImage, OSError, ValueError) as error:
            report(keys.get(offset, f"at byte {offset}"), str(error))
        advance(1)
    finding.deep = scratch.deep
    finding.seconds = time.perf_counter() - began


def _decode_one(raw: bytes, pixels: PixelFormat, scratch: Scratch) -> Header | NativeHeader:
    """Raises BadImage where an image is damaged or not of the set's kind."""
    if pixels.is_rgb8:
        header = read_header(raw, pixels.max_pixels or MAX_PIXELS)
        decode(raw, header, scratch)
        return header
    native = read_native_header(raw, pixels)
    decode_native(raw, native, pixels)
    return native
