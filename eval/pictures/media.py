"""Photos, animations and videos in a folder: their frames, and the files of the pictures that are
drawn of them.

Of ``photo.jpg``: a folder ``DST/photo`` (``DST/photo.jpg`` if there is also a ``photo.png``); of an
animated GIF or WebP ``DST/clip.gif``; of a video ``DST/video.mp4``.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from xcit_dino.data import video
from xcit_dino.data.decode.rgb import (
    MAX_PIXELS,
    BadImage,
    Scratch,
    decode,
    read_header,
    say_deep,
)
from xcit_dino.data.native.crops import resized_values
from xcit_dino.data.native.single import values_of_file
from xcit_dino.errors import InputError
from xcit_dino.eval.context import Context
from xcit_dino.eval.pictures import false_color
from xcit_dino.files import write_atomic

SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".npy",
    ".dcm", ".heic", ".avif", ".jp2", ".jxl",
)  # fmt: skip
ANIMATED = (".gif", ".webp")
ENDINGS = ("", ".gif", ".mp4")  # of outputs: a folder, an animation, a video
WRITTEN = re.compile(r"(head-\d+|mean|patches|foreground|all)\.png|attention\.npy")  # in a folder
Pixels = NDArray[np.uint8]
Values = NDArray[Any]
Drawing = Callable[[Values], dict[str, Pixels]]
"""An image [H, W, C] in its own units -> pictures of it by name; one is ``all``."""


def images_in(src: Path) -> list[Path]:
    """The file, or all images of a folder sorted by name.

    Raises:
        InputError: there is none.
    """
    if src.is_dir():
        files = sorted(path for path in src.iterdir() if readable(path))
    else:
        files = [src] if src.is_file() else []
    if not files:
        raise InputError(f"{src}: no image there; give a photo, a GIF, a video or a folder of them")
    if not readable(files[0]):
        known = " ".join(SUFFIXES + video.SUFFIXES)
        raise InputError(f"{src}: files of this kind cannot be read, only {known}")
    return files


def readable(path: Path) -> bool:
    """Whether the suffix is that of a photo, animation or video."""
    return path.suffix.lower() in SUFFIXES + video.SUFFIXES


def output_names(files: list[Path], dst: Path) -> dict[Path, str]:
    """Output name of each file: ``photo`` for ``photo.jpg``; if two would then have the same
    name (``photo.png``), ``photo.jpg`` for all of them.

    Raises:
        InputError: two would still have the same name, or would replace other files.
    """
    same: list[str] = []
    for names in ([path.stem for path in files], [path.name for path in files]):
        taken = Counter(f"{name}{end}".casefold() for name in names for end in ENDINGS)
        if max(taken.values()) == 1:
            check_free(files, names, dst)
            return dict(zip(files, names, strict=True))
        both = next(name for name, count in taken.items() if count > 1)
        same = [
            path.name
            for path, name in zip(files, names, strict=True)
            if both in [f"{name}{end}".casefold() for end in ENDINGS]
        ]
        if names[0] == files[0].stem:
            print(f"{same[0]} and {same[1]} have the same stem: all maps keep the endings")
    raise InputError(
        f"{files[0].parent}: the maps of {same[0]} and {same[1]} would be one file; rename one"
    )


def check_free(files: list[Path], names: list[str], dst: Path) -> None:
    """Check that the maps replace nothing but maps of an earlier call.

    Raises:
        InputError: names what would be replaced.
    """
    sources = {path.resolve() for path in files}
    for place in (dst / f"{name}{end}" for name in names for end in ENDINGS):
        inside = [path.name for path in place.iterdir()] if place.is_dir() else []
        other = [name for name in inside if not WRITTEN.fullmatch(name)]
        if place.resolve() in sources or other:
            what = f"holds {sorted(other)[0]}, not of attention" if other else "is a source"
            raise InputError(f"{place}: {what}; name another folder for the maps")


def read_image(path: Path, context: Context) -> Iterator[tuple[Values, int]]:
    """Yield every frame [H, W, C] of a photo or animation in its own units, and its duration in ms.

    Raises:
        BadImage: it cannot be read.
    """
    yield from read_frames(path) if false_color.is_plain(context) else read_values(path, context)


def read_frames(path: Path) -> Iterator[tuple[Pixels, int]]:
    """Yield RGB pixels [H, W, 3] and duration in ms of every frame; a photo has one.

    Raises:
        BadImage: it cannot be read, or is too large.
    """
    raw = path.read_bytes()
    header = read_header(raw)
    if path.suffix.lower() not in ANIMATED:
        pixels = decode(raw, header, scratch := Scratch())
        say_deep(scratch.deep, str(path))
        yield pixels, 0
        return
    with Image.open(path) as image:
        if image.width * image.height * getattr(image, "n_frames", 1) > MAX_PIXELS:
            raise BadImage("the animation has too many pixels; take fewer frames")
        for frame in ImageSequence.Iterator(image):
            yield np.asarray(frame.convert("RGB")), int(frame.info.get("duration", 100))


def read_values(path: Path, context: Context) -> Iterator[tuple[Values, int]]:
    """Yield the values [H, W, C] of an image that is not 8-bit RGB, with a duration of 0.

    Raises:
        BadImage: it cannot be read, or has other channels than the network takes.
    """
    yield values_of_file(path.read_bytes(), context.inputs), 0


def resize_to_patches(pixels: Values, image_size: int, patch: int) -> Values:
    """Resize the shorter side to ``image_size`` (0: keep it), and both to whole patches."""
    sides = pixels.shape[:2]
    factor = image_size / min(sides) if image_size else 1.0
    height, width = (max(1, round(side * factor / patch)) * patch for side in sides)
    return resized(pixels, height, width)


def resized(pixels: Values, height: int, width: int) -> Values:
    """Resize an image [H, W, C], bicubic, antialiased."""
    if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
        photo = Image.fromarray(pixels.astype(np.uint8, copy=False))
        return np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC))
    values = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
    return resized_values(values, [height, width])[0].permute(1, 2, 0).numpy()


def save(path: Path, pictures: list[Pixels], **options: Any) -> None:
    """Write a PNG, or a GIF of several, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    first, *rest = (Image.fromarray(picture) for picture in pictures)
    more = {"save_all": True, "append_images": rest} if rest else {}
    first.save(content, path.suffix[1:], **more, **options)
    write_atomic(path, content.getvalue())
