"""The shard index: which bytes of which shard hold sample number n, its label, and checksums.

A data set is a folder of WebDataset shards and four files:

``index.json``
    small: ``version samples bytes classes shards arrays checksum``; per shard its ``name``,
    ``samples``, ``bytes`` and ``sha256`` (null for foreign shards that were indexed without
    reading their data). SHA-256 because a run must notice damage *and* exchange, and because CPUs
    compute it in hardware: 1.8 GB/s a core, more than most storage delivers.
``index.offsets.npy index.sizes.npy index.labels.npy``
    one entry a sample in shard order: int64 position of the image's bytes in its shard, int32
    length, int32 label (-1: none). They are memory-mapped, so that 1e9 samples cost no memory and
    no start-up time, and one page is read for the samples that are asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

import numpy as np

from xcit_dino.errors import InputError

VERSION = 1
INDEX = "index.json"
ARRAYS = {"offsets": np.dtype("<i8"), "sizes": np.dtype("<i4"), "labels": np.dtype("<i4")}
NPY_HEADER = 128  # bytes that NumPy writes in front of a one-dimensional array
MAX_LABEL = (1 << 31) - 1
KEY = re.compile(r"^((?:.*/)?[^/.]+)\.([^/]+)$")  # WebDataset: the key ends at the first dot


class ShardPart(NamedTuple):
    """One shard's share of an index; arrays hold one entry a sample."""

    name: str
    bytes: int
    sha256: str | None
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    damage: list[dict[str, Any]]


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

    @property
    def num_samples(self) -> int:
        return len(self.offsets)

    @staticmethod
    def load(root: str | Path) -> ShardIndex:
        """Open the index of a folder, or of a URL that fsspec knows (its files are cached here).

        Raises:
            InputError: there is no index, or it is damaged.
        """
        folder = _fetched(str(root)) if is_url(str(root)) else Path(root)
        return _open(str(root), folder)

    def __reduce__(self) -> tuple[Any, ...]:  # workers reopen the files instead of copying them
        return ShardIndex.load, (self.root,)

    def locate(self, sample: int) -> tuple[int, int, int]:
        """(shard number, position of the image in that shard, its length in bytes)."""
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return shard, int(self.offsets[sample]), int(self.sizes[sample])

    def path(self, shard: int) -> str:
        """Path or URL of a shard."""
        return f"{self.root.rstrip('/')}/{self.shards[shard]}"


def is_url(root: str) -> bool:
    return "://" in root


def key_of(header: bytes) -> str:
    """A sample's key from the 512 bytes in front of its image ("" when they are no tar header)."""
    name = header[:100].split(b"\0", 1)[0].decode("utf-8", "replace")
    match = KEY.match(name)
    return match[1] if match else name


def resolve_split(root: str | Path, split: str) -> str:
    """The folder or URL that holds the shards of ``split`` ("train" or "val") below ``root``.

    ``root/train`` and ``root/val`` when they are there; otherwise ``root`` itself serves as the
    training set (and never as the validation set: accuracy on one's own bank means nothing).

    Raises:
        InputError: nothing there, or shards without an index, with the command that makes it.
    """
    root = str(root)
    inside = f"{root.rstrip('/')}/{split}"
    if _exists(f"{inside}/{INDEX}"):
        return inside
    own = _exists(f"{root.rstrip('/')}/{INDEX}")
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


# ---------------------------------------------------------------------------- reading an index


def _exists(path: str) -> bool:
    if not is_url(path):
        return os.path.isfile(path)
    import fsspec

    fs, inner = fsspec.core.url_to_fs(path)
    return bool(fs.exists(inner))


def _fetched(url: str) -> Path:
    """A local folder with the index files of ``url``: kept between runs, keyed by the checksum."""
    import fsspec

    try:
        with cast(Any, fsspec.open(f"{url.rstrip('/')}/{INDEX}", "rb")) as file:
            raw = file.read()
    except FileNotFoundError:
        raise InputError(f"no {INDEX} at {url}; copy it there beside the shards") from None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xcit_dino"
    folder = cache / "index" / hashlib.sha256(raw).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    for name in ARRAYS:
        if not (folder / f"index.{name}.npy").exists():
            with cast(Any, fsspec.open(f"{url.rstrip('/')}/index.{name}.npy", "rb")) as file:
                write_atomically(
                    folder / f"index.{name}.npy", iter(partial(file.read, 1 << 22), b"")
                )
    write_atomically(folder / INDEX, [raw])
    return folder


