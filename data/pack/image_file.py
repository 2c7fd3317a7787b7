"""Where the bytes of one image lie, in a file, a tar or a zip, and reading them from there."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections import OrderedDict
from typing import NamedTuple

from xcit_dino.data.decode.rgb import BadImage
from xcit_dino.data.io.storage import MAX_BYTES, MAX_OPEN


class Place(NamedTuple):
    """Where a tile lies in its scene, in the scene's pixels; stored in the tile's ``.json``."""

    scene: str
    """Name of the scene: its path inside the source."""
    scene_width: int
    scene_height: int
    x: int
    y: int
    """Of the tile's left upper corner."""
    tile: int
    """Side of the tile."""
    stride: int
    """Between the corners of neighboring tiles."""


class Image(NamedTuple):
    """The bytes of one image: a whole file, or a part of an archive."""

    name: str
    """Path inside the source, with slashes."""
    path: str
    """The file that holds it."""
    offset: int = -1
    """-1: the whole file. In a zip: of the local header."""
    size: int = 0
    """Bytes of the image."""
    method: int = -1
    """-1: not in a zip; else the zip's compression method (0 stored, 8 deflated)."""
    stored: int = 0
    """Bytes that it takes in a zip."""
    crc: int = 0
    """Of the decompressed bytes, in a zip."""
    label: str | None = None
    """Class, if the source stores it (a list of path,label)."""
    split: str | None = None
    """Split, if a list stores it."""
    target: Image | bytes | None = None
    """Its mask, or as JSON its boxes (``targets/boxes.py``) or labels (a list), if it has such."""
    place: Place | None = None
    """Of a tile, in its scene."""


def read_image(image: Image) -> bytes:
    """The encoded image.

    Raises:
        BadImage: it cannot be read, or is absurdly large.
    """
    if max(image.size, image.stored) > MAX_BYTES:
        raise BadImage(f"{image.size} bytes are no image")
    try:
        if image.offset < 0:
            with open(image.path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise BadImage(f"more than {MAX_BYTES} bytes are no image")
            return data
        if image.method < 0:
            return _part(image.path, image.offset, image.size)
        return _unzip(image)
    except (OSError, zlib.error) as error:
        raise BadImage(f"cannot be read: {error}") from None


_opened: OrderedDict[str, int] = OrderedDict()  # of this process, the last used at the end


def _descriptor(path: str) -> int:
    """Of an open file; those not used for long are closed."""
    if path in _opened:
        _opened.move_to_end(path)
        return _opened[path]
    if len(_opened) >= MAX_OPEN:
        os.close(_opened.popitem(last=False)[1])
    _opened[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return _opened[path]


def _part(path: str, offset: int, size: int) -> bytes:
    data = os.pread(_descriptor(path), size, offset)
    if len(data) < size:
        raise BadImage("the archive is truncated")
    return data


def _unzip(image: Image) -> bytes:
    header = _part(image.path, image.offset, 30)  # APPNOTE.TXT 4.3.7, local file header
    if header[:4] != b"PK\3\4":
        raise BadImage("damaged zip entry")
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    data = _part(image.path, image.offset + 30 + name + extra, image.stored)
    if image.method == zipfile.ZIP_DEFLATED:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        data = inflate.decompress(data, MAX_BYTES)
        if inflate.unconsumed_tail:
            raise BadImage(f"more than {MAX_BYTES} bytes are no image")
    if zlib.crc32(data) != image.crc:
        raise BadImage("damaged zip entry (checksum)")
    return data
