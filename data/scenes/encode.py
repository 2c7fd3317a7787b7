"""How a tile is stored: without loss, as PNG where the set is 8-bit RGB, else in the set's type."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image

from xcit_dino.data.decode.extras import require
from xcit_dino.data.decode.native import Values, invalid
from xcit_dino.data.decode.tiff_file import GDAL_NODATA
from xcit_dino.data.scenes.foreground import Background
from xcit_dino.data.scenes.reader import Scene
from xcit_dino.data.shards.kinds import RGB

PNG_LEVEL = 3  # of zlib: half the time of 6 for some percent more bytes


def stored_kind(scene: Scene, pixels: str) -> tuple[str, bool]:
    """(kind of a scene's tiles given ``--pixels``, whether a fourth channel is dropped): 8-bit gray
    and color are RGB, as for other images; their opacity is dropped."""
    colors = scene.channels - scene.has_alpha
    is_plain = scene.dtype == "uint8" and colors in (1, 3, 4)
    if pixels in ("auto", RGB) and is_plain:
        return RGB, colors == 4
    return scene.kind, False


def encode_tile(values: Values, kind: str, background: Background) -> bytes:
    """One tile [H, W, C] as a file. Of integers whose scene names a no-data value the file names it
    too (TIFF); floating-point ones become NaN."""
    if kind == RGB:
        channels = values.shape[2] - background.has_alpha
        image = values[..., 0] if channels == 1 else values[..., :3]
        buffer = io.BytesIO()
        PIL.Image.fromarray(np.ascontiguousarray(image)).save(
            buffer, "PNG", compress_level=PNG_LEVEL
        )
        return buffer.getvalue()
    values = np.ascontiguousarray(values)
    buffer = io.BytesIO()
    if background.nodata is not None and values.dtype.kind in "iu":
        tags = [(GDAL_NODATA, "s", 0, f"{background.nodata:.17g}", True)]
        is_gray = values.shape[2] == 1
        require("tifffile", "tiff", "TIFF in its own depth").imwrite(
            buffer, values[..., 0] if is_gray else values, photometric="minisblack", metadata=None,
            planarconfig=None if is_gray else "contig", software=False, extratags=tags,
        )  # fmt: skip
        return buffer.getvalue()
    if (holes := invalid(values, background.nodata)) is not None:
        values = np.where(holes, np.float32(np.nan), values)
    np.save(buffer, values)
    return buffer.getvalue()
