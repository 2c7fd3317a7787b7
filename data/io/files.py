"""Files and folders that are there whole or not at all, locks between processes, checksums."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def write_atomically(path: Path, pieces: Iterable[bytes]) -> None:
    """Write ``pieces`` under a temporary name, flush them to disk, then give the final name."""
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def unfinished_folder(target: Path) -> Iterator[Path]:
    """A new folder beside ``target``, which takes its place when the block ends and is removed
    where it fails; what a killed process of this machine left is removed first."""
    prefix = f".{target.name}.{platform.node()}."
    for left in target.parent.glob(f"{prefix}*.tmp"):
        pid = left.name.removeprefix(prefix).removesuffix(".tmp")
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = target.with_name(f"{prefix}{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        replace_folder(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_folder(folder: Path, target: Path) -> None:
    """Rename a folder; what is at ``target`` is put aside first and removed afterwards."""
    aside = folder.with_name(f"{folder.name}.old.tmp")
    while True:
        try:
            os.rename(folder, target)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(target, aside)
    shutil.rmtree(aside, ignore_errors=True)


class FileLock:
    """A lock that one process holds alone, or several share; it ends with the process.

    It is the operating system's (``flock``; NFS carries it too). Where a file system has none, it
    is given to everybody: what it protects must then still be written whole or not at all.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file = -1

    def take(self, *, shared: bool = False, wait: bool = True) -> bool:
        """Whether it was taken; always, unless ``wait`` is false.

        Raises:
            OSError: the lock file cannot be made.
        """
        kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(file, kind)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    os.close(file)
                    if isinstance(error, BlockingIOError):
                        return False
                    raise
            if self._is_there(file):
                self.file = file
                return True
            os.close(file)  # its last holder removed it while we waited

    def release(self) -> None:
        """Give it back; of no effect where it is not held."""
        if self.file >= 0:
            file, self.file = self.file, -1
            # not by closing alone: a loader's workers may have inherited the file
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)
            os.close(file)

    def _is_there(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file alone; waits for it."""
    lock = FileLock(path)
    lock.take()
    try:
        yield
    finally:
        lock.release()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
