"""Windows of a TIFF: only the tiles or strips that they touch are read and decoded."""

from __future__ import annotations

from typing import Any

import numpy as np

from xcit_dino.data.decode.native import Values
from xcit_dino.data.decode.rgb import BadImage

JPEGS = (6, 7, 34892, 33007)  # compressions whose segments need the page's tables
PHOTOMETRIC = {0: "white is zero", 1: "black is zero", 2: "RGB", 6: "YCbCr"}


class Window:
    """Reads one page of a ``tifffile.TiffFile``."""

    def __init__(self, page: Any, samples: int) -> None:
        self.page, self.samples = page, samples
        self.memory: tuple[int, Any] | None = None
        """(number, decoded) of the last segment: it may be the whole image."""
        if page.is_tiled:
            self.height, self.width = page.tilelength, page.tilewidth
        else:
            self.height = min(page.rowsperstrip, page.imagelength)
            self.width = page.imagewidth
        self.is_planar = page.axes == "SYX"

    @property
    def is_mapped(self) -> bool:
        """Whether the pixels lie in the file as they are, so that no segment has to be decoded."""
        return bool(self.page.is_memmappable and self.page.is_contiguous)

    def check(self, most: int) -> None:
        """Raise BadImage where a single segment is too large to be decoded, or the colors are none
        that are read."""
        if self.page.photometric not in PHOTOMETRIC:
            raise BadImage(f"colors of the kind {self.page.photometric} cannot be cut into tiles")
        if self.page.photometric == 6 and self.page.compression not in JPEGS:
            raise BadImage("YCbCr without JPEG compression cannot be cut into tiles")
        size = self.height * self.width
        if size > most and not self.is_mapped:
            raise BadImage(
                f"its compressed parts have {size:,} pixels each, at most {most:,} are decoded at "
                f"once; --max_pixels {size} takes it, in as much memory, or save it with TIFF tiles"
            )

    def read(self, y: int, x: int, height: int, width: int) -> Values:
        """[height, width, samples] of the page's own type."""
        page = self.page
        if self.is_mapped:
            shape = (page.imagelength, page.imagewidth, self.samples)
            shape = (shape[2], *shape[:2]) if self.is_planar else shape
            dtype = np.dtype(page.dtype).newbyteorder(page.parent.byteorder)
            mapped = page.parent.filehandle.memmap_array(dtype, shape, page.dataoffsets[0])
            part = np.moveaxis(mapped, 0, -1) if self.is_planar else mapped
            part = part[y : y + height, x : x + width]
            return part.astype(page.dtype)  # copied, in this machine's byte order
        result = np.full((height, width, self.samples), page.nodata or 0, page.dtype)
        columns = -(-page.imagewidth // self.width)
        count = -(-page.imagelength // self.height) * columns
        for plane in range(self.samples if self.is_planar else 1):
            for row in range(y // self.height, -(-(y + height) // self.height)):
                for column in range(x // self.width, -(-(x + width) // self.width)):
                    segment = self._segment(plane * count + row * columns + column)
                    if segment is not None:
                        target = result[..., plane : plane + 1] if self.is_planar else result
                        top, left = row * self.height - y, column * self.width - x
                        _paste(target, segment, top, left)
        return result

    def _segment(self, number: int) -> Values | None:
        """[h, w, samples], or None where the file leaves it out."""
        if self.memory is None or self.memory[0] != number:
            page, file = self.page, self.page.parent.filehandle
            size = page.databytecounts[number]
            data = None
            if size:
                file.seek(page.dataoffsets[number])
                data = file.read(size)
                if len(data) < size:
                    raise BadImage("the file is truncated")
            tables: dict[str, Any] = {}
            if page.compression in JPEGS:
                tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
            segment = page.decode(data, number, **tables)[0]
            self.memory = (number, None if segment is None else segment[0])
        return self.memory[1]


def _paste(target: Values, part: Values, top: int, left: int) -> None:
    """Copy what of ``part``, whose corner lies at (top, left), falls into ``target``."""
    height, width = target.shape[:2]
    rows = slice(max(top, 0), min(top + part.shape[0], height))
    columns = slice(max(left, 0), min(left + part.shape[1], width))
    target[rows, columns] = part[rows.start - top : rows.stop - top,
                                 columns.start - left : columns.stop - left]  # fmt: skip
