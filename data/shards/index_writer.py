"""Write the index of a folder of shards, one shard's share after the other."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from xcit_dino.data.decode.rgb import Deep
from xcit_dino.data.pixels import RGB8, PixelFormat
from xcit_dino.data.shards.index import (
    ARRAYS,
    INDEX,
    NPY_HEADER,
    TARGET_ARRAYS,
    VERSION,
    ShardIndex,
    checksum_of,
    open_index,
)
from xcit_dino.errors import InputError
from xcit_dino.files import atomic_path, file_sha256, write_atomic


class ShardPart(NamedTuple):
    """One shard's share of an index; arrays hold one entry a sample."""

    name: str
    bytes: int
    sha256: str | None
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    damage: list[dict[str, Any]]
    deep: Deep = Deep()
    """Images of more than 8 bits."""
    targets: str | None = None
    """``mask`` or ``boxes`` where samples have one; the next two are then arrays."""
    target_offsets: np.ndarray | None = None
    target_sizes: np.ndarray | None = None
    notes: Mapping[str, int] | None = None
    """What was changed or noticed in the samples while they were packed, with counts."""
    present: Sequence[int] = ()
    """Classes that occur in the targets, while they are packed."""
    largest: int = 0
    """Pixels of the largest image, where they were counted."""


def write_index(
    root: str | Path,
    parts: Iterable[ShardPart],
    classes: list[str] | None,
    pixels: PixelFormat | Callable[[ShardIndex], PixelFormat] = RGB8,
    target_classes: list[str] | None = None,
    members: Mapping[str, str | None] | None = None,
) -> str:
    """Write the index of ``root`` from its shards in their order; returns the checksum.

    The old ``index.json`` goes first and the new one comes last, so that no reader ever sees
    arrays of another index. ``parts`` may be a generator: one part is held at a time. ``pixels``
    may be found out from an index of all but that. ``members`` is what :meth:`Members.dump` says
    of foreign shards, for whoever reads them again.

    Raises:
        InputError: some shards hold masks and others boxes.
    """
    root = Path(root)
    before = (root / INDEX).read_bytes() if (root / INDEX).exists() else None
    (root / INDEX).unlink(missing_ok=True)
    shards, targets = _write_arrays(root, parts)
    arrays = ARRAYS | TARGET_ARRAYS if targets else ARRAYS
    samples = sum(shard["samples"] for shard in shards)
    meta = {
        "version": VERSION, "samples": samples, "bytes": sum(shard["bytes"] for shard in shards),
        "classes": classes, "shards": shards,
        "arrays": {name: file_sha256(root / f"index.{name}.npy") for name in arrays},
    }  # fmt: skip
    if callable(pixels):
        try:
            pixels = pixels(open_index(str(root), root, meta | {"checksum": ""}))
        except BaseException:
            _undo(root, before, meta["arrays"])
            raise
    if (facts := pixels.dump()) is not None:
        meta["pixels"] = facts
    if targets:
        meta |= {"targets": targets, "target_classes": target_classes}
    for name in TARGET_ARRAYS.keys() - arrays.keys():
        (root / f"index.{name}.npy").unlink(missing_ok=True)  # of an earlier index
    if members is not None:
        meta["members"] = dict(members)
    meta["checksum"] = checksum_of(meta)
    write_atomic(root / INDEX, json.dumps(meta, indent=1))
    return meta["checksum"]


def _write_arrays(
    root: Path, parts: Iterable[ShardPart]
) -> tuple[list[dict[str, Any]], str | None]:
    """Write the arrays, one part after the other; returns what ``index.json`` says of each shard,
    and whether they hold masks or boxes.

    Raises:
        InputError: some shards hold masks and others boxes.
    """
    shards: list[dict[str, Any]] = []
    samples, targets, arrays = 0, None, dict(ARRAYS)
    with contextlib.ExitStack() as stack:
        files = {n: stack.enter_context(_opened(root / f"index.{n}.npy")) for n in ARRAYS}
        for file in files.values():
            file.write(bytes(NPY_HEADER))  # its text, the number of samples, comes last
        for part in parts:
            if part.targets and targets is None:
                targets, arrays = part.targets, ARRAYS | TARGET_ARRAYS
                for name, dtype in TARGET_ARRAYS.items():  # zeros for the samples before
                    files[name] = stack.enter_context(_opened(root / f"index.{name}.npy"))
                    files[name].truncate(NPY_HEADER + samples * dtype.itemsize)
                    files[name].seek(0, 2)
            if part.targets and part.targets != targets:
                raise InputError(
                    f"{root}: {part.name} holds {part.targets}, the shards before it {targets}; "
                    "put each kind into a folder of its own"
                )
            for name, file in files.items():
                values = getattr(part, name)
                values = np.zeros(len(part.offsets)) if values is None else values
                file.write(np.ascontiguousarray(values, arrays[name]).tobytes())
            samples += len(part.offsets)
            shards.append(
                {"name": part.name, "samples": len(part.offsets), "bytes": part.bytes,
                 "sha256": part.sha256}
            )  # fmt: skip
        for name, file in files.items():
            file.seek(0)
            header = {"descr": arrays[name].str, "fortran_order": False, "shape": (samples,)}
            np.lib.format.write_array_header_1_0(file, header)
            assert file.tell() == NPY_HEADER
    return shards, targets


def _undo(root: Path, before: bytes | None, digests: dict[str, str]) -> None:
    """Leave the folder as it was: the old index where its arrays are still the same, else none."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        if before is not None and json.loads(before)["arrays"] == digests:
            write_atomic(root / INDEX, before)
            return
    for name in ARRAYS:
        (root / f"index.{name}.npy").unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with atomic_path(path) as temporary, temporary.open("wb+") as file:
        yield file
