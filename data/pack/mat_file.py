"""Read a MATLAB 5 ``.mat`` file: as much of the format as ILSVRC's and Flowers102's labels use.

Format: MathWorks, "MAT-File Format", level 5. Numbers, text, cells and structs; nothing in such a
file can run. Damaged files made SciPy's reader crash the interpreter.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from xcit_dino.errors import InputError

NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8",
           13: "u8", 16: "u1", 17: "u2"}  # fmt: skip
MATRIX, COMPRESSED = 14, 15
CELL, STRUCT, CHAR = 1, 2, 4
MAX_BYTES = 1 << 26
MAX_DEPTH = 8


def read_mat(data: bytes, name: str) -> dict[str, Any]:
    """Variables of a ``.mat`` file: arrays, text, lists of cells, lists of dicts (structs).

    Raises:
        InputError: it is none, or damaged; ``name`` is used in the message.
    """
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    try:
        if order is None:
            raise ValueError("no level 5 header")
        return dict(_variable(kind, body, order) for kind, body in _elements(data[128:], order))
    except (ValueError, OverflowError, IndexError, struct.error, zlib.error) as error:
        raise InputError(f"{name} is no readable .mat file: {error}") from None


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, body) of the data elements in ``data``."""
    at = 0
    while at + 8 <= len(data):
        kind, length = struct.unpack_from(order + "II", data, at)
        if kind >> 16:  # small data element: length and type share a word, the body is the next one
            kind, length = kind & 0xFFFF, kind >> 16
            yield kind, data[at + 4 : at + 4 + min(length, 4)]
            at += 8
            continue
        if at + 8 + length > len(data):
            raise ValueError("truncated")
        yield kind, data[at + 8 : at + 8 + length]
        at += 8 + (length if kind == COMPRESSED else -(-length // 8) * 8)


def _variable(kind: int, body: bytes, order: str) -> tuple[str, Any]:
    if kind == COMPRESSED:
        inflate = zlib.decompressobj()
        body = inflate.decompress(body, MAX_BYTES)
        if inflate.unconsumed_tail:
            raise ValueError("too large")
        kind, body = next(_elements(body, order), (0, b""))
    if kind != MATRIX:
        raise ValueError(f"unexpected element of type {kind}")
    return _matrix(body, order, 0)


def _matrix(body: bytes, order: str, depth: int) -> tuple[str, Any]:
    """(name, value) of one array."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    parts = list(_elements(body, order))
    if not parts:
        return "", np.zeros((0, 0))
    flags = _numbers(*parts[0], order)[0]
    shape = tuple(int(n) for n in _numbers(*parts[1], order))
    name, rest, what = parts[2][1].decode("latin1"), parts[3:], int(flags) & 0xFF
    if what == CELL:
        return name, [_matrix(part, order, depth + 1)[1] for _, part in rest]
    if what == STRUCT:
        width = int(_numbers(*rest[0], order)[0])
        packed = rest[1][1].decode("latin1")
        fields = [packed[i : i + width].split("\0")[0] for i in range(0, len(packed), width)]
        values = [_matrix(part, order, depth + 1)[1] for _, part in rest[2:]]
        rows = zip(*[iter(values)] * len(fields), strict=True) if fields else []
        return name, [dict(zip(fields, row, strict=True)) for row in rows]
    values = _numbers(*rest[0], order)
    if what == CHAR:
        return name, "".join(chr(int(code)) for code in values)
    return name, values.reshape(shape, order="F")


def _numbers(kind: int, body: bytes, order: str) -> np.ndarray:
    if kind not in NUMBERS:
        raise ValueError(f"unexpected numbers of type {kind}")
    return np.frombuffer(body, np.dtype(order + NUMBERS[kind]))