def _open(root: str, folder: Path) -> ShardIndex:
    path = folder / INDEX
    try:
        meta = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"{root} has no {INDEX}; make shards with: xcit-dino shards make SRC {root}, "
            f"or index shards that are there with: xcit-dino shards check {root}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    try:
        if meta["version"] != VERSION:
            raise InputError(
                f"{path} has version {meta['version']!r}; this program reads {VERSION}"
            )
        if meta["checksum"] != _checksum(meta):
            raise _damaged(path, "its checksum does not fit its content")
        shards = [str(shard["name"]) for shard in meta["shards"]]
        counts = np.array([shard["samples"] for shard in meta["shards"]], np.int64)
        num_bytes = np.array([shard["bytes"] for shard in meta["shards"]], np.int64)
        sha256 = [shard["sha256"] for shard in meta["shards"]]
        classes = meta["classes"]
    except (KeyError, TypeError, OverflowError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None
    if (counts < 0).any() or not _are_names(classes):
        raise _damaged(path, "counts below 0, or class names that are none")
    if unsafe := [name for name in shards if not _is_inside(name)]:
        raise _damaged(path, f"shard name {unsafe[0]!r} leaves the folder")
    arrays = {name: _map(folder / f"index.{name}.npy", int(counts.sum())) for name in ARRAYS}
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    return ShardIndex(
        root, shards, sha256, counts, starts, num_bytes, **arrays, classes=classes,
        checksum=meta["checksum"],
    )  # fmt: skip


def _are_names(classes: Any) -> bool:
    return classes is None or (
        isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    )


def _is_inside(name: str) -> bool:
    """Shard names are plain relative paths: an index from elsewhere must not name a file or URL."""
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or ":" in name or "\0" in name)


def _map(path: Path, length: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, str(error)) from None
    if array.shape != (length,) or array.dtype != ARRAYS[path.name.split(".")[1]]:
        raise _damaged(path, f"holds {array.dtype} {array.shape}, not {length} samples")
    return array


def _damaged(path: Path, why: str) -> InputError:
    return InputError(
        f"{path} cannot be used ({why}); build it again with: "
        f"xcit-dino shards check {path.parent} --rebuild"
    )


def _checksum(meta: dict[str, Any]) -> str:
    content = {name: value for name, value in meta.items() if name != "checksum"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------------------- writing an index


def write_atomically(path: Path, pieces: Iterable[bytes]) -> None:
    """Write ``pieces`` under a temporary name, flush them to disk, then give the final name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_index(root: str | Path, parts: Iterable[ShardPart], classes: list[str] | None) -> str:
    """Write the index of ``root`` from its shards in their order; returns the checksum.

    The old ``index.json`` goes first and the new one comes last, so that no reader ever sees
    arrays of another index. ``parts`` may be a generator: one part is held at a time.
    """
    root, shards = Path(root), []
    (root / INDEX).unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        files = {n: stack.enter_context((root / f".index.{n}.tmp").open("wb+")) for n in ARRAYS}
        for file in files.values():
            file.write(bytes(NPY_HEADER))  # its text, the number of samples, comes last
        for part in parts:
            for name, file in files.items():
                file.write(np.ascontiguousarray(getattr(part, name), ARRAYS[name]).tobytes())
            shards.append(
                {"name": part.name, "samples": len(part.offsets), "bytes": part.bytes,
                 "sha256": part.sha256}
            )  # fmt: skip
        samples = sum(shard["samples"] for shard in shards)
        for name, file in files.items():
            file.seek(0)
            header = {"descr": ARRAYS[name].str, "fortran_order": False, "shape": (samples,)}
            np.lib.format.write_array_header_1_0(file, header)
            assert file.tell() == NPY_HEADER
            file.flush()
            os.fsync(file.fileno())
    for name in ARRAYS:
        (root / f".index.{name}.tmp").replace(root / f"index.{name}.npy")
    meta = {
        "version": VERSION, "samples": samples, "bytes": sum(shard["bytes"] for shard in shards),
        "classes": classes, "shards": shards,
        "arrays": {name: file_sha256(root / f"index.{name}.npy") for name in ARRAYS},
    }  # fmt: skip
    meta["checksum"] = _checksum(meta)
    write_atomically(root / INDEX, [json.dumps(meta, indent=1).encode()])
    return meta["checksum"]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
