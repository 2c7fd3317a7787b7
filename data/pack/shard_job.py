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

from xcit_dino.data.decode.native import (
    Values,
    coded_format,
    decode_values,
    family_of,
    invalid,
    read_native_header,
)
from xcit_dino.data.decode.rgb import (
    MAX_PIXELS,
    BadImage,
    Deep,
    Header,
    Scratch,
    decode,
    read_header,
    rescaled,
)
from xcit_dino.data.pack.classes import Part
from xcit_dino.data.pack.image_file import Image, read_image
from xcit_dino.data.pack.shard_writer import SHARD_NAME, Sample, write_shard
from xcit_dino.data.pack.targets.boxes import checked_boxes
from xcit_dino.data.pack.targets.conventions import MaskCoding
from xcit_dino.data.pack.targets.masks import read_mask
from xcit_dino.data.parallel import Advance
from xcit_dino.data.pixels import PixelFormat
from xcit_dino.data.rng import random_permutation, text_key
from xcit_dino.data.shards.config import MakeConfig
from xcit_dino.data.shards.index import ARRAYS, TARGET_ARRAYS, printable
from xcit_dino.data.shards.index_writer import ShardPart
from xcit_dino.data.shards.kinds import RGB, PixelOptions
from xcit_dino.data.shards.measure import Meter, Shares, is_measured, meter
from xcit_dino.data.targets.formats import check_target, decode_boxes, encode_mask
from xcit_dino.files import write_atomic

