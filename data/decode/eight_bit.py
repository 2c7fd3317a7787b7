"""8-bit gray or RGB of the formats that Pillow lacks: HEIC, JPEG 2000, JPEG XL, DICOM, ``.npy``.

Sets of 8-bit RGB take them too. DICOM of more bits is scaled by the window that the file names.
"""

from __future__ import annotations

import importlib

import numpy as np
from numpy.typing import NDArray

from xcit_dino.data.decode.native import Wanted, decode_values, family_of, open_native
from xcit_dino.data.decode.rgb import BadImage


def decode_foreign(raw: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """[H, W] or [H, W, 3].

    Raises:
        BadImage: of no known format, damaged, too large, or not of 8 bits.
    """
    family = family_of(raw[:132])
    if family is None:
        raise BadImage("cannot be decoded: not an image of a known format")
    header = open_native(raw, Wanted(max_pixels=max_pixels))
    if header.dtype != "uint8" and family == "dicom" and header.channels == 1:
        return importlib.import_module("xcit_dino.data.decode.dicom_file").windowed(raw)
    if header.kind not in ("1xuint8", "3xuint8"):
        raise BadImage(f"{header.kind} is not 8-bit RGB; --pixels {header.kind} packs it as it is")
    values = decode_values(header)
    return values[..., 0] if header.channels == 1 else values
