"""Encoded image -> 8-bit RGB pixels, in all common formats. Sets of other kinds are decoded as they
are by ``data/decode/native.py``.

- libjpeg-turbo through simplejpeg; whatever it refuses (CMYK, PNG, WebP, slightly damaged JPEGs)
  goes to Pillow, with formats that run other programs (EPS) shut out. Both give the same pixels
  for a plain JPEG.
- EXIF orientation is honored, unlike torchvision's ImageFolder, which trains on sideways
  photographs; for images without the tag (ImageNet's, nearly all) nothing differs.
- Alpha is dropped and animations give their first frame, as with Pillow's ``convert("RGB")``.
- Images of 16 bits keep their upper 8 (Pillow's convert would clip them to white), TIFFs that say
  12 bits the upper 8 of these; white-is-zero is inverted. How many bits the values use is noted
  (:class:`Deep`), because cameras of 10 or 12 bits store them in the lower ones. Integers that are
  signed or of 32 bits and floating-point pixels have no known range and are refused.
- Dimensions are checked before any pixel is decoded.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

from xcit_dino.errors import one_line, warn

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it logs what it then raises
MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB of RGB
FORMATS = (  # Pillow registers the last two when their modules are imported
    "JPEG", "PNG", "GIF", "BMP", "PPM",
    str(TiffImagePlugin.TiffImageFile.format), str(WebPImagePlugin.WebPImageFile.format),
)  # fmt: skip
ROTATIONS = {  # EXIF orientation -> upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Pixels = NDArray[np.uint8]


class Deep(NamedTuple):
    """Images of 16 bits a channel among those decoded."""

    images: int = 0
    bits: int = 0
    """Bits of the 16 that the largest value uses."""

    def __add__(self, other: Any) -> Deep:  # type: ignore[override]
        return Deep(self.images + other[0], max(self.bits, other[1]))

    def lines(self, packed_with: int | None = None) -> list[str]:
        """A line on them, or none."""
        if packed_with is not None:
            known = f"{self.images:,} images of 16 bits stored as 8-bit PNG"
            return [known] if self.images else ["WARNING: --bits: no image has 16 bits"]
        if not self.images:
            return []
        if self.bits >= 16:
            return [f"{self.images:,} images have 16 bits, of which the upper 8 are used"]
        return [
            f"WARNING: {self.images:,} images have 16 bits, but no value uses more than "
            f"{self.bits}: {self.remain}; pack the originals with --bits {max(self.bits, 8)}"
        ]

    @property
    def remain(self) -> str:
        """What the upper 8 bits leave of the values."""
        levels = 1 << max(self.bits - 8, 0)
        return f"{levels:,} gray level{'s' * (levels > 1)} remain"


_said: set[int] = set()


def say_deep(deep: Deep, name: str) -> None:
    """Say of a single file of 16 bits that an 8-bit network gets the upper 8; once in a process for
    each number of bits in use."""
    if deep.images and deep.bits not in _said:
        _said.add(deep.bits)
        rest = "of which the upper 8 are used"
        if deep.bits < 16:
            rest = (
                f"but no value uses more than {deep.bits}: {deep.remain}; convert such images to 8 "
                "bits, or take a network that was trained on them"
            )
        warn(f"{one_line(name)}: 16 bits, {rest}")


class BadImage(Exception):
    """The image cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Header:
    """An image's properties before its pixels are decoded; height and width once upright."""

    height: int
    width: int
    orientation: int = 1
    pillow: Image.Image | None = None  # decode with Pillow; None: with simplejpeg
    deep: bool = False
    """16 bits a channel."""


_allowed = [MAX_PIXELS]


def allow_pixels(count: int) -> None:
    """Accept images of up to ``count`` pixels in this process, because the index of a set does.

    Every process that reads a set opens its index, also the workers of a loader.
    """
    _allowed[0] = max(_allowed[0], count)


