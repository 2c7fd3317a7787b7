"""Bytes of samples, wherever their shards lie.

Local files are read where they are. For remote shards (http(s), s3, gs through fsspec) there are
two ways, chosen by ``--cache_dir``: without it every sample is a range request of its own, so that
each node moves only what it uses; with it whole shards are copied once into a bounded local folder
(cache.py), ahead of their use. The output of a command (``pipe:``) has no ranges and needs the
cache. Requests that fail are repeated (remote.py) before the sample counts as unreadable.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property, partial
from typing import Any, Protocol

from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.io.cache import ShardCache
from xcit_dino.data.io.remote import (
    GivenUp,
    Remote,
    Unreadable,
    persistent_chunks,
    persistently,
    pipe_chunks,
)
from xcit_dino.data.shards.index import ShardIndex, is_url, key_of, raw_key
from xcit_dino.data.shards.tar import BLOCK
from xcit_dino.errors import InputError

JSON_BYTES = 4096  # before and behind an image: where its JSON lies, header included
MAX_OPEN = 128  # files a process keeps open
MAX_BYTES = 1 << 28  # no photograph is larger; such an index is damaged or hostile
REQUESTS = 16  # of a worker under way at once: hides the latency of a distant store

Place = tuple[int, int, int]
"""(shard number, offset, size in bytes)"""


class Source(Protocol):
    """Reads samples. After a fork, each process opens files and connections of its own."""

    def read_many(self, places: Sequence[Place]) -> list[bytes | Unreadable]:
        """One result for each place, failures (shard gone, too short ...) in their places."""
        ...


def open_source(index: ShardIndex, config: LoaderConfig) -> LocalSource | RemoteSource:
    """The source of an index's shards, by the options.

    Raises:
        InputError: options that conflict.
    """
    base = (shards_at(index, config.shard_url) or index.root).rstrip("/")
    pipe = base.startswith("pipe:")
    if not pipe and not is_url(base):
        return LocalSource([f"{base}/{name}" for name in index.shards])
    if pipe and "{shard}" not in base:
        raise InputError("--shard_url pipe:COMMAND needs {shard} where the shard's name goes")
    if config.cache_dir is None:
        if pipe:
            raise InputError("--shard_url pipe:COMMAND needs --cache_dir for the shards it writes")
        return RemoteSource(Remote(base), index.shards)
    return CachedSource(_cache(index, config, base), max_open=2 * config.shuffle_window)


def shards_at(index: ShardIndex, url: str | None) -> str | None:
    """Where the shards of a split lie, given ``--shard_url``; None: beside their index.

    ``{split}`` in the URL stands for the name of the index's folder, and so does a last part
    ``train`` or ``val``. A URL without either is that of the training shards: those of val then
    have to lie beside their index, as the names of both splits' shards are the same.

    Raises:
        InputError: it does not cover those of val.
    """
    split = index.root.rstrip("/").rpartition("/")[2]
    if url is None or split not in ("train", "val"):
        return url
    if "{split}" in url:
        return url.replace("{split}", split)
    head, slash, last = url.rstrip("/").rpartition("/")
    if last in ("train", "val"):
        return f"{head}{slash}{split}"
    if split == "train":
        return url
    if index.shards and not is_url(index.root) and os.path.isfile(index.path(0)):
        return None
    raise InputError(
        f"--shard_url {url}: says where the shards of train lie, not those of val; write {{split}} "
        "where train or val goes in it"
    )


def _cache(index: ShardIndex, config: LoaderConfig, base: str) -> ShardCache:
    assert config.cache_dir is not None
    sizes = index.shard_bytes.tolist()
    needed = 2 * sum(sorted(sizes)[-config.shuffle_window :])
    capacity = int(config.cache_gb * 1e9)
    if capacity < min(needed, sum(sizes)):
        raise InputError(
            f"--cache_gb {config.cache_gb:g} is too small: two windows of {config.shuffle_window} "
            f"shards take {needed / 1e9:.3g} GB; raise it (a training may lower --shuffle_window)"
        )
    chunks = partial(pipe_chunks, base[5:]) if base.startswith("pipe:") else Remote(base).chunks
    return ShardCache(
        config.cache_dir, partial(persistent_chunks, chunks), index.shards, sizes, index.sha256,
        source=base, capacity=capacity,
    )  # fmt: skip


def read_key(source: Source, shard: int, offset: int) -> str:
    """The key of the sample whose image lies at ``offset``; "" where its header is unreadable."""
    start = max(offset - BLOCK - JSON_BYTES, 0)
    blocks = source.read_many([(shard, start, offset - start)])[0]
    return "" if isinstance(blocks, Unreadable) else key_of(blocks)


def read_origin(source: Source, index: ShardIndex, sample: int) -> tuple[str, str]:
    """A sample's key, and the file that it was packed from: the ``source`` in the ``.json`` beside
    its image; "" for what the shard lacks."""
    key, facts = read_facts(source, index, sample)
    return key, str(facts.get("source", ""))


def read_facts(source: Source, index: ShardIndex, sample: int) -> tuple[str, dict[str, Any]]:
    """A sample's key, and what the ``.json`` beside its image says, where there is one."""
    shard, offset, size = index.locate(sample)
    start, behind = max(offset - BLOCK - JSON_BYTES, 0), offset + -(-size // BLOCK) * BLOCK
    end = min(behind + JSON_BYTES, int(index.shard_bytes[shard]))
    places = [(shard, start, offset - start), (shard, behind, max(end - behind, 0))]
    before, after = source.read_many(places)
    if isinstance(before, Unreadable):
        return "", {}
    name = f"{raw_key(before)}.json".encode("utf-8", "surrogateescape")
    facts: dict[str, Any] = {}
    for data in (before, after):
        if not isinstance(data, Unreadable):
            facts |= _facts_in(data, name)
    return key_of(before), facts


def _facts_in(blocks: bytes, name: bytes) -> dict[str, Any]:
    """The JSON file of that name, if a part of a tar holds it whole."""
    for start in range(0, len(blocks), BLOCK):
        header = blocks[start : start + BLOCK]
        if header.startswith(name + b"\0"):
            with suppress(ValueError):
                size = int(header[124:136].strip(b"\0 "), 8)
                facts = json.loads(blocks[start + BLOCK :][:size])
                return facts if isinstance(facts, dict) else {}
    return {}


class LocalSource:
    """Shards on a local or network file system; the files last used stay open."""

    def __init__(self, paths: Sequence[str], max_open: int = MAX_OPEN) -> None:
        self.paths, self.max_open = paths, max_open
        self._open: OrderedDict[int, int] = OrderedDict()

    def read_many(self, places: Sequence[Place]) -> list[bytes | Unreadable]:
        """Reads in the order of storage, which suits disks and their read-ahead."""
        results: list[Any] = [None] * len(places)
        for number in sorted(range(len(places)), key=places.__getitem__):
            results[number] = outcome(self._read, places[number])
        return results

    def _read(self, place: Place) -> bytes:
        shard, offset, size = place
        try:
            data = os.pread(self._descriptor(shard), _checked(size), offset)
        except OSError as error:
            raise Unreadable(f"{type(error).__name__}: {error.strerror}") from None
        if len(data) < size:
            raise Unreadable(f"shard is truncated: {len(data)} of {size} bytes at {offset}")
        return data

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= self.max_open:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = self._opened(shard)
        return self._open[shard]

    def _opened(self, shard: int) -> int:
        return os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)


