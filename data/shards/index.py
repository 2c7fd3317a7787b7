"""The shard index: which bytes of which shard hold sample number n, its label, and checksums.

A data set is a folder of WebDataset shards and four files:

``index.json``
    small: ``version samples bytes classes shards arrays checksum``, and ``pixels`` where the
    images are not 8-bit RGB (``data/pixels.py``); per shard its ``name``,
    ``samples``, ``bytes`` and ``sha256`` (null for foreign shards that were indexed without
    reading their data). SHA-256 because a run must notice damage *and* exchange, and because CPUs
    compute it in hardware: 1.8 GB/s a core, more than most storage delivers.
``index.offsets.npy index.sizes.npy index.labels.npy``
    one entry a sample in shard order: int64 position of the image's bytes in its shard, int32
    length, int32 label (-1: none). They are memory-mapped, so that 1e9 samples cost no memory and
    no start-up time, and one page is read for the samples that are requested.
``index.target_offsets.npy index.target_sizes.npy``
    where samples have a mask, boxes, several labels or values beside their image
    (``data/targets/formats.py``): ``index.json`` then has ``targets`` (``mask``, ``boxes``,
    ``labels`` or ``values``) and ``target_classes``, the names of their classes or null.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from xcit_dino.data.io.remote import Remote, Unreadable, persistent_chunks
from xcit_dino.data.pixels import RGB8, PixelFormat
from xcit_dino.data.shards.split_names import split_folders
from xcit_dino.data.shards.tar import name_behind
from xcit_dino.errors import InputError
from xcit_dino.files import write_atomic

VERSION = 1
INDEX = "index.json"
ARRAYS = {"offsets": np.dtype("<i8"), "sizes": np.dtype("<i4"), "labels": np.dtype("<i4")}
TARGET_ARRAYS = {"target_offsets": np.dtype("<i8"), "target_sizes": np.dtype("<i4")}
TARGETS = ("mask", "boxes", "labels", "values")
NPY_HEADER = 128  # bytes that NumPy writes in front of a one-dimensional array
MAX_LABEL = (1 << 24) - 1  # more classes than that are damage, and tables of them take gigabytes
SPARSE = 100_000  # below that many numbers, unused ones cost little
KEY = re.compile(r"^((?:.*/)?[^/.]+)\.([^/]+)$")  # WebDataset: the key ends at the first dot


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """An opened index. Samples are numbered from 0 in shard order.

    Attributes:
        root: folder or URL that the shard names are relative to.
        shards: names of the shards.
        counts, starts: int64 [shards], samples in each shard and number of its first sample.
        shard_bytes: int64 [shards].
        offsets, sizes, labels: memory-mapped, [num_samples]; see the module's docstring.
        classes: class names by label, or None.
        checksum: SHA-256 over everything above; two equal checksums mean the same data.
        pixels: what the images are; 8-bit RGB unless ``index.json`` says otherwise.
        targets: ``mask``, ``boxes``, ``labels`` or ``values`` where samples have such, else None.
        target_classes: names of the targets' classes by number, or None.
        target_offsets, target_sizes: like those of the images; size 0: this sample has none.
    """

    root: str
    shards: list[str]
    sha256: list[str | None]
    counts: np.ndarray
    starts: np.ndarray
    shard_bytes: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    classes: list[str] | None
    checksum: str
    pixels: PixelFormat = RGB8
    targets: str | None = None
    target_classes: list[str] | None = None
    target_offsets: np.ndarray | None = None
    target_sizes: np.ndarray | None = None

    @property
    def num_samples(self) -> int:
        return len(self.offsets)

    @staticmethod
    def load(root: str | Path) -> ShardIndex:
        """Open the index of a folder, or of a URL that fsspec supports (its files are cached here).

        Raises:
            InputError: there is no index, or it is damaged.
        """
        folder = _fetched(str(root)) if is_url(str(root)) else Path(root)
        return open_index(str(root), folder, _read_meta(str(root), folder))

    def __reduce__(self) -> tuple[Any, ...]:  # workers reopen the files instead of copying them
        return ShardIndex.load, (self.root,)

    def locate(self, sample: int) -> tuple[int, int, int]:
        """(shard number, position of the image in that shard, its length in bytes)."""
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return shard, int(self.offsets[sample]), int(self.sizes[sample])

    def locate_target(self, sample: int) -> tuple[int, int, int]:
        """(shard number, position of the target in that shard, its length; 0: there is none)."""
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        if self.target_offsets is None or self.target_sizes is None:
            return shard, 0, 0
        return shard, int(self.target_offsets[sample]), int(self.target_sizes[sample])

    def path(self, shard: int) -> str:
        """Path or URL of a shard."""
        return f"{self.root.rstrip('/')}/{self.shards[shard]}"


def sparse_labels(labels: np.ndarray) -> str | None:
    """What is wrong with labels that take far more numbers than there are classes, or None.

    A head has a row for every number from 0 to the highest: 0 and 16,000,000 would take 16,000,001.
    """
    highest = int(labels.max(initial=-1))
    if highest < SPARSE:
        return None
    seen = np.zeros(highest + 1, bool)
    for start in range(0, len(labels), 1 << 20):
        part = np.asarray(labels[start : start + (1 << 20)])
        seen[part[part >= 0]] = True
    present = int(seen.sum())
    if highest + 1 <= 10 * present:
        return None
    return f"labels go up to {highest:,}, but only {present:,} different ones occur"


def is_url(root: str) -> bool:
    return "://" in root


def printable(name: str) -> str:
    """A name whose bytes are no UTF-8, in text: ``\\udce9`` for the byte 0xE9 (PEP 383).

    The same function of a name of ``os.listdir`` gives the same text, so that both can be joined.
    """
    return name.encode("utf-8", "backslashreplace").decode()


def key_of(blocks: bytes) -> str:
    """A sample's key from the blocks in front of its image ("" when there is no tar header).

    The last 512 bytes are the image's own header; with some more, long names and names that are
    not ASCII are found too.
    """
    return printable(raw_key(blocks))


def raw_key(blocks: bytes) -> str:
    """:func:`key_of` whose bytes that are no UTF-8 can be encoded again (surrogateescape)."""
    name = name_behind(blocks)
    match = KEY.match(name)
    return match[1] if match else name


def resolve_split(root: str | Path, split: str) -> str:
    """The folder or URL that holds the shards of ``split`` ("train" or "val") below ``root``.

    ``root/train`` and ``root/val`` when they are there, or folders of other spellings; ``test`` is
    the validation set where there is no other. Otherwise ``root`` itself serves as the training set
    (and never as the validation set: accuracy on the bank itself means nothing).

    Raises:
        InputError: nothing there, or shards without an index, with the command that makes it.
    """
    root = str(root)
    inside = f"{root.rstrip('/')}/{split}"
    if _has_index(inside):
        return inside
    if spelled := _spelled(root, split):
        return f"{root.rstrip('/')}/{spelled}"
    own = _has_index(root)
    if own and split == "train":
        return root
    if own:
        raise InputError(
            f"--data_path {root} is one set of shards, and {split} needs another one: give a "
            "folder that holds train/ and val/, as made by: xcit-dino shards make SRC DST"
        )
    for folder in (inside, root):
        if not is_url(root) and next(Path(folder).glob("**/*.tar"), None) is not None:
            raise InputError(
                f"--data_path {root}: {folder} holds tars but no {INDEX}; "
                f"make it with: xcit-dino shards check {folder}"
            )
    raise InputError(
        f"--data_path {root}: no {split} shards there; "
        f"make them with: xcit-dino shards make SRC {root}"
    )


def _spelled(root: str, split: str) -> str | None:
    """The folder of a split under another name (``Training``, ``test``), if there is one.

    Raises:
        InputError: there are several.
    """
    if is_url(root):
        others = ("valid", "validation", "test") if split == "val" else ()
        return next((name for name in others if _has_index(f"{root.rstrip('/')}/{name}")), None)
    below = [path.name for path in Path(root).iterdir()] if Path(root).is_dir() else []
    known = split_folders(name for name in below if _has_index(f"{root}/{name}"))
    for wanted in (split, "test") if split == "val" else (split,):
        names = sorted(name for name, found in known.items() if found == wanted)
        if len(names) > 1:
            raise InputError(
                f"--data_path {root}: {' and '.join(names)} are both called like {split}; rename "
                f"the one to use: mv {shlex.quote(f'{root}/{names[0]}')} "
                f"{shlex.quote(f'{root}/{split}')}"
            )
        if names:
            return names[0]
    return None


# ---------------------------------------------------------------------------- reading an index


def _has_index(root: str) -> bool:
    if not is_url(root):
        return os.path.isfile(f"{root}/{INDEX}")
    try:
        return Remote(root).exists(INDEX)
    except Unreadable as failure:
        raise InputError(f"{root}/{INDEX} cannot be read: {failure}") from None


def _fetched(url: str) -> Path:
    """A local folder with the index files of ``url``: kept between runs, by content hash."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xcit_dino" / "index"
    try:
        return _fetch(url, Remote(url), cache)
    except Unreadable as failure:
        raise InputError(f"the index at {url} cannot be read: {failure}") from None
    except OSError as error:
        raise InputError(
            f"{cache}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written"
        ) from None


