"""TIFF through tifffile: strips, tiles, planar, compressed, many pages, BigTIFF, any sample type.

The pages of a file are its channels, those of one page after those of the page before, where all
are of one size and type (``--page`` takes one); otherwise the first page counts. Reduced versions
(pyramids, thumbnails) are no pages. White-is-zero is inverted. A no-data value in GDAL's tag marks
invalid pixels. The orientation tag is not honored, as in GDAL and tifffile.
"""

from __future__ import annotations

import io
import logging
import math
from typing import Any

import numpy as np

from xcit_dino.data.decode.extras import require
from xcit_dino.data.decode.native import NativeHeader, Values, Wanted, check_size, dtype_of
from xcit_dino.data.decode.rgb import BadImage

GDAL_NODATA = 42113
MAX_PAGES = 4096


def read_header(raw: bytes, wanted: Wanted) -> NativeHeader:
    """Raises BadImage for volumes in a page, complex numbers, white-is-zero of signed values."""
    tifffile = require("tifffile", "tiff", "TIFF in its own depth")
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs what it then raises
    # Formats that would open other files beside this one are plain TIFF here.
    file = tifffile.TiffFile(io.BytesIO(raw), is_ome=False, is_mmstack=False, is_ndtiff=False)
    pages = pages_of(file, wanted.page)
    first = pages[0]
    stored = np.dtype(first.dtype) if first.dtype is not None else None
    if stored is None:
        raise BadImage(f"{first.bitspersample} bits a sample are not supported")
    kind = dtype_of(stored)
    height, width, samples = shape_of(first)
    channels = samples * len(pages)
    check_size(height, width, channels, stored, wanted)
    _check_chunk(first, stored, wanted)
    if first.photometric == 0 and stored.kind not in "ub":
        raise BadImage("white-is-zero of values that are not unsigned integers")

    def load() -> Values:
        planes = [_upright(page, page.asarray(maxworkers=1)) for page in pages]
        values = planes[0] if len(planes) == 1 else np.concatenate(planes, -1)
        if first.photometric == 0:
            most = (1 << first.bitspersample) - 1
            values = (most - values.astype(np.int64)).astype(stored)
        return values

    return NativeHeader(height, width, channels, kind, load, nodata_of(first), len(pages))


def pages_of(file: Any, page: int | None) -> list[Any]:
    """The page that is wanted, or those that are stacked."""
    if page is not None:
        try:
            return [file.pages[page]]
        except IndexError:
            raise BadImage(f"has {len(file.pages)} pages, and none of number {page}") from None
    pages = [file.pages.first]
    if len(file.pages) > MAX_PAGES:
        raise BadImage(f"{len(file.pages)} pages; --page takes one")
    pages += [page for page in list(file.pages)[1:] if not int(page.subfiletype) & 1]
    if file.is_imagej and (file.imagej_metadata or {}).get("images", 1) > len(file.pages):
        raise BadImage("an ImageJ stack that names its first page only; save it as plain TIFF")
    first = pages[0]
    same = all((p.shape, p.dtype, p.axes) == (first.shape, first.dtype, first.axes) for p in pages)
    return pages if same else pages[:1]


def shape_of(page: Any) -> tuple[int, int, int]:
    """(height, width, samples)."""
    if page.axes not in ("YX", "YXS", "SYX"):
        raise BadImage(f"a page of axes {page.axes}: volumes are no images")
    return (
        page.imagelength,
        page.imagewidth,
        math.prod(page.shape) // max(1, page.imagelength * page.imagewidth),
    )


def _check_chunk(page: Any, dtype: np.dtype, wanted: Wanted) -> None:
    """A tile takes memory whatever the image's size."""
    check_size(max(page.tilelength, 1), max(page.tilewidth, 1), 1, dtype, wanted)


def _upright(page: Any, values: Values) -> Values:
    """[H, W, S]."""
    if page.axes == "SYX":
        return np.moveaxis(values, 0, -1)
    return values if page.axes == "YXS" else values[..., None]


def nodata_of(page: Any) -> float | None:
    tag = page.tags.get(GDAL_NODATA)
    try:
        value = float(str(tag.value).strip(" \0")) if tag is not None else None
    except ValueError:
        return None
    return value if value is None or math.isfinite(value) else None
