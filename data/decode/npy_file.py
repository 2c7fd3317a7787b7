"""NumPy's ``.npy`` as an image, without ever unpickling.

[H, W] is one channel. Of three axes the channels are the first or the last: that one which has as
many as the set; where both or neither have, or the set is not known yet, the shorter one, and the
last if they are equal.
"""

from __future__ import annotations

import io
import math

import numpy as np

from xcit_dino.data.decode.native import NativeHeader, Values, Wanted, check_size, dtype_of
from xcit_dino.data.decode.rgb import BadImage


def read_header(raw: bytes, wanted: Wanted) -> NativeHeader:
    """Raises BadImage for objects, records, other numbers of axes, and truncated files."""
    file = io.BytesIO(raw)
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise BadImage(f".npy of version {version[0]}.{version[1]}")
    shape, fortran, dtype = read(file)
    kind = dtype_of(dtype)  # refuses objects
    start, count = file.tell(), math.prod(shape)
    if len(shape) not in (2, 3):
        raise BadImage(f"an array of {len(shape)} axes: an image has 2 or 3")
    if len(raw) - start < count * dtype.itemsize:
        raise BadImage("truncated .npy")
    first = len(shape) == 3 and _channels_first(shape, wanted.channels)
    height, width, channels = (*shape[1:], shape[0]) if first else (*shape, 1)[:3]
    check_size(height, width, channels, dtype, wanted)

    def load() -> Values:
        flat = np.frombuffer(raw, dtype, count, start)
        values = flat.reshape(shape, order="F" if fortran else "C")
        return values.transpose(1, 2, 0) if first else values

    return NativeHeader(height, width, channels, kind, load)


def _channels_first(shape: tuple[int, ...], channels: int | None) -> bool:
    first, last = shape[0], shape[-1]
    if (first == channels) != (last == channels):
        return first == channels
    return first < last
