"""Write the index of a folder of shards, one shard's share after the other."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from xcit_dino.data.decode.rgb import Deep
from xcit_dino.data.pixels import RGB8, PixelFormat
from xcit_dino.data.shards.index import ARRAYS, INDEX, NPY_HEADER, VERSION, checksum_of
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


def write_index(
    root: str | Path,
    parts: Iterable[ShardPart],
    classes: list[str] | None,
    pixels: PixelFormat = RGB8,
) -> str:
    """Write the index of ``root`` from its shards in their order; returns the checksum.

    The old ``index.json`` goes first and the new one comes last, so that no reader ever sees
    arrays of another index. ``parts`` may be a generator: one part is held at a time.
    """
    root, shards = Path(root), []
    (root / INDEX).unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        files = {n: stack.enter_context(_opened(root / f"index.{n}.npy")) for n in ARRAYS}
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
    meta = {
        "version": VERSION, "samples": samples, "bytes": sum(shard["bytes"] for shard in shards),
        "classes": classes, "shards": shards,
        "arrays": {name: file_sha256(root / f"index.{name}.npy") for name in ARRAYS},
    }  # fmt: skip
    if (facts := pixels.dump()) is not None:
        meta["pixels"] = facts
    meta["checksum"] = checksum_of(meta)
    write_atomic(root / INDEX, json.dumps(meta, indent=1))
    return meta["checksum"]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with atomic_path(path) as temporary, temporary.open("wb+") as file:
        yield file
