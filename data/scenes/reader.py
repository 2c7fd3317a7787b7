"""A large image that is read in parts: TIFF of any kind, and ``.npy``. Others are decoded whole.

Values are those of the native decoders (``data/decode/native.py``): the same types, white-is-zero
inverted, pages of one size stacked as channels.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from xcit_dino.data.decode import rgb
from xcit_dino.data.decode.extras import require
from xcit_dino.data.decode.native import (
    Values,
    Wanted,
    as_dtype,
    check_size,
    decode_values,
    dtype_of,
    family_of,
    open_native,
)
from xcit_dino.data.decode.rgb import MAX_PIXELS, BadImage
from xcit_dino.data.decode.tiff_file import nodata_of, pages_of, shape_of
from xcit_dino.data.pack.image_file import Image, read_image
from xcit_dino.data.scenes.tiff_windows import Window
from xcit_dino.errors import one_line

START = 132
MAX_SIDE = 1 << 24
SCANNERS = ("is_svs", "is_ndpi", "is_scn", "is_philips", "is_bif", "is_qpi")


@dataclass(frozen=True)
class Scene:
    """A large image."""

    height: int
    width: int
    channels: int
    dtype: str
    load: Callable[[int, int, int, int], Values]
    """(y, x, height, width) -> [height, width, channels], or two axes of one channel."""
    nodata: float | None = None
    has_alpha: bool = False
    """The last channel is the opacity."""
    is_slide: bool = False
    """The file is one of a slide scanner."""
    whole_rows: bool = True
    """Reading a whole row costs no more than a part of it."""
    file: Any = None
    """Is closed at the end of a ``with``."""

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()

    @property
    def kind(self) -> str:
        return f"{self.channels}x{self.dtype}"

    @property
    def pixel_bytes(self) -> int:
        return self.channels * np.dtype(self.dtype).itemsize

    def read(self, y: int, x: int, height: int, width: int) -> Values:
        """A window [height, width, channels] of ``dtype``, which must lie inside of the scene.

        Raises:
            BadImage: damaged there.
        """
        try:
            values = self.load(y, x, height, width)
        except BadImage:
            raise
        except Exception as error:  # whatever a hostile file makes a library raise
            raise BadImage(f"cannot be decoded: {one_line(error)}") from None
        values = values.reshape(height, width, self.channels)
        return as_dtype(values, np.dtype(self.dtype))


def open_scene(image: Image, page: int | None, max_pixels: int | None) -> Scene:
    """Its size and kind; for a ``with``.

    Raises:
        BadImage: no image, or one that cannot be read in parts and is too large to be read whole.
    """
    wanted = Wanted(page, None, max_pixels or MAX_PIXELS)
    try:
        scene = _opened(image, wanted)
    except BadImage:
        raise
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from None
    except Exception as error:
        raise BadImage(f"cannot be decoded: {one_line(error)}") from None
    if max(scene.height, scene.width) > MAX_SIDE:
        scene.__exit__()
        raise BadImage(f"{scene.width} x {scene.height} pixels are no image")
    return scene


def _opened(image: Image, wanted: Wanted) -> Scene:
    raw = None
    if image.method >= 0:  # in a zip
        raw, start = (found := read_image(image)), found[:START]
    else:
        with open(image.path, "rb") as file:
            file.seek(max(image.offset, 0))
            start = file.read(START)
    family = family_of(start)
    if family == "tiff":
        return _open_tiff(image, raw, wanted)
    if family == "npy" and raw is None and image.offset < 0:
        return _open_npy(image)
    return _open_whole(read_image(image) if raw is None else raw, wanted)


# ---------------------------------------------------------------------------- formats


def _open_tiff(image: Image, raw: bytes | None, wanted: Wanted) -> Scene:
    tifffile = require("tifffile", "tiff", "TIFF in parts")
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs what it then raises
    plain = {"is_ome": False, "is_mmstack": False, "is_ndtiff": False}  # open no other files
    if raw is not None:
        file = tifffile.TiffFile(io.BytesIO(raw), **plain)
    elif image.offset < 0:
        file = tifffile.TiffFile(image.path, **plain)
    else:
        file = tifffile.TiffFile(image.path, offset=image.offset, size=image.size, **plain)
    try:
        return _tiff_scene(file, wanted)
    except BaseException:
        file.close()
        raise


def _tiff_scene(file: Any, wanted: Wanted) -> Scene:
    pages = pages_of(file, wanted.page)
    first = pages[0]
    if first.dtype is None:
        raise BadImage(f"{first.bitspersample} bits a sample are not supported")
    stored = np.dtype(first.dtype)
    height, width, samples = shape_of(first)
    windows = [Window(page, samples) for page in pages]
    windows[0].check(wanted.max_pixels)
    if first.photometric == 0 and stored.kind not in "ub":
        raise BadImage("white-is-zero of values that are not unsigned integers")
    return Scene(
        height, width, samples * len(pages), dtype_of(stored), partial(_read_tiff, windows),
        nodata_of(first), len(pages) == 1 and _has_alpha(first, samples),
        any(getattr(file, name, False) for name in SCANNERS),
        whole_rows=not first.is_tiled, file=file,
    )  # fmt: skip


def _read_tiff(windows: list[Window], y: int, x: int, height: int, width: int) -> Values:
    planes = [window.read(y, x, height, width) for window in windows]
    values = planes[0] if len(planes) == 1 else np.concatenate(planes, -1)
    page = windows[0].page
    if page.photometric == 0:
        most = (1 << page.bitspersample) - 1
        values = (most - values.astype(np.int64)).astype(page.dtype)
    return values


def _has_alpha(page: Any, samples: int) -> bool:
    """Whether the last sample is the opacity: associated or not (TIFF 6.0, ExtraSamples)."""
    extra = tuple(int(kind) for kind in page.extrasamples or ())
    return samples in (2, 4) and len(extra) == 1 and extra[0] in (1, 2)


def _open_npy(image: Image) -> Scene:
    array = np.load(image.path, mmap_mode="r", allow_pickle=False)
    if array.ndim not in (2, 3):
        raise BadImage(f"an array of shape {array.shape} is no image")
    if array.ndim == 2:
        array = array[..., None]
    elif array.shape[0] < array.shape[2]:  # as in decode/npy_file.py: the shorter outer axis
        array = np.moveaxis(array, 0, -1)
    height, width, channels = array.shape
    check_size(1, 1, channels, array.dtype)
    return Scene(height, width, channels, dtype_of(array.dtype), partial(_read_array, array))


def _read_array(array: Values, y: int, x: int, height: int, width: int) -> Values:
    part = array[y : y + height, x : x + width]
    return np.array(part, dtype=array.dtype.newbyteorder("="))


def _open_whole(raw: bytes, wanted: Wanted) -> Scene:
    """Any other format; decoded when the first part is read, and kept."""
    family = family_of(raw[:START])
    if family is None and raw[:2] not in (b"P5", b"P6"):
        header = rgb.read_header(raw, wanted.max_pixels)
        if not header.deep:
            pixels = _Once(lambda: rgb.decode(raw, header, rgb.Scratch()).copy())
            return Scene(header.height, header.width, 3, "uint8", pixels)
    found = open_native(raw, wanted)
    pixels = _Once(lambda: decode_values(found))
    return Scene(found.height, found.width, found.channels, found.dtype, pixels, found.nodata)


class _Once:
    """Decodes an image when it is first needed."""

    def __init__(self, decode: Callable[[], Values]) -> None:
        self.decode = decode
        self.values: Values | None = None

    def __call__(self, y: int, x: int, height: int, width: int) -> Values:
        if self.values is None:
            self.values = self.decode()
        return _read_array(self.values, y, x, height, width)
