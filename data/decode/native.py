"""Encoded image -> [H, W, C] of the file's own type: sets that are not 8-bit RGB.

Formats are recognized by their first bytes; each family has a module of its own. Values are the
file's own: white-is-zero (TIFF) and MONOCHROME1 (DICOM) are inverted, so that black is low, and
DICOM's values are rescaled. What the four types of :data:`~xcit_dino.data.pixels.DTYPES` cannot
hold becomes the nearest that can (int8 -> int16; float16, float64 and integers of 32 bits ->
float32, unless an integer would be rounded).

Pixels without a value (NaN, infinite, no-data) become the channel's mean in the set, so that
nothing later meets them. Dimensions are checked before any pixel is decoded.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xcit_dino.data.decode.rgb import MAX_PIXELS, BadImage
from xcit_dino.data.pixels import MAX_CHANNELS, PixelFormat
from xcit_dino.errors import one_line

BYTES_A_PIXEL = 12
"""Times the largest number of pixels: bytes that a decoded image may have. float32 RGB."""
LARGEST_INTEGER = 1 << 24
"""float32 holds every integer up to this one."""
NETPBM = re.compile(rb"P[56]\s+(#|\d+\s+\d+\s+\d+\s)")
"""How a PGM or PPM begins, and no text does."""
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

Values = NDArray[Any]


@dataclass(frozen=True)
class NativeHeader:
    """An image's properties before its pixels are decoded."""

    height: int
    width: int
    channels: int
    dtype: str
    """One of :data:`~xcit_dino.data.pixels.DTYPES`."""
    load: Callable[[], Values]
    """Decodes: [H, W, C] or, of one channel, [H, W]; of ``dtype`` or one that is converted."""
    nodata: float | None = None
    """Pixels of this value have none, according to the file itself."""
    pages: int = 1
    """How many pages or frames are its channels."""

    @property
    def kind(self) -> str:
        """As :attr:`PixelFormat.name`: ``13xuint16``."""
        return f"{self.channels}x{self.dtype}"


@dataclass(frozen=True)
class Wanted:
    """What a reader of a family needs to know of the set."""

    page: int | None = None
    """The page to read of each file, from 0; None: all, as channels."""
    channels: int | None = None
    """Of the set; None: not known yet."""
    max_pixels: int = MAX_PIXELS


ANY = Wanted()


def read_native_header(raw: bytes, form: PixelFormat) -> NativeHeader:
    """Size and decoder of an image of a set of that format; a set of float32 takes the other types,
    all of whose values it holds exactly.

    Raises:
        BadImage: not an image, of another kind than the set, or too large.
    """
    most = form.max_pixels or MAX_PIXELS
    header = open_native(raw, Wanted(form.page, form.channels, most))
    kind = f"{form.channels}x{form.dtype}"
    if header.kind == kind:
        return header
    if (header.channels, form.dtype) == (form.channels, "float32"):
        return replace(header, dtype="float32")
    raise BadImage(f"{header.kind}, and the set consists of {kind}")


def open_native(raw: bytes, wanted: Wanted = ANY) -> NativeHeader:
    """Size, kind and decoder of any image.

    Raises:
        BadImage: not an image, or too large.
    """
    if not raw:
        raise BadImage("empty file")
    try:
        header = _reader(raw)(raw, wanted)
    except BadImage:
        raise
    except Exception as error:  # whatever a hostile file makes a library raise
        raise BadImage(f"cannot be decoded: {one_line(error)}") from None
    check_size(header.height, header.width, header.channels, np.dtype(header.dtype), wanted)
    return header


def decode_native(raw: bytes, header: NativeHeader, form: PixelFormat) -> Values:
    """[H, W, C] of ``form.dtype``, contiguous, without invalid pixels.

    Raises:
        BadImage: truncated or damaged.
    """
    values = decode_values(header)
    mask = invalid(values, header.nodata if form.nodata is None else form.nodata)
    if mask is None:
        return values
    means = form.statistics.mean if form.statistics else (0.0,) * form.channels
    return fill(values, mask, means)


def decode_values(header: NativeHeader) -> Values:
    """[H, W, C] of ``header.dtype`` as the file has them, invalid ones included.

    Raises:
        BadImage: truncated or damaged.
    """
    try:
        values = header.load()
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(f"cannot be decoded: {one_line(error)}") from None
    if values.shape not in (
        (header.height, header.width, header.channels),
        (header.height, header.width)[: 2 if header.channels == 1 else 0],
    ):
        raise BadImage(f"cannot be decoded: its pixels are {values.shape}, unlike its header")
    values = values.reshape(header.height, header.width, header.channels)
    return np.ascontiguousarray(as_dtype(values, np.dtype(header.dtype)))