WORK = ".packing"  # finished shards' parts, until all are there
PLAN = "packing.json"  # what the shards were made of, and what was skipped or renamed
QUARANTINE = "quarantine.jsonl"
MAGIC = (  # the format of a file, regardless of its name
    (b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"),
    (b"RIFF", "webp"),
)  # fmt: skip
FAMILIES = {"netpbm": "ppm", "npy": "npy", "tiff": "tif", "dicom": "dcm"}
LATER = {"bits": None, "pixels": RGB, "page": None, "nodata": None, "max_pixels": None}
MEASURED = "measured_"  # begins the names of the statistics in a part file


@dataclass(frozen=True)
class Encoding:
    """How images are encoded when they are packed."""

    resize: int | None
    quality: int
    verify: bool
    bits: int | None = None
    pixels: str = RGB
    page: int | None = None
    nodata: float | None = None
    max_pixels: int | None = None

    @property
    def form(self) -> PixelFormat | None:
        """Of the images, not measured yet; None for 8-bit RGB."""
        if self.pixels == RGB:
            return None
        return PixelOptions(self.pixels, self.page, self.nodata, self.max_pixels).form


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
    total: int = 0
    """Images of the whole split."""

    @property
    def name(self) -> str:
        return SHARD_NAME.format(self.number)


def cut(
    part: Part, folder: Path, config: MakeConfig, masks: MaskCoding | None = None
) -> list[Shard]:
    """The shards of a split, whose kind ``config.pixels`` names. The size limits count source
    bytes, which are known beforehand."""
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
    encoding = Encoding(
        config.resize, config.quality, config.verify, config.bits, config.pixels, config.page,
        config.nodata, config.max_pixels,
    )  # fmt: skip
    firsts = np.cumsum([0, *map(len, groups)])
    return [
        Shard(folder, number, int(firsts[number]), [images[n] for n in group],
              [labels[n] for n in group], part.classes, encoding, masks, len(images))
        for number, group in enumerate(groups)
    ]  # fmt: skip


def fingerprint(shards: list[Shard]) -> str:
    """A digest of all that the bytes of the shards depend on, which excludes the source's path."""
    # Options that came later count only where they are given, so that old folders stay the same.
    how = repr(shards[0].encoding)
    for name, default in LATER.items():
        how = how.replace(f", {name}={default!r}", "")
    digest = hashlib.sha256(f"(1, {how}, {shards[0].classes!r})".encode())
    for shard in shards:
        names = [(image.name, image.size) for image in shard.images]
        digest.update(repr((shard.first, names, shard.labels)).encode("utf-8", "backslashreplace"))
        if targets := [_identity(image.target) for image in shard.images if image.target]:
            text = repr((targets, shard.masks))
            digest.update(text.encode("utf-8", "backslashreplace"))
        if places := [tuple(image.place) for image in shard.images if image.place]:
            digest.update(repr(places).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _identity(target: Image | bytes) -> object:
    return target if isinstance(target, bytes) else (target.name, target.size)


class Work:
    """What packing one shard finds out beside the samples."""

    def __init__(self, shard: Shard) -> None:
        form = shard.encoding.form
        self.bad: list[dict[str, Any]] = []
        self.scratch = Scratch()
        self.largest = 0
        """Pixels of the largest image."""
        self.targets = Found()
        self.meter: Meter | None = meter(form, shard.total) if form else None

    def arrays(self) -> dict[str, np.ndarray]:
        shares = self.meter.shares() if self.meter else {}
        return {f"{MEASURED}{name}": np.asarray(value) for name, value in shares.items()}


def pack_shard(shard: Shard, advance: Advance) -> None:
    """Write one shard, and beside it its part of the index, which marks it complete."""
    work = Work(shard)
    part = write_shard(shard.folder, shard.name, _samples(shard, work, advance))
    buffer = io.BytesIO()
    meta = {
        "bytes": part.bytes, "sha256": part.sha256, "damage": work.bad,
        "deep": list(work.scratch.deep), "largest": work.largest,
    }  # fmt: skip
    arrays: dict[str, Any] = {name: getattr(part, name) for name in ARRAYS} | work.arrays()
    if part.targets:
        found = work.targets
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
                     notes=meta.get("notes", {}), present=meta.get("classes", []),
                     largest=meta.get("largest", 0))  # fmt: skip


def load_measured(shard: Shard) -> Shares:
    """The statistics of a complete shard, apart from its part because they are large."""
    with np.load(_part_path(shard), allow_pickle=False) as file:
        names = [name for name in file.files if name.startswith(MEASURED)]
        return {name.removeprefix(MEASURED): file[name] for name in names}


# ---------------------------------------------------------------------------- one image


@dataclass
class Found:
    """What the targets of a shard were found to hold."""

    notes: Counter[str] = field(default_factory=Counter)
    """What was changed in them."""
    classes: set[int] = field(default_factory=set)


def _samples(shard: Shard, work: Work, advance: Advance) -> Iterator[Sample]:
    for number, (image, label) in enumerate(zip(shard.images, shard.labels, strict=True)):
        number += shard.first
        try:
            data, extension, height, width = _encode(read_image(image), number, shard, work)
            target = _target(shard, image, data, work.targets)
        except BadImage as error:
            work.bad.append({"source": printable(image.name), "reason": str(error)})
        else:
            meta = {"source": printable(image.name), "height": height, "width": width}
            if image.place is not None:
                meta |= image.place._asdict() | {"scene": printable(image.place.scene)}
            work.largest = max(work.largest, height * width)
            if shard.classes and label >= 0:
                meta["class"] = shard.classes[label]
            yield Sample(f"{number:09d}", extension, data, label, meta, target)
        advance(1)


def _target(shard: Shard, image: Image, stored: bytes, found: Found) -> tuple[str, bytes] | None:
    """(kind, member) of an image's target, checked against the image as it is stored.

    Raises:
        BadImage: it cannot be used; the image is then skipped too.
    """
    if image.target is None:
        return None
    if isinstance(image.target, bytes) and image.target.startswith(b"["):
        content = json.loads(image.target)
        if content and isinstance(content[0], float):
            return "values", image.target
        found.classes |= set(content)
        return "labels", image.target
    form = shard.encoding.form
    if form is None:
        header = read_header(stored, shard.encoding.max_pixels or MAX_PIXELS)
    else:
        header = read_native_header(stored, form)
    if isinstance(header, Header) and header.orientation > 1:
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


def _encode(raw: bytes, number: int, shard: Shard, work: Work) -> tuple[bytes, str, int, int]:
    """(image as stored, extension, height, width).

    Raises:
        BadImage: it cannot be decoded, or is of another kind than the set.
    """
    how, scratch = shard.encoding, work.scratch
    if (form := how.form) is not None:
        return _encode_native(raw, number, shard, form, work)
    most = how.max_pixels or MAX_PIXELS
    header = read_header(raw, most)
    short = min(header.height, header.width)
    if how.bits is not None and header.deep:
        raw = rescaled(header, how.bits, scratch)
        header = read_header(raw, most)
    if how.resize is not None and short > how.resize:
        return _shrink(raw, how.resize, how.quality, scratch, most)
    if how.verify:
        decode(raw, header, scratch, reduce=8)  # in full, but with little arithmetic
    return raw, extension_of(raw), header.height, header.width


def extension_of(raw: bytes) -> str:
    """The format of a file by its first bytes, as members of shards are named."""
    if (family := family_of(raw[:132])) is not None:
        return FAMILIES.get(family) or str(coded_format(raw[:16]))
    return next((name for magic, name in MAGIC if raw.startswith(magic)), "ppm")


def _encode_native(
    raw: bytes, number: int, shard: Shard, form: PixelFormat, work: Work
) -> tuple[bytes, str, int, int]:
    """The same for other kinds than 8-bit RGB; measures the image."""
    how = shard.encoding
    header = read_native_header(raw, form)
    extension, height, width = extension_of(raw), header.height, header.width
    shrinks = how.resize is not None and min(height, width) > how.resize
    measured = is_measured(number, shard.total, how.verify or how.resize is not None)
    if shrinks or how.verify or measured:
        values = decode_values(header)
        mask = invalid(values, header.nodata if form.nodata is None else form.nodata)
        if shrinks:
            assert how.resize is not None
            values, mask = shrink(values, mask, how.resize, form.nodata)
            height, width = values.shape[:2]
            buffer = io.BytesIO()
            np.save(buffer, values)
            raw, extension = buffer.getvalue(), "npy"
        if measured and work.meter is not None:
            work.meter.add(number, values, mask)
    return raw, extension, height, width


def shrink(
    values: Values, mask: np.ndarray | None, side: int, nodata: float | None
) -> tuple[Values, np.ndarray | None]:
    """Shorter side to ``side`` with Pillow's antialiased bicubic in float32, rounded and clipped
    to the type [H, W, C]; with the new mask.

    Invalid pixels count as their channel's mean; new ones are those mainly made of them. They are
    NaN or ``nodata`` again, or, of integers without such a value, that mean.
    """
    import PIL.Image

    height, width = values.shape[:2]
    scale = side / min(height, width)
    size = (round(width * scale), round(height * scale))
    bicubic, box = PIL.Image.Resampling.BICUBIC, PIL.Image.Resampling.BOX
    small, holes = [], []
    for c in range(values.shape[2]):
        plane = values[..., c].astype(np.float32)
        if mask is not None:
            hole = mask[..., c]
            plane[hole] = plane[~hole].mean() if not hole.all() else 0
            share = PIL.Image.fromarray(hole.astype(np.float32)).resize(size, box)
            holes.append(np.asarray(share) > 0.5)
        small.append(np.asarray(PIL.Image.fromarray(plane).resize(size, bicubic)))
    result = np.stack(small, -1)
    if values.dtype.kind in "iu":
        limits = np.iinfo(values.dtype)
        result = np.rint(result).clip(limits.min, limits.max)
    result = result.astype(values.dtype)
    if mask is None:
        return result, None
    new = np.stack(holes, -1)
    if values.dtype.kind == "f":
        result[new] = np.nan
    elif nodata is not None:
        result[new] = nodata
    return result, new


def _shrink(
    raw: bytes, side: int, quality: int, scratch: Scratch, most: int
) -> tuple[bytes, str, int, int]:
    """Shorter side to ``side`` with Pillow's antialiased bicubic, as JPEG."""
    import PIL.Image
    import simplejpeg

    pixels = decode(raw, read_header(raw, most), scratch)
    height, width = pixels.shape[:2]
    scale = side / min(height, width)
    size = (round(width * scale), round(height * scale))
    small = PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BICUBIC)
    chroma = "444" if quality >= 90 else "420"
    data = simplejpeg.encode_jpeg(np.asarray(small), quality=quality, colorsubsampling=chroma)
    return data, "jpg", size[1], size[0]
