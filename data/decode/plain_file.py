"""PNG of 8 and 16 bits, and everything else that Pillow opens, in its own channels.

Alpha is dropped, palettes become RGB, and EXIF orientation is honored, as for 8-bit RGB sets.
"""

from __future__ import annotations

import numpy as np

from xcit_dino.data.decode import rgb
from xcit_dino.data.decode.extras import require
from xcit_dino.data.decode.native import NativeHeader, Values, Wanted, check_size
from xcit_dino.data.decode.rgb import BadImage

CHANNELS = {"1": 1, "L": 1, "LA": 1, "La": 1}  # modes of gray images; all others become RGB


def read_header(raw: bytes, wanted: Wanted) -> NativeHeader:
    """Raises BadImage for what Pillow does not open, and for types that it would round."""
    image = rgb.open_image(raw)
    width, height = image.size
    check_size(height, width, 3, np.dtype(np.uint8), wanted)
    if rgb.is_deep(raw, image):
        if image.format == "PNG":
            return _deep_png(raw, height, width)
    if image.mode not in CHANNELS and image.mode.startswith(("I", "F")):
        raise BadImage(f"{image.format} of Pillow's mode {image.mode}, whose range is not known")
    channels = CHANNELS.get(image.mode, 3)
    orientation = rgb.orientation_of(image)
    if orientation >= 5:
        height, width = width, height

    def load() -> Values:
        with rgb.quietly():
            upright = image.convert("L" if channels == 1 else "RGB")
            if orientation > 1:
                upright = upright.transpose(rgb.ROTATIONS[orientation])
            return np.asarray(upright)

    return NativeHeader(height, width, channels, "uint8", load)


def _deep_png(raw: bytes, height: int, width: int) -> NativeHeader:
    """Pillow gives the upper byte of 16 bits in color; alpha is dropped."""
    color = raw[25] & 2
    channels = 3 if color else 1

    def load() -> Values:
        if not color and not raw[25] & 4:
            with rgb.quietly():
                return np.asarray(rgb.open_image(raw)).astype(np.uint16)
        values = require("imagecodecs", "tiff", "16-bit PNG in color").png_decode(raw)
        return values[..., :channels]

    return NativeHeader(height, width, channels, "uint16", load)
