"""A bounded local folder with copies of remote shards, shared by all processes of a node.

A shard is copied by whoever needs it first, under a lock of its own (the others wait for it), and
appears under its name only when it is whole and has the size, and the SHA-256 where the index has
one, that the index says. When the folder is full the shards unused for longest go; a process
that still reads one keeps it open and does not notice.
"""

from __future__ import annotations

import copy
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from xcit_dino.data.io.remote import Unreadable
from xcit_dino.data.plan import Plan
from xcit_dino.files import atomic_path, locked

PART = ".part"
Chunks = Callable[[str, int], Iterator[bytes]]
"""Yields the bytes of the shard of that name and size; raises Unreadable."""


class ShardCache:
    """Local copies of ``names``, at most ``capacity`` bytes of them.

    Args:
        folder: shared by all who read the same shards; other data sets may share it too.
        chunks: downloads a shard.
        names, sizes, sha256: of the shards, from the index.
        source: their URL, which distinguishes shards of the same names.
    """

    def __init__(
        self,
        folder: Path,
        chunks: Chunks,
        names: Sequence[str],
        sizes: Sequence[int],
        sha256: Sequence[str | None],
        *,
        source: str,
        capacity: int,
    ) -> None:
        self.folder, self.chunks, self.capacity = folder, chunks, capacity
        self.names, self.sizes, self.sha256 = names, sizes, sha256
        self.home = folder / hashlib.sha256(source.encode()).hexdigest()[:16]

    def open(self, shard: int) -> int:
        """A file descriptor of the local copy, downloaded if necessary.

        Raises:
            Unreadable: the shard cannot be read.
        """
        while True:
            path = self.fetch(shard)
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # another process has just made room
                continue
            os.utime(path)
            return descriptor

    def fetch(self, shard: int) -> Path:
        """The local copy's path."""
        path = self.home / self.names[shard]
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                self._download(shard, path)
        return path

    def _download(self, shard: int, path: Path) -> None:
        part, digest = path.with_name(path.name + PART), hashlib.sha256()
        try:
            with atomic_path(path, part), part.open("wb") as file:
                self._make_room(file.fileno(), self.sizes[shard])
                for chunk in self.chunks(self.names[shard], self.sizes[shard]):
                    file.write(chunk)
                    digest.update(chunk)
                    if file.tell() > self.sizes[shard]:
                        break
                if file.tell() != self.sizes[shard]:
                    raise Unreadable(f"shard has {file.tell()} bytes, not {self.sizes[shard]}")
                if self.sha256[shard] not in (None, digest.hexdigest()):
                    raise Unreadable("shard has changed since it was indexed (SHA-256)")
        except OSError as error:
            raise Unreadable(f"{type(error).__name__} in the cache: {error.strerror}") from None

    def _make_room(self, part: int, size: int) -> None:
        """Reserve ``size`` bytes for the file ``part``; removes the least recently used copies."""
        with locked(self.folder / ".lock"):
            kept = sorted(_copies(self.folder), key=lambda item: item[1].st_mtime)
            total = sum(status.st_size for _, status in kept)
            for path, status in kept:
                if total + size <= self.capacity:
                    break
                if path.suffix != PART:
                    path.unlink(missing_ok=True)
                    total -= status.st_size
            os.ftruncate(part, size)  # counts from now on


class ReadAhead:
    """A thread that copies the running and the next window's shards before they are requested.

    Without a cache it does nothing. It starts with the first step reached, when the workers have
    been forked.
    """

    def __init__(self, cache: ShardCache | None, plan: Plan) -> None:
        self.cache, self.plan = cache, copy.deepcopy(plan)  # a plan is for one thread
        self.step = 0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def reached(self, step: int) -> None:
        """Training is at ``step``."""
        self.step = step
        if self.cache is not None and self._thread is None:
            self._thread = threading.Thread(target=self._run, args=(self.cache,), daemon=True)
            self._thread.start()

    def _run(self, cache: ShardCache) -> None:
        epoch, window, windows = self.plan.window_of(self.step)
        while not self._end.is_set():
            now_epoch, now_window, _ = self.plan.window_of(self.step)
            if (epoch - now_epoch) * windows + window - now_window > 1:
                self._end.wait(0.2)
                continue
            for shard in self.plan.shards_of_window(epoch, window):
                if self._end.is_set():
                    return
                try:
                    cache.fetch(int(shard))
                except Unreadable:  # the worker that needs it reports it
                    continue
            epoch, window = (epoch, window + 1) if window + 1 < windows else (epoch + 1, 0)


def _copies(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """Shards and parts of shards in the cache; those removed meanwhile are skipped."""
    found = []
    for path in folder.rglob("*"):
        if path.name.startswith("."):
            continue
        try:
            if path.is_file():
                found.append((path, path.stat()))
        except FileNotFoundError:
            continue
    return found
