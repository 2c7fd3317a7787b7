"""Pack one shard: read its images, check or shrink them, write the tar and what the index needs."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xcit_dino.data.decode import BadImage, Deep, Scratch, decode, read_header, rescaled
from xcit_dino.data.pack.image_file import Image, read_image
from xcit_dino.data.pack.shard_writer import SHARD_NAME, Sample, write_shard
from xcit_dino.data.parallel import Advance
from xcit_dino.data.shards.index import ARRAYS, printable
from xcit_dino.data.shards.index_writer import ShardPart
from xcit_dino.files import write_atomic

WORK = ".packing"  # finished shards' parts, until all are there
PLAN = "packing.json"  # what the shards were made of, and what was left out or renamed
QUARANTINE = "quarantine.jsonl"
MAGIC = (  # what a file is, whatever its name says
    (b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"),
    (b"II*\0", "tif"), (b"MM\0*", "tif"), (b"RIFF", "webp"),
)  # fmt: skip


@dataclass(frozen=True)
class Encoding:
    """What becomes of an image on its way into a shard."""

    resize: int | None
    quality: int
    verify: bool
    bits: int | None = None


@dataclass(frozen=True)
class Shard:
    """One shard to be written: a function of this is all that a process computes."""

    folder: Path
    number: int
    first: int
    """Number of its first image in the split."""
    images: list[Image]
    labels: list[int]
    classes: list[str] | None
    encoding: Encoding

    @property
    def name(self) -> str:
        return SHARD_NAME.format(self.number)


def pack_shard(shard: Shard, advance: Advance) -> None:
    """Write one shard, and beside it its part of the index, which says that it is complete."""
    bad: list[dict[str, Any]] = []
    scratch = Scratch()
    part = write_shard(shard.folder, shard.name, _samples(shard, bad, scratch, advance))
    buffer = io.BytesIO()
    deep = list(scratch.deep)
    meta = {"bytes": part.bytes, "sha256": part.sha256, "damage": bad, "deep": deep}
    arrays = {name: getattr(part, name) for name in ARRAYS}
    np.savez(buffer, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)
    write_atomic(_part_path(shard), buffer.getvalue())


def _part_path(shard: Shard) -> Path:
    return shard.folder / WORK / f"{shard.name}.npz"


def load_part(shard: Shard) -> ShardPart | None:
    """What :func:`pack_shard` left, or None if the shard is not complete."""
    try:
        size = (shard.folder / shard.name).stat().st_size
        with np.load(_part_path(shard), allow_pickle=False) as file:
            meta, arrays = json.loads(file["meta"].tobytes()), {name: file[name] for name in ARRAYS}
    except (OSError, ValueError, KeyError):
        return None
    if size != meta["bytes"]:
        return None
    return ShardPart(shard.name, size, meta["sha256"], **arrays, damage=meta["damage"],
                     deep=Deep(*meta.get("deep", ())))  # fmt: skip


# ---------------------------------------------------------------------------- one image


def _samples(
    shard: Shard, bad: list[dict[str, Any]], scratch: Scratch, advance: Advance
) -> Iterator[Sample]:
    for number, (image, label) in enumerate(zip(shard.images, shard.labels, strict=True)):
        try:
            data, extension, height, width = _encode(read_image(image), shard.encoding, scratch)
        except BadImage as error:
            bad.append({"source": printable(image.name), "reason": str(error)})
        else:
            meta = {"source": printable(image.name), "height": height, "width": width}
            if shard.classes and label >= 0:
                meta["class"] = shard.classes[label]
            yield Sample(f"{shard.first + number:09d}", extension, data, label, meta)
        advance(1)


def _encode(raw: bytes, how: Encoding, scratch: Scratch) -> tuple[bytes, str, int, int]:
    """(image as stored, extension, height, width).

    Raises:
        BadImage: it cannot be decoded.
    """
    header = read_header(raw)
    short = min(header.height, header.width)
    if how.bits is not None and header.deep:
        raw = rescaled(header, how.bits, scratch)
        header = read_header(raw)
    if how.resize is not None and short > how.resize:
        return _shrink(raw, how.resize, how.quality, scratch)
    if how.verify:
        decode(raw, header, scratch, reduce=8)  # in full, but with little arithmetic
    extension = next((name for magic, name in MAGIC if raw.startswith(magic)), "ppm")
    return raw, extension, header.height, header.width


def _shrink(raw: bytes, side: int, quality: int, scratch: Scratch) -> tuple[bytes, str, int, int]:
    """Shorter side to ``side`` with Pillow's antialiased bicubic, as JPEG."""
    import PIL.Image
    import simplejpeg

    pixels = decode(raw, read_header(raw), scratch)
    height, width = pixels.shape[:2]
    scale = side / min(height, width)
    size = (round(width * scale), round(height * scale))
    small = PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BICUBIC)
    chroma = "444" if quality >= 90 else "420"
    data = simplejpeg.encode_jpeg(np.asarray(small), quality=quality, colorsubsampling=chroma)
    return data, "jpg", size[1], size[0]
