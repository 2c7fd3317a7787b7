"""Cut a split into shards; pack one: read, check or shrink its images, write tar and index."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xcit_dino.data.config import MakeConfig
from xcit_dino.data.decode.rgb import BadImage, Deep, Scratch, decode, read_header, rescaled
from xcit_dino.data.pack.classes import Part
from xcit_dino.data.pack.image_file import Image, read_image
from xcit_dino.data.pack.shard_writer import SHARD_NAME, Sample, write_shard
from xcit_dino.data.pack.targets.boxes import checked_boxes
from xcit_dino.data.pack.targets.conventions import MaskCoding
from xcit_dino.data.pack.targets.masks import read_mask
from xcit_dino.data.parallel import Advance
from xcit_dino.data.rng import random_permutation, text_key
from xcit_dino.data.shards.index import ARRAYS, TARGET_ARRAYS, printable
from xcit_dino.data.shards.index_writer import ShardPart
from xcit_dino.data.targets.formats import check_target, decode_boxes, encode_mask
from xcit_dino.files import write_atomic

WORK = ".packing"  # finished shards' parts, until all are there
PLAN = "packing.json"  # what the shards were made of, and what was skipped or renamed
QUARANTINE = "quarantine.jsonl"
MAGIC = (  # the format of a file, regardless of its name
    (b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"),
    (b"II*\0", "tif"), (b"MM\0*", "tif"), (b"RIFF", "webp"),
)  # fmt: skip


@dataclass(frozen=True)
class Encoding:
    """How images are encoded when they are packed."""

    resize: int | None
    quality: int
    verify: bool
    bits: int | None = None


@dataclass(frozen=True)
class Shard:
    """One shard to be written; its bytes are a function of this alone."""

    folder: Path
    number: int
    first: int
    """Number of its first image in the split."""
    images: list[Image]
    labels: list[int]
    classes: list[str] | None
    encoding: Encoding
    masks: MaskCoding | None = None
    """How the images' masks are read, if they have some."""

    @property
    def name(self) -> str:
        return SHARD_NAME.format(self.number)


def cut(
    part: Part, folder: Path, config: MakeConfig, masks: MaskCoding | None = None
) -> list[Shard]:
    """The shards of a split. The size limits count source bytes, which are known beforehand."""
    images, labels = part.images, part.labels
    order: Iterable[int] = sorted(range(len(images)), key=lambda n: images[n].name)
    if config.shuffle:
        by_name = list(order)
        order = (by_name[n] for n in random_permutation(len(images), text_key("pack"), config.seed))
    groups: list[list[int]] = [[]]
    num_bytes = 0
    for n in order:
        full = (
            len(groups[-1]) >= config.shard_size or num_bytes + images[n].size > config.shard_bytes
        )
        if full and groups[-1]:
            groups.append([])
            num_bytes = 0
        groups[-1].append(n)
        num_bytes += images[n].size
    encoding = Encoding(config.resize, config.quality, config.verify, config.bits)
    firsts = np.cumsum([0, *map(len, groups)])
    return [
        Shard(folder, number, int(firsts[number]), [images[n] for n in group],
              [labels[n] for n in group], part.classes, encoding, masks)
        for number, group in enumerate(groups)
    ]  # fmt: skip


def fingerprint(shards: list[Shard]) -> str:
    """A digest of all that the bytes of the shards depend on, which excludes the source's path."""
    # Options that came later count only where they are given, so that old folders stay the same.
    how = repr(shards[0].encoding).replace(", bits=None", "")
    digest = hashlib.sha256(f"(1, {how}, {shards[0].classes!r})".encode())
    for shard in shards:
        names = [(image.name, image.size) for image in shard.images]
        digest.update(repr((shard.first, names, shard.labels)).encode("utf-8", "backslashreplace"))
        if targets := [_identity(image.target) for image in shard.images if image.target]:
            text = repr((targets, shard.masks))
            digest.update(text.encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _identity(target: Image | bytes) -> object:
    return target if isinstance(target, bytes) else (target.name, target.size)


def pack_shard(shard: Shard, advance: Advance) -> None:
    """Write one shard, and beside it its part of the index, which marks it complete."""
    bad: list[dict[str, Any]] = []
    scratch, found = Scratch(), Found()
    part = write_shard(shard.folder, shard.name, _samples(shard, bad, scratch, found, advance))
    buffer = io.BytesIO()
    deep = list(scratch.deep)
    meta = {"bytes": part.bytes, "sha256": part.sha256, "damage": bad, "deep": deep}
    arrays = {name: getattr(part, name) for name in ARRAYS}
    if part.targets:
        meta |= {"targets": part.targets, "notes": +found.notes, "classes": sorted(found.classes)}
        arrays |= {name: getattr(part, name) for name in TARGET_ARRAYS}
    np.savez(buffer, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)
    write_atomic(_part_path(shard), buffer.getvalue())


def _part_path(shard: Shard) -> Path:
    return shard.folder / WORK / f"{shard.name}.npz"


def load_part(shard: Shard) -> ShardPart | None:
    """What :func:`pack_shard` left, or None if the shard is not complete."""
    try:
        size = (shard.folder / shard.name).stat().st_size
        with np.load(_part_path(shard), allow_pickle=False) as file:
            meta = json.loads(file["meta"].tobytes())
            names = ARRAYS | TARGET_ARRAYS if meta.get("targets") else ARRAYS
            arrays = {name: file[name] for name in names}
    except (OSError, ValueError, KeyError):
        return None
    if size != meta["bytes"]:
        return None
    return ShardPart(shard.name, size, meta["sha256"], **arrays, damage=meta["damage"],
                     deep=Deep(*meta.get("deep", ())), targets=meta.get("targets"),
                     notes=meta.get("notes", {}), present=meta.get("classes", []))  # fmt: skip


# ---------------------------------------------------------------------------- one image


@dataclass
class Found:
    """What the targets of a shard were found to hold."""

    notes: Counter[str] = field(default_factory=Counter)
    """What was changed in them."""
    classes: set[int] = field(default_factory=set)


def _samples(
    shard: Shard, bad: list[dict[str, Any]], scratch: Scratch, found: Found, advance: Advance
) -> Iterator[Sample]:
    for number, (image, label) in enumerate(zip(shard.images, shard.labels, strict=True)):
        try:
            data, extension, height, width = _encode(read_image(image), shard.encoding, scratch)
            target = _target(shard, image, data, found)
        except BadImage as error:
            bad.append({"source": printable(image.name), "reason": str(error)})
        else:
            meta = {"source": printable(image.name), "height": height, "width": width}
            if shard.classes and label >= 0:
                meta["class"] = shard.classes[label]
            yield Sample(f"{shard.first + number:09d}", extension, data, label, meta, target)
        advance(1)


def _target(shard: Shard, image: Image, stored: bytes, found: Found) -> tuple[str, bytes] | None:
    """(kind, member) of an image's target, checked against the image as it is stored.

    Raises:
        BadImage: it cannot be used; the image is then skipped too.
    """
    if image.target is None:
        return None
    header = read_header(stored)
    if header.orientation > 1:
        raise BadImage(
            "its EXIF orientation turns the image, and perhaps not its target; turn the file itself"
        )
    if isinstance(image.target, bytes):
        raw = checked_boxes(image.target, header.height, header.width, found.notes)
        kind, content = "boxes", decode_boxes(raw)
    else:
        assert shard.masks is not None
        content = read_mask(image.target, shard.masks)
        kind, raw = "mask", encode_mask(content)
    found.classes |= set(check_target(content, header.height, header.width, None))
    return kind, raw


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
