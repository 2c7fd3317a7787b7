"""HEIC, AVIF, JPEG 2000 and JPEG XL in their own depth, through imagecodecs and pillow-heif.

Sizes are read from the files' own headers first, because the decoders take memory for whatever a
file declares. Alpha (two channels or four) is dropped; orientation is honored, as the standards
have it.
"""

from __future__ import annotations

import re

import numpy as np

from xcit_dino.data.decode.extras import require
from xcit_dino.data.decode.native import (
    NativeHeader,
    Values,
    Wanted,
    check_size,
    coded_format,
    dtype_of,
)
from xcit_dino.data.decode.rgb import BadImage

JXL_RATIOS = (None, (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def read_header(raw: bytes, wanted: Wanted) -> NativeHeader:
    """Decodes, once the size is found to be allowed: only then is the depth known for certain."""
    name = coded_format(raw[:16])
    sizes = {"jp2": j2k_size, "jxl": jxl_size}.get(name or "", ispe_size)
    height, width = sizes(raw)
    check_size(height, width, 3, np.dtype(np.uint8), wanted)
    values = _heic(raw, wanted) if name == "heic" else _decode(raw, str(name))
    if values.ndim == 3 and values.shape[2] in (2, 4):
        values = values[..., : values.shape[2] - 1]
    if values.ndim not in (2, 3):
        raise BadImage(f"{name} of {values.ndim} axes: animations and volumes are no images")
    height, width, channels = (*values.shape, 1)[:3]
    return NativeHeader(height, width, channels, dtype_of(values.dtype), lambda: values)


def _decode(raw: bytes, name: str) -> Values:
    codecs = require("imagecodecs", "tiff", name.upper())
    if name == "avif":
        return codecs.avif_decode(raw, index=0, numthreads=1)
    if name == "jxl":
        return codecs.jpegxl_decode(raw, index=0, numthreads=1)
    return codecs.jpeg2k_decode(raw, numthreads=1)


def _heic(raw: bytes, wanted: Wanted) -> Values:
    """8 bits, or 10 and 12 bits in the upper ones of 16."""
    heif = require("pillow_heif", "heif", "HEIC")
    heif.options.DECODE_THREADS = 1
    image = heif.open_heif(raw, convert_hdr_to_8bit=False)
    check_size(image.size[1], image.size[0], 3, np.dtype(np.uint16), wanted)
    return np.asarray(image)


# ---------------------------------------------------------------------------- sizes


def j2k_size(raw: bytes) -> tuple[int, int]:
    """(height, width) of a JPEG 2000 codestream: its SIZ segment (ISO 15444-1, A.5.1)."""
    at = raw.find(b"\xff\x4f\xff\x51")
    if at < 0 or len(raw) < at + 24:
        raise BadImage("cannot be decoded: no JPEG 2000 codestream")
    x1, y1, x0, y0 = (int.from_bytes(raw[at + n : at + n + 4]) for n in (8, 12, 16, 20))
    return y1 - y0, x1 - x0


def ispe_size(raw: bytes) -> tuple[int, int]:
    """(height, width) of the largest image of a HEIF or AVIF file (ISO 23008-12, 6.5.3)."""
    ends = (match.end() + 4 for match in re.finditer(rb"\0\0\0\x14ispe", raw))
    sides = ((raw[at + 4 : at + 8], raw[at : at + 4]) for at in ends)
    found = [(int.from_bytes(height), int.from_bytes(width)) for height, width in sides]
    if not found:
        raise BadImage("cannot be decoded: no image size in the file")
    return max(found, key=lambda size: size[0] * size[1])


def jxl_size(raw: bytes) -> tuple[int, int]:
    """(height, width) of a JPEG XL codestream: its SizeHeader (ISO 18181-1, D.2)."""
    at = 0
    if not raw.startswith(b"\xff\x0a"):  # in boxes: whole, or in parts
        box = re.search(rb"jxlc(?=\xff\x0a)|jxlp....(?=\xff\x0a)", raw, re.DOTALL)
        if box is None:
            raise BadImage("cannot be decoded: no JPEG XL codestream")
        at = box.end()
    bits, used = int.from_bytes(raw[at + 2 : at + 18], "little"), 0

    def take(count: int) -> int:
        nonlocal used
        used += count
        return bits >> (used - count) & ((1 << count) - 1)

    def side(small: int) -> int:
        return (take(5) + 1) * 8 if small else take((9, 13, 18, 30)[take(2)]) + 1

    small = take(1)
    height = side(small)
    ratio = JXL_RATIOS[take(3)]
    return height, side(small) if ratio is None else height * ratio[0] // ratio[1]