def read_header(raw: bytes, max_pixels: int | None = None) -> Header:
    """Size and decoder of an encoded image of at most ``max_pixels`` (None: :func:`allow_pixels`).

    Raises:
        BadImage: not an image, or of absurd dimensions (found before any pixel is decoded).
    """
    max_pixels = max_pixels or _allowed[0]
    try:
        height, width, colorspace, _ = cast(Any, simplejpeg.decode_jpeg_header(raw))
    except ValueError:
        return _pillow_header(raw, max_pixels)
    if colorspace in ("CMYK", "YCCK"):
        return _pillow_header(raw, max_pixels)
    _check_size(height, width, max_pixels)
    orientation = _jpeg_orientation(raw, max_pixels)
    if orientation >= 5:
        height, width = width, height
    return Header(height, width, orientation)


def decode(raw: bytes, header: Header, scratch: Scratch, reduce: int = 1) -> Pixels:
    """RGB pixels [H, W, 3]; sides divided by ``reduce`` (rounded up) where the decoder can.

    The result may be a view of ``scratch``, valid until its next use.

    Raises:
        BadImage: truncated or damaged.
    """
    if header.pillow is not None:
        pixels = _pillow_decode(header.pillow, raw)
        if header.deep:
            scratch.deep += Deep(1, _used_bits(header.pillow, pixels))
    else:
        pixels = _jpeg_decode(raw, header, scratch, reduce)
    if header.orientation > 1:
        pixels = np.asarray(Image.fromarray(pixels).transpose(ROTATIONS[header.orientation]))
    return pixels


class Scratch:
    """Memory reused for every image, so that the kernel need not clear pages each time."""

    LARGEST = 1 << 26  # keep at most 64 MiB

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self.deep = Deep()
        """The images of 16 bits that were decoded so far."""

    def get(self, size: int) -> Pixels:
        """At least ``size`` bytes."""
        if size > self.LARGEST:
            return np.empty(size, np.uint8)
        if size > self._memory.size:
            self._memory = np.empty(size, np.uint8)
        return self._memory


def _check_size(height: int, width: int, most: int) -> None:
    if height * width > most:
        raise BadImage(
            f"decompression bomb: {width}x{height} pixels, at most {most} allowed; "
            f"shards make --max_pixels {height * width} takes it, with --resize as a smaller one"
        )
    if height < 1 or width < 1:
        raise BadImage(f"empty image: {width}x{height} pixels")


