"""Encoded image -> RGB pixels, whatever people have: the only place that parses image files.

- libjpeg-turbo through simplejpeg; whatever it refuses (CMYK, PNG, WebP, slightly damaged JPEGs)
  goes to Pillow, with formats that run other programs (EPS) shut out. Both give the same pixels
  for a plain JPEG.
- EXIF orientation is honoured, unlike torchvision's ImageFolder, which trains on sideways
  photographs; for images without the tag (ImageNet's, nearly all) nothing differs.
- Alpha is dropped and animations give their first frame, as with Pillow's ``convert("RGB")``;
  16-bit images keep their upper 8 bits (Pillow's convert would clip them to white).
- Dimensions are checked before any pixel is decoded.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB of RGB
FORMATS = (  # Pillow knows the last two once their modules are imported
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


class BadImage(Exception):
    """The image cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Header:
    """What is known of an image before its pixels are decoded; size as it will be, upright."""

    height: int
    width: int
    orientation: int = 1
    pillow: Image.Image | None = None  # decode with Pillow; None: with simplejpeg


def read_header(raw: bytes) -> Header:
    """Size and decoder of an encoded image.

    Raises:
        BadImage: not an image, or of absurd dimensions (found before any pixel is decoded).
    """
    try:
        height, width, colorspace, _ = cast(Any, simplejpeg.decode_jpeg_header(raw))
    except ValueError:
        return _pillow_header(raw)
    if colorspace in ("CMYK", "YCCK"):
        return _pillow_header(raw)
    _check_size(height, width)
    orientation = _jpeg_orientation(raw)
    if orientation >= 5:
        height, width = width, height
    return Header(height, width, orientation)


def decode(raw: bytes, header: Header, scratch: Scratch, reduce: int = 1) -> Pixels:
    """RGB pixels [H, W, 3]; sides divided by ``reduce`` (rounded up) where the decoder can.

    The result may live in ``scratch``: use it before that is used again.

    Raises:
        BadImage: truncated or damaged.
    """
    if header.pillow is not None:
        pixels = _pillow_decode(header.pillow)
    else:
        pixels = _jpeg_decode(raw, header, scratch, reduce)
    if header.orientation > 1:
        pixels = np.asarray(Image.fromarray(pixels).transpose(ROTATIONS[header.orientation]))
    return pixels


class Scratch:
    """Memory used again for every image, so that the kernel need not clear pages each time."""

    LARGEST = 1 << 26  # do not hold on to more than 64 MiB

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def get(self, size: int) -> Pixels:
        """At least ``size`` bytes."""
        if size > self.LARGEST:
            return np.empty(size, np.uint8)
        if size > self._memory.size:
            self._memory = np.empty(size, np.uint8)
        return self._memory


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadImage(f"decompression bomb: {width}x{height} pixels, at most {MAX_PIXELS} allowed")
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
        return _pillow_decode(_open(raw))


def _pillow_header(raw: bytes) -> Header:
    image = _open(raw)
    width, height = image.size
    _check_size(height, width)
    orientation = _orientation(image)
    if orientation >= 5:
        height, width = width, height
    return Header(height, width, orientation, image)


def _jpeg_orientation(raw: bytes) -> int:
    """Pillow is asked only where there is an EXIF segment: opening costs a tenth of decoding."""
    at = 2
    while raw[at : at + 1] == b"\xff" and raw[at + 1 : at + 2] not in (b"\xda", b""):  # to the scan
        if raw[at + 4 : at + 10] == b"Exif\0\0":
            return _orientation(_open(raw))
        at += 2 + max(2, int.from_bytes(raw[at + 2 : at + 4]))
    return 1


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation tag; 1 (upright) where there is none or it is damaged."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # getexif() would decode every pixel to look for the tag behind them
    try:
        with _quietly():
            orientation = image.getexif().get(0x0112, 1)
    except Exception:
        return 1
    return orientation if orientation in ROTATIONS else 1


def _open(raw: bytes) -> Image.Image:
    """Whatever a hostile file makes Pillow raise, it is one bad image."""
    if not raw:
        raise BadImage("empty file")
    try:
        with _quietly():
            return Image.open(io.BytesIO(raw), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImage("cannot be decoded: not an image of a known format") from None
    except Exception as error:
        raise BadImage(f"cannot be decoded: {_words(error)}") from None


def _pillow_decode(image: Image.Image) -> Pixels:
    try:
        with _quietly():
            return np.asarray(_to_rgb(image))
    except Exception as error:
        raise BadImage(f"cannot be decoded: {_words(error)}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, or 32 of which 16 are in use
        upper = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(upper).convert("RGB")
    if image.mode == "F":
        raise BadImage("floating-point pixels have no known range")
    return image.convert("RGB")


@contextmanager
def _quietly() -> Iterator[None]:
    """Pillow warns of what it can live with (odd tags, sizes that we check ourselves)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
