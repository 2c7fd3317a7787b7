"""PGM and PPM of 16 bits in their own depth, as the format's description has them.

The largest value that a file names says only how many bits are in use: values stay as they are. Of
at most 8 bits they are Pillow's.
"""

from __future__ import annotations

import re

import numpy as np

from xcit_dino.data.decode import plain_file
from xcit_dino.data.decode.native import NativeHeader, Values, Wanted, check_size
from xcit_dino.data.decode.rgb import BadImage

SPACE = rb"(?:\s|#[^\n]*\n)+"
HEAD = re.compile(rb"P([56])" + 3 * (SPACE + rb"(\d{1,9})") + rb"\s")
LONGEST = 4096  # bytes of a header with its comments


def read_header(raw: bytes, wanted: Wanted) -> NativeHeader:
    """Raises BadImage for a damaged header, and for fewer values than it declares."""
    head = HEAD.match(raw[:LONGEST])
    if head is None:
        raise BadImage("cannot be decoded: a damaged PGM or PPM header")
    magic, width, height, most = map(int, head.groups())
    if most < 256:
        return plain_file.read_header(raw, wanted)
    if most > 65535:
        raise BadImage(f"a PGM or PPM of values up to {most}: at most 65535")
    channels = 1 if magic == 5 else 3
    check_size(height, width, channels, np.dtype(np.uint16), wanted)
    count = height * width * channels
    if len(raw) - head.end() < 2 * count:
        raise BadImage("truncated PGM or PPM")

    def load() -> Values:
        values = np.frombuffer(raw, ">u2", count, head.end()).astype(np.uint16)
        return values.reshape(height, width, channels)

    return NativeHeader(height, width, channels, "uint16", load)