class CachedSource(LocalSource):
    """Remote shards through their local copies."""

    def __init__(self, cache: ShardCache, max_open: int) -> None:
        super().__init__((), max_open)
        self.cache = cache
        self._given_up = GivenUp()

    def _opened(self, shard: int) -> int:
        return self._given_up.unless(shard, lambda: self.cache.open(shard))


class RemoteSource:
    """Remote shards by range requests, many at once."""

    def __init__(self, remote: Remote, names: Sequence[str]) -> None:
        self.remote, self.names = remote, names
        self._given_up = GivenUp()

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:  # made in the process that reads, after the fork
        return ThreadPoolExecutor(REQUESTS, "shard reads")

    def read_many(self, places: Sequence[Place]) -> list[bytes | Unreadable]:
        return list(self._threads.map(partial(outcome, self._read), places))

    def _read(self, place: Place) -> bytes:
        shard, offset, size = place
        request = partial(self.remote.read, self.names[shard], offset, _checked(size))
        return self._given_up.unless(shard, lambda: persistently(request))


def outcome(read: Callable[[Place], bytes], place: Place) -> bytes | Unreadable:
    try:
        return read(place)
    except Unreadable as failure:
        return failure


def _checked(size: int) -> int:
    if not 0 <= size <= MAX_BYTES:
        raise Unreadable(f"{size} bytes are no image")
    return size
