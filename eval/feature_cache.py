"""The feature cache: each set is computed once, by one command, and not removed while another
command reads it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from xcit_dino.errors import RunError
from xcit_dino.files import FileLock, alive, write_atomic
from xcit_dino.train.distributed import dist

POLL = 0.5  # seconds between checks for features being computed by another command


class CachedFeatures:
    """One folder of features, ``RUN/features/NETWORK-SPLIT-KEY``, and this process's lock on it.

    The lock is exclusive while the features are computed, and shared as long as this object lives.
    All ranks create one; rank 0 holds the lock for them.
    """

    def __init__(self, path: Path):
        self.path = path
        self.unfinished = Path(dist.from_main(lambda: str(_unfinished(path))))
        self.lock = FileLock(_lock_of(path))
        weakref.finalize(self, self.lock.release)

    def claim(self) -> bool:
        """Wait until the features exist (False), or these ranks have to compute them (True).

        Raises:
            RunError: the folder cannot be written.
        """
        said = False
        while (state := dist.from_main(self._look)) == "busy":
            if dist.is_main() and not said:
                said = True
                print(f"{self.path.name}: being computed by another command; waiting", flush=True)
            time.sleep(POLL)
        return state == "absent"

    def _look(self) -> Literal["there", "absent", "busy"]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.lock.take(shared=True, wait=False):
                if self.path.is_dir():
                    return "there"
                self.lock.release()
            if self.lock.take(wait=False):
                if not self.path.is_dir():
                    return "absent"
                self.lock.release()
        except OSError as error:
            raise RunError(
                f"{self.path.parent}: {error.strerror}; free it, or name another folder with "
                "--output_dir"
            ) from error
        return "busy"

    def publish(self, facts: dict[str, Any]) -> None:
        """Rename the computed features to their final name and release the lock; remove unused
        features of earlier weights or options."""
        write_atomic(self.unfinished / "meta.json", json.dumps(facts, indent=1) + "\n")
        if not self.path.is_dir():  # it is, where a file system has no locks
            os.replace(self.unfinished, self.path)
        self._remove_others()
        self.abandon()

    def facts(self) -> dict[str, Any]:
        """What the features depend on, and whether they are the same for all images
        (``constant``)."""
        return json.loads((self.path / "meta.json").read_text())

    def abandon(self) -> None:
        """Remove unfinished features and release the lock."""
        shutil.rmtree(self.unfinished, ignore_errors=True)
        self.lock.release()

    def _remove_others(self) -> None:
        prefix = self.path.name.rpartition("-")[0]
        for old in self.path.parent.glob(f"{prefix}-*"):
            if old != self.path:
                _remove(old, old)
        for left in self.path.parent.glob(f".{prefix}-*.{platform.node()}.*.tmp"):
            if not alive(int(left.name.split(".")[-2])):  # it was killed
                _remove(self.path.with_name(left.name.split(".")[1]), left)


def newest_first(folder: Path, pattern: str) -> list[Path]:
    """Existing feature folders, newest first."""
    times = {}
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):  # another command has just removed it
            times[path] = path.stat().st_mtime
    return sorted(times, key=lambda path: times[path], reverse=True)


@contextmanager
def reading(path: Path) -> Iterator[bool]:
    """Whether a feature folder exists; it is not removed inside the block. Read-only: a folder
    without a lock file (of an earlier version) is read without a lock."""
    try:
        file = os.open(_lock_of(path), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield path.is_dir()
        return
    try:
        with suppress(OSError):  # no locks supported, or just being removed: then it is gone
            fcntl.flock(file, fcntl.LOCK_SH)
        yield path.is_dir()
    finally:
        os.close(file)


def _remove(target: Path, folder: Path) -> None:
    """Remove a folder of the cache unless the lock of ``target`` is held."""
    lock = FileLock(_lock_of(target))
    if lock.take(wait=False):
        shutil.rmtree(folder, ignore_errors=True)
        lock.path.unlink(missing_ok=True)
        lock.release()


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
