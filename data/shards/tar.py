"""Where the members of a tar lie, read from its headers alone and without trusting them.

Nothing is extracted, so no member can name a place to be written to. Links, devices, sparse files
and members that leave the archive are reported, not followed. After a damaged header the scan goes
on at the next block that is a valid one, so that one bad byte does not lose the rest of a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
CHUNK = 1 << 20  # on most storage a seek costs what reading on for a megabyte does
MAX_EXTENDED = 1 << 20  # a pax header or long name above 1 MiB is an attack, not a name
MAX_MEMBER = (1 << 31) - 1  # sizes are kept as int32
ZERO = bytes(BLOCK)

ReadAt = Callable[[int, int], bytes]
"""``read_at(position, length)``: up to ``length`` bytes, fewer at the end of the file."""


class Member(NamedTuple):
    """A regular file in the tar: its data are ``size`` bytes at ``offset``."""

    name: str
    offset: int
    size: int


class Damage(NamedTuple):
    """Something that is not a readable member; ``offset`` is the position of its header."""

    name: str
    offset: int
    reason: str


class _Window:
    """Serves small reads from the chunk read last, so that neighboring headers cost one read."""

    def __init__(self, read_at: ReadAt):
        self.read_at, self.start, self.data = read_at, 0, b""

    def get(self, position: int, length: int) -> bytes:
        at = position - self.start
        if at < 0 or at + length > len(self.data):
            self.start, at = position, 0
            self.data = self.read_at(position, max(length, CHUNK))
        return self.data[at : at + length]


def _number(field: bytes) -> int:
    """An octal or base-256 header field; raises ValueError when it is neither."""
    if field[0] & 0x80:  # GNU and POSIX base-256, big-endian; 0xff would mean negative
        return -1 if field[0] == 0xFF else int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _valid(header: bytes) -> bool:
    """True when the header's checksum (POSIX ustar: the field itself counts as blanks) holds."""
    if len(header) < BLOCK:
        return False
    try:
        stored = _number(header[148:156])
    except ValueError:
        return False
    return stored == sum(header) - sum(header[148:156]) + 256


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _ustar_name(header: bytes) -> str:
    name = _text(header[:100])
    if header[257:263] == b"ustar\0":  # GNU headers keep times where POSIX keeps the prefix
        prefix = _text(header[345:500])
        return f"{prefix}/{name}" if prefix else name
    return name


def _pax(data: bytes) -> dict[str, str]:
    """Records ``"<length> <key>=<value>\\n"`` of a pax header; raises ValueError on any other."""
    records = {}
    while data.strip(b"\0"):
        digits, _, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        if not len(digits) + 1 < length <= len(data):
            raise ValueError("damaged extended tar header")
        key, equals, value = data[len(digits) + 1 : length - 1].partition(b"=")
        if not equals:
            raise ValueError("damaged extended tar header")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return records


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _next_header(window: _Window, position: int, end: int) -> int:
    """The first block at or after ``position`` that is a valid header; ``end`` if there is none."""
    while position + BLOCK <= end:
        header = window.get(position, BLOCK)
        # Most blocks of image data fail here, before the whole block is summed.
        if header[154:155] in b"\0 " and header[0] and _valid(header):
            return position
        position += BLOCK
    return end


def scan(read_at: ReadAt, end: int, start: int = 0) -> Iterator[Member | Damage]:
    """Yield every regular file between ``start`` and ``end`` and everything that is wrong.

    Args:
        read_at: access to the bytes of the file.
        end: position behind the archive (the size of the file).
        start: position of the first header (an archive may lie inside another one).
    """
    window, position, extended = _Window(read_at), start, {}
    while position < end:
        header = window.get(position, BLOCK)
        if header == ZERO and window.get(position + BLOCK, BLOCK) in (ZERO, b""):
            hole, position = position, _next_header(window, position + BLOCK, end)
            if end - hole > CHUNK or position < end:  # no tar pads its end by a megabyte
                yield Damage("", hole, f"{position - hole} bytes without a header")
            if position == end:
                return
            extended = {}
            continue
        try:
            size = _number(header[124:136]) if _valid(header) else -1
        except ValueError:
            size = -1
        if size < 0:
            reason = "truncated tar" if len(header) < BLOCK else "damaged tar header"
            yield Damage("", position, reason)
            if (position := _next_header(window, position + BLOCK, end)) == end:
                return
            extended = {}
            continue
        kind, data = header[156:157], position + BLOCK
        if kind in b"xgLK" and kind:
            try:
                extended |= _extended(kind, window.get(data, min(size, MAX_EXTENDED + 1)))
                position = data + _padded(size)
            except ValueError as error:
                yield Damage("", position, str(error))
                if (position := _next_header(window, data, end)) == end:
                    return
            continue
        name = extended.get("path") or _ustar_name(header)
        try:
            size = int(extended.get("size", size))
        except ValueError:
            size = -1
        sparse = any(key.startswith("GNU.sparse") for key in extended)
        extended = {}
        if kind in b"\x000\x007" and not sparse and not name.endswith("/"):
            if 0 <= size and data + size <= end:
                yield Member(name, data, size)
            else:
                yield Damage(name, position, "member runs past the end of the tar (truncated?)")
                if (position := _next_header(window, data, end)) == end:
                    return
                continue
        elif kind != b"5" and not name.endswith("/"):
            yield Damage(name, position, f"not a regular file (tar type {kind!r})")
            # Links and devices carry no data whatever their size field (POSIX pax, "size").
            size = 0 if kind in b"12346" else size
        position = data + _padded(max(size, 0))
    yield Damage("", end, "no end-of-archive mark (truncated?)")


def name_behind(blocks: bytes) -> str:
    """The name of the member whose data begin where ``blocks`` end; "" if these hold no header.

    Names that are long or not ASCII stand in an extended header in front of the member's own, which
    holds a replacement only (Python's tarfile writes ``?`` there).
    """
    own = len(blocks) - BLOCK
    if own < 0 or not _valid(blocks[own:]):
        return ""
    for start in range(own - 2 * BLOCK, -1, -BLOCK):
        header = blocks[start : start + BLOCK]
        if header[156:157] in (b"x", b"L") and _valid(header):
            try:
                size = _number(header[124:136])
                if start + BLOCK + _padded(size) != own:
                    break
                data = blocks[start + BLOCK : start + BLOCK + size]
                return _extended(header[156:157], data).get("path") or _ustar_name(blocks[own:])
            except ValueError:
                break
    return _ustar_name(blocks[own:])


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
    """The next member's fields in a pax header (x, g) or GNU long name (L; K is a link's)."""
    if len(data) > MAX_EXTENDED:
        raise ValueError("oversized extended tar header")
    if kind == b"x":
        return _pax(data)
    return {"path": _text(data)} if kind == b"L" else {}