def as_dtype(values: Values, dtype: np.dtype) -> Values:
    """Convert exactly, or (float64 -> float32) to the nearest value.

    Raises:
        BadImage: integers that float32 would round.
    """
    if values.dtype == dtype:
        return values
    if values.dtype.kind in "iu" and dtype.kind == "f" and values.dtype.itemsize > 2:
        if max(abs(int(values.min())), abs(int(values.max()))) > LARGEST_INTEGER:
            raise BadImage(f"integers beyond {LARGEST_INTEGER:,}, which float32 cannot hold")
    with np.errstate(over="ignore"):  # becomes infinite, hence invalid
        return values.astype(dtype)


def dtype_of(stored: np.dtype) -> str:
    """The type in a set of pixels that a file stores as ``stored``.

    Raises:
        BadImage: complex numbers, text, records.
    """
    by_kind = {
        "b1": "uint8", "u1": "uint8", "i1": "int16", "u2": "uint16", "i2": "int16",
        "u4": "float32", "i4": "float32", "f2": "float32", "f4": "float32", "f8": "float32",
    }  # fmt: skip
    try:
        return by_kind[f"{stored.kind}{stored.itemsize}"]
    except KeyError:
        raise BadImage(f"pixels of type {stored} are no image") from None


def check_size(
    height: int, width: int, channels: int, dtype: np.dtype, wanted: Wanted = ANY
) -> None:
    """Refuse, before any memory is taken, what is empty or absurdly large."""
    if min(height, width, channels) < 1:
        raise BadImage(f"empty image: {width}x{height} pixels of {channels} channels")
    if channels > MAX_CHANNELS:
        raise BadImage(f"{channels} channels: at most {MAX_CHANNELS}")
    size = height * width * channels * dtype.itemsize
    if height * width > wanted.max_pixels or size > BYTES_A_PIXEL * wanted.max_pixels:
        needed = max(height * width, -(-size // BYTES_A_PIXEL))
        raise BadImage(
            f"decompression bomb: {width}x{height} pixels of {channels} channels, at most "
            f"{wanted.max_pixels} pixels and {BYTES_A_PIXEL} times as many bytes allowed; "
            f"shards make --max_pixels {needed} takes it, with --resize as a smaller one"
        )


# ---------------------------------------------------------------------------- invalid pixels


def invalid(values: Values, nodata: float | None) -> NDArray[np.bool_] | None:
    """Which values are none [H, W, C]; None where all are some."""
    mask = None
    if values.dtype.kind == "f":
        mask = ~np.isfinite(values)
    if nodata is not None and np.isfinite(nodata):
        # The file's type rounds both alike: -3.4e38 of a tag is a float32 in the pixels.
        if values.dtype.kind == "f" or (nodata == int(nodata) and _holds(values.dtype, nodata)):
            with np.errstate(over="ignore"):
                same = values == values.dtype.type(nodata)
            mask = same if mask is None else mask | same
    return mask if mask is not None and mask.any() else None


def _holds(dtype: np.dtype, value: float) -> bool:
    limits = np.iinfo(dtype)
    return limits.min <= value <= limits.max


def fill(values: Values, mask: NDArray[np.bool_], means: Sequence[float]) -> Values:
    """The same with the channels' ``means`` where ``mask`` says so; changes ``values``."""
    rounded = np.rint(means) if values.dtype.kind in "iu" else np.array(means)
    if not values.flags.writeable:
        values = values.copy()
    np.copyto(values, rounded.astype(values.dtype), where=mask)
    return values


# ---------------------------------------------------------------------------- formats


def _reader(raw: bytes) -> Callable[[bytes, Wanted], NativeHeader]:
    """The reader for a file that begins so; imported when the first such file comes."""
    family = family_of(raw[:132]) or "plain"
    return importlib.import_module(f"xcit_dino.data.decode.{family}_file").read_header


def family_of(start: bytes) -> str | None:
    """npy, tiff, dicom, netpbm or coded by the first 132 bytes; None for all others."""
    if start.startswith(b"\x93NUMPY"):
        return "npy"
    if start[128:132] == b"DICM":  # its first bytes are free, and may be those of a TIFF
        return "dicom"
    if start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "tiff"
    if NETPBM.match(start):
        return "netpbm"
    return "coded" if coded_format(start) else None


def coded_format(start: bytes) -> str | None:
    """heic, avif, jp2 or jxl by the first 16 bytes; None for all others."""
    if start[4:8] == b"ftyp":
        if start[8:12] in (b"avif", b"avis"):
            return "avif"
        return "heic" if start[8:12] in HEIF_BRANDS else None
    if start.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")):
        return "jp2"
    return "jxl" if start.startswith((b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a")) else None
