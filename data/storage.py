"""Bytes of a shard, wherever it lies; remote ones are in remote.py."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.index import ShardIndex, key_of
from xcit_dino.data.tarscan import BLOCK

MAX_OPEN = 128  # files a process keeps open; a window of shards is smaller
MAX_BYTES = 1 << 28  # no photograph is larger; an index that says so is damaged or hostile

Place = tuple[int, int, int]
"""(shard number, offset, size in bytes)"""


class Unreadable(Exception):
    """The bytes cannot be had; the message is the reason."""


class Source(Protocol):
    """Reads byte ranges of shards. After a fork each process opens its own files."""

    def read_many(self, places: Sequence[Place]) -> list[bytes | Unreadable]:
        """One result for each place, failures (shard gone, too short ...) in their places."""
        ...


def open_source(index: ShardIndex, config: LoaderConfig) -> Source:
    """The source of an index's shards that the options ask for."""
    return LocalSource([index.path(shard) for shard in range(len(index.shards))])


def read_key(source: Source, shard: int, offset: int) -> str:
    """The key of the sample whose image lies at ``offset``; "" where its header is unreadable."""
    header = source.read_many([(shard, max(offset - BLOCK, 0), BLOCK)])[0]
    return "" if isinstance(header, Unreadable) else key_of(header)


class LocalSource:
    """Shards on a local or network file system; the files last used stay open."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        self._open: OrderedDict[int, int] = OrderedDict()

    def read_many(self, places: Sequence[Place]) -> list[bytes | Unreadable]:
        """Reads in the order of storage, which discs and their read-ahead like."""
        results: list[Any] = [None] * len(places)
        for number in sorted(range(len(places)), key=places.__getitem__):
            try:
                results[number] = self._read(*places[number])
            except Unreadable as failure:
                results[number] = failure
        return results

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        if not 0 <= size <= MAX_BYTES:
            raise Unreadable(f"{size} bytes are no image")
        try:
            data = os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            raise Unreadable(f"{type(error).__name__}: {error.strerror}") from None
        if len(data) < size:
            raise Unreadable(f"shard is truncated: {len(data)} of {size} bytes at {offset}")
        return data

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        return self._open[shard]