def _fetch(url: str, remote: Remote, cache: Path) -> Path:
    if not remote.exists(INDEX):
        raise InputError(f"no {INDEX} at {url}; copy it there beside the shards")
    raw = remote.whole(INDEX)
    folder = cache / hashlib.sha256(raw).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / INDEX, raw)
    meta = _read_meta(url, folder)
    for name, dtype in arrays_of(meta).items():
        file = folder / f"index.{name}.npy"
        if not file.exists():
            size = NPY_HEADER + meta["samples"] * dtype.itemsize
            pieces = persistent_chunks(remote.chunks, file.name, size)
            write_atomic(file, _verified(pieces, file.name, meta["arrays"][name]))
    return folder


def _verified(pieces: Iterable[bytes], name: str, sha256: str) -> Iterator[bytes]:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
        yield piece
    if digest.hexdigest() != sha256:
        raise Unreadable(f"{name} and {INDEX} do not belong together (checksum)")


def open_index(root: str, folder: Path, meta: dict[str, Any]) -> ShardIndex:
    """The index whose ``index.json`` holds ``meta``; its arrays lie in ``folder``."""
    try:
        shards = [str(shard["name"]) for shard in meta["shards"]]
        counts = np.array([shard["samples"] for shard in meta["shards"]], np.int64)
        num_bytes = np.array([shard["bytes"] for shard in meta["shards"]], np.int64)
        sha256 = [shard["sha256"] for shard in meta["shards"]]
        classes = meta["classes"]
        pixels = PixelFormat.parse(meta.get("pixels"))
        targets, target_classes = meta.get("targets"), meta.get("target_classes")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _damaged(root, INDEX, f"{type(error).__name__}: {error}") from None
    if pixels.max_pixels is not None:
        from xcit_dino.data.decode.rgb import allow_pixels

        allow_pixels(pixels.max_pixels)
    if (counts < 0).any() or not _are_names(classes) or not _are_names(target_classes):
        raise _damaged(root, INDEX, "counts below 0, or class names that are none")
    if unsafe := [name for name in shards if not _is_inside(name)]:
        raise _damaged(root, INDEX, f"shard name {unsafe[0]!r} leaves the folder")
    if targets is not None and targets not in TARGETS:
        raise _damaged(root, INDEX, f"targets {targets!r}, which this program does not know")
    arrays = {
        name: _map(root, folder / f"index.{name}.npy", int(counts.sum()), dtype)
        for name, dtype in arrays_of(meta).items()
    }
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    return ShardIndex(
        root, shards, sha256, counts, starts, num_bytes, **arrays, classes=classes,
        checksum=meta["checksum"], pixels=pixels, targets=targets, target_classes=target_classes,
    )  # fmt: skip