def _jpeg_decode(raw: bytes, header: Header, scratch: Scratch, reduce: int) -> Pixels:
    height, width = header.height, header.width
    if header.orientation >= 5:
        height, width = width, height
    least = (-(-height // reduce), -(-width // reduce)) if reduce > 1 else (0, 0)
    buffer = scratch.get(height * width * 3)
    try:
        return simplejpeg.decode_jpeg(raw, "RGB", False, False, *least, buffer=buffer)
    except ValueError:  # damaged, perhaps harmlessly: Pillow decides
        return _pillow_decode(open_image(raw, height * width), raw)


def _pillow_header(raw: bytes, max_pixels: int) -> Header:
    image = open_image(raw, max_pixels)
    width, height = image.size
    _check_size(height, width, max_pixels)
    orientation = orientation_of(image)
    if orientation >= 5:
        height, width = width, height
    return Header(height, width, orientation, image, is_deep(raw, image))


def _jpeg_orientation(raw: bytes, max_pixels: int) -> int:
    """Pillow reads it only where there is an EXIF segment: opening costs a tenth of decoding."""
    at = 2
    while raw[at : at + 1] == b"\xff" and raw[at + 1 : at + 2] not in (b"\xda", b""):  # to the scan
        if raw[at + 4 : at + 10] == b"Exif\0\0":
            return orientation_of(open_image(raw, max_pixels))
        at += 2 + max(2, int.from_bytes(raw[at + 2 : at + 4]))
    return 1


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation tag; 1 (upright) where there is none or it is damaged."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # getexif() would decode every pixel to look for the tag behind them
    try:
        with quietly():
            orientation = image.getexif().get(0x0112, 1)
    except Exception:
        return 1
    return orientation if orientation in ROTATIONS else 1


def open_image(raw: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Turn any error that a hostile file makes Pillow raise into BadImage."""
    if not raw:
        raise BadImage("empty file")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow refuses twice as many by itself
    try:
        with quietly():
            return Image.open(io.BytesIO(raw), formats=FORMATS)
    except UnidentifiedImageError:
        return _foreign(raw, max_pixels)
    except Exception as error:
        raise BadImage(f"cannot be decoded: {one_line(error)}") from None


def _foreign(raw: bytes, max_pixels: int) -> Image.Image:
    """An image of a format that Pillow lacks, decoded by another library."""
    from xcit_dino.data.decode.eight_bit import decode_foreign

    return Image.fromarray(decode_foreign(raw, max_pixels))


def _pillow_decode(image: Image.Image, raw: bytes = b"") -> Pixels:
    try:
        with quietly():
            return np.asarray(to_rgb(image))
    except BadImage:
        raise
    except Exception as error:
        if raw and image.format == "TIFF" and image.mode in ("L", "RGB"):
            most = image.width * image.height  # which was found to be allowed
            return np.asarray(_foreign(raw, most).convert("RGB"))  # compressed as Pillow cannot
        raise BadImage(f"cannot be decoded: {one_line(error)}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; of 16 bits the upper 8.

    Raises:
        BadImage: its values have no known range.
    """
    if image.mode == "F":
        raise BadImage("floating-point pixels have no known range; convert them to 8 or 16 bits")
    if image.mode == "I" and image.format == "TIFF":
        raise BadImage(
            "integers that are signed or of 32 bits have no known range; convert them to 8 or 16 "
            "bits without sign"
        )
    if image.mode.startswith("I"):
        return Image.fromarray(_upper_bits(image, _stored_bits(image))).convert("RGB")
    return image.convert("RGB")


def _upper_bits(image: Image.Image, bits: int) -> Pixels:
    """The upper 8 of ``bits`` bits of a gray image, black at 0 [H, W]."""
    values = np.asarray(image).astype(np.int32)
    if tag_of(image, 262) == 0:  # PhotometricInterpretation: white is zero
        values = (1 << bits) - 1 - values
    return (values >> (bits - 8)).clip(0, 255).astype(np.uint8)


def rescaled(header: Header, bits: int, scratch: Scratch) -> bytes:
    """An image of 16 bits whose values use ``bits`` of them, as 8-bit PNG, upright.

    Raises:
        BadImage: damaged, in color, or with larger values, which would be clipped.
    """
    image = header.pillow
    assert image is not None
    if not image.mode.startswith("I"):
        raise BadImage(f"16 bits in color: --bits {bits} rescales gray images only")
    pixels = decode(b"", header, scratch)  # raises where it is damaged, and records its bits
    if (used := _used_bits(image, pixels)) > bits:
        raise BadImage(f"values of {used} bits, more than --bits {bits}")
    gray = Image.fromarray(_upper_bits(image, bits))
    if header.orientation > 1:
        gray = gray.transpose(ROTATIONS[header.orientation])
    buffer = io.BytesIO()
    gray.save(buffer, "PNG")
    return buffer.getvalue()


def _used_bits(image: Image.Image, pixels: Pixels) -> int:
    """How many bits the largest value uses; of images in color, of which Pillow gives the upper
    byte only, at least that many."""
    if image.mode.startswith("I"):
        return int(np.asarray(image).max()).bit_length()
    return 8 + int(pixels.max()).bit_length()


def is_deep(raw: bytes, image: Image.Image) -> bool:
    """16 bits a channel in PNG or TIFF; PGM and PPM store their maximum value."""
    if image.format == "PNG":
        return raw[24:25] == b"\x10"
    bits = tag_of(image, 258)
    return (bits if isinstance(bits, int) else max(bits or (0,))) == 16


def _stored_bits(image: Image.Image) -> int:
    bits = tag_of(image, 258)
    return bits if isinstance(bits, int) and 8 <= bits < 16 else 16


def tag_of(image: Image.Image, number: int) -> Any:
    """A tag of a TIFF; one value where it has one."""
    value = image.tag_v2.get(number) if isinstance(image, TiffImagePlugin.TiffImageFile) else None
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


@contextmanager
def quietly() -> Iterator[None]:
    """Silence Pillow's warnings of harmless tags and of sizes that are checked here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
