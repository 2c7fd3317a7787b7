"""What a training set is, read from its index and the headers of some images.

Without NumPy where images are JPEG, PNG and the like, because ``launch --dry_run`` uses it too.
"""

from __future__ import annotations

import array
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER = 128  # bytes that NumPy writes in front of an array of one dimension
LOOKED_AT = 100  # images whose headers are read, evenly spaced over the set
START = 1 << 16  # bytes that hold the header of nearly every image


@dataclass(frozen=True)
class Description:
    """A training set, as far as its files say."""

    images: int
    sides: tuple[int, ...] = ()
    """Shorter sides in pixels of some images, in ascending order; empty: unknown."""
    channels: int = 3
    dtype: str = "uint8"
    classes: int = 0
    """Classes of the labels; 0: there are none."""
    targets: str | None = None
    """What images have beside labels: ``mask``, ``boxes``, ``labels`` or ``values``."""
    val_images: int = 0
    """Images of the validation split."""

    def side(self, share: float) -> int:
        """The shorter side that a share of the images, 0 to 1, does not exceed."""
        return self.sides[round(share * (len(self.sides) - 1))]

    @property
    def text(self) -> str:
        """``"50,000 images, shorter sides of 32 pixels, 3 channels of uint8, 10 classes"``."""
        parts = [f"{self.images:,} images"]
        if self.sides:
            low, middle, high = (self.side(share) for share in (0.1, 0.5, 0.9))
            spread = f"{middle} pixels (80 % between {low} and {high})"
            parts.append(f"shorter sides of {f'{middle} pixels' if low == high else spread}")
        parts.append(f"{self.channels} channel{'s' * (self.channels > 1)} of {self.dtype}")
        parts.append(f"{self.classes:,} classes" if self.classes else "no labels")
        if self.targets:
            parts.append({"mask": "masks"}.get(self.targets, self.targets))
        return ", ".join(parts)


def describe(folder: Path) -> Description:
    """The set whose shards and index lie in a folder; sizes are unknown where the shards lie
    elsewhere, or no image can be read.

    Raises:
        OSError, ValueError, KeyError: there is no index, or it is damaged.
    """
    meta = json.loads((folder / "index.json").read_text())
    pixels = meta.get("pixels") or {}
    return Description(
        images=int(meta["samples"]),
        sides=tuple(sorted(_sides(folder, meta, evenly(int(meta["samples"]))))),
        channels=int(pixels.get("channels", 3)),
        dtype=str(pixels.get("dtype", "uint8")),
        classes=_classes(folder, meta),
        targets=meta.get("targets"),
    )


def evenly(count: int) -> list[int]:
    """Numbers of the images that are looked at."""
    looked_at = min(count, LOOKED_AT)
    return [n * count // looked_at for n in range(looked_at)]


def _classes(folder: Path, meta: dict[str, Any]) -> int:
    """How many classes the labels have: their names, or what the first million show."""
    labels = array.array("i")
    with (folder / "index.labels.npy").open("rb") as file:
        file.seek(HEADER)
        labels.frombytes(file.read(min(int(meta["samples"]), 1_000_000) * labels.itemsize))
    highest = max(labels, default=-1)
    return max(len(meta["classes"] or ()), highest + 1) if highest >= 0 else 0


def _integers(path: Path, width: int, places: Sequence[int]) -> list[int]:
    """Numbers at some places of an array that ``index_writer.py`` wrote."""
    found = []
    with path.open("rb") as file:
        for place in places:
            file.seek(HEADER + width * place)
            found.append(int.from_bytes(file.read(width), "little", signed=True))
    return found


def _sides(folder: Path, meta: dict[str, Any], samples: Sequence[int]) -> Iterator[int]:
    """Shorter sides of some images; those that cannot be read are left out."""
    offsets = _integers(folder / "index.offsets.npy", 8, samples)
    sizes = _integers(folder / "index.sizes.npy", 4, samples)
    shards = [(str(shard["name"]), int(shard["samples"])) for shard in meta["shards"]]
    first, number = 0, 0
    for sample, offset, size in zip(samples, offsets, sizes, strict=True):
        while sample >= first + shards[number][1]:
            first, number = first + shards[number][1], number + 1
        try:
            with (folder / shards[number][0]).open("rb") as file:
                file.seek(offset)
                raw = file.read(min(size, START))
                side = shorter_side(raw) or shorter_side(raw + file.read(size - len(raw)))
        except OSError:
            continue
        if side:
            yield side


def shorter_side(raw: bytes) -> int:
    """Of an encoded image, in pixels; 0: not known from these bytes."""
    from PIL import Image

    if raw.startswith(b"\x93NUMPY") or raw[128:132] == b"DICM":
        return _native_side(raw)
    try:
        with Image.open(io.BytesIO(raw)) as image:
            return min(image.size)
    except Exception:  # cut off, or of a kind that Pillow lacks
        return _native_side(raw)


def _native_side(raw: bytes) -> int:
    from xcit_dino.data.decode.native import open_native

    try:
        header = open_native(raw)
    except Exception:  # as above; what is damaged is found when the set is read
        return 0
    return min(header.height, header.width)