def _read_meta(root: str, folder: Path) -> dict[str, Any]:
    """The content of ``index.json``, once its version and checksum are verified."""
    try:
        meta = json.loads((folder / INDEX).read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"{root} has no {INDEX}; make shards with: xcit-dino shards make SRC {root}, "
            f"or index shards that are there with: xcit-dino shards check {root}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise _damaged(root, INDEX, str(error)) from None
    try:
        if meta["version"] != VERSION:
            raise InputError(
                f"{root}/{INDEX} has version {meta['version']!r}; this program reads {VERSION}"
            )
        if meta["checksum"] != checksum_of(meta):
            raise _damaged(root, INDEX, "its checksum does not fit its content")
        if type(meta["samples"]) is not int or not meta["arrays"].keys() >= arrays_of(meta).keys():
            raise _damaged(root, INDEX, "it lacks numbers that every index has")
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(root, INDEX, f"{type(error).__name__}: {error}") from None
    return meta


def _are_names(classes: Any) -> bool:
    return classes is None or (
        isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    )


def _is_inside(name: str) -> bool:
    """Shard names are plain relative paths: an index from elsewhere must not name a file or URL."""
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or ":" in name or "\0" in name)


def arrays_of(meta: dict[str, Any]) -> dict[str, np.dtype[Any]]:
    """Names and types of the arrays of an index, by its ``index.json``."""
    return ARRAYS | (TARGET_ARRAYS if meta.get("targets") else {})


def _map(root: str, path: Path, length: int, dtype: np.dtype[Any]) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(root, path.name, str(error)) from None
    if array.shape != (length,) or array.dtype != dtype:
        raise _damaged(root, path.name, f"holds {array.dtype} {array.shape}, not {length} samples")
    return array


def _damaged(root: str, name: str, why: str) -> InputError:
    return InputError(
        f"{root}/{name} cannot be used ({why}); build it again with: "
        f"xcit-dino shards check {root} --rebuild"
    )


def checksum_of(meta: dict[str, Any]) -> str:
    """SHA-256 of an ``index.json``'s content, which names the arrays' own."""
    content = {name: value for name, value in meta.items() if name != "checksum"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
