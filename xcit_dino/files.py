"""Atomic writes of files and folders, locks between processes, checksums."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from xcit_dino.errors import InputError

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def check_writable(folder: Path, remedy: str, named: str = "") -> None:
    """Refuse, before any work, a folder that results cannot be written to; creates nothing.

    named: the option and its value, if not ``--output_dir``.

    Raises:
        InputError: names the folder and the remedy.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise InputError(f"{named or f'--output_dir {folder}'}: cannot be written to; {remedy}")


def check_own_folder(folder: Path, command: str, is_own: Callable[[str], bool]) -> None:
    """Refuse, before any work, to replace a folder that holds anything but what a command writes.

    is_own: whether the command writes a file or folder of that name.

    Raises:
        InputError: names what it holds, or the folder if it cannot be written to.
    """
    check_writable(folder.parent, "choose another folder", f"DST {folder}")
    try:
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; choose another folder") from error
    if other := sorted(name for name in names if not is_own(name)):
        raise InputError(
            f"{folder}: holds {other[0]}, not of {command}; choose a folder of its own"
        )


@contextmanager
def atomic_path(path: Path, temporary: Path | None = None, *, sync: bool = True) -> Iterator[Path]:
    """A temporary path next to ``path``. The file written there is flushed to disk and takes its
    final name when the block ends; it is removed if the block fails.

    Args:
        temporary: a different temporary path than the default, which is unique to this process:
            with a suffix that a writer needs, or one that the next process finds after a kill.
        sync: wait for the disk; otherwise a crash of the machine may leave an empty file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary or path.with_name(_temporary(path.name))
    try:
        yield temporary
        if sync:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes | Iterable[bytes], *, sync: bool = True) -> None:
    """Write a file (text as UTF-8) atomically, see :func:`atomic_path`."""
    content = content.encode() if isinstance(content, str) else content
    with atomic_path(path, sync=sync) as temporary, temporary.open("wb") as file:
        for piece in (content,) if isinstance(content, bytes) else content:
            file.write(piece)


def alive(pid: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


@contextmanager
def unfinished_folder(target: Path) -> Iterator[Path]:
    """A new folder next to ``target``, which replaces it when the block ends and is removed if the
    block fails; leftovers of killed processes of this machine are removed first."""
    for left in target.parent.glob(_temporary(target.name, "*")):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    folder = target.with_name(_temporary(target.name))
    shutil.rmtree(folder, ignore_errors=True)
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.mkdir(parents=True)
    try:
        yield folder
        replace_folder(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # not empty: they contain the target, or something else
            for parent in made:
                parent.rmdir()


def replace_folder(folder: Path, target: Path) -> None:
    """Rename a folder; an existing ``target`` is moved away first and removed afterwards."""
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
    """An exclusive or shared lock between processes; released when the process ends.

    Uses the operating system's ``flock`` (which works over NFS too). On a file system without
    locks it is always granted, so what it protects must still be written atomically.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file = -1

    def take(self, *, shared: bool = False, wait: bool = True) -> bool:
        """Acquire the lock; returns False if ``wait`` is false and another process holds it.

        Raises:
            OSError: the lock file cannot be created.
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
            if self._still_exists(file):
                self.file = file
                return True
            os.close(file)  # its last holder removed it while we waited

    def release(self) -> None:
        """Release the lock; no effect if it is not held."""
        if self.file >= 0:
            file, self.file = self.file, -1
            # not by closing alone: a loader's workers may have inherited the file
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)
            os.close(file)

    def _still_exists(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; waits for it."""
    lock = FileLock(path)
    lock.take()
    try:
        yield
    finally:
        lock.release()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_checksum(path: Path) -> str:
    """The first 16 digits of the SHA-256: identifies weights in results and cache keys."""
    return file_sha256(path)[:16]


def _temporary(name: str, process: int | str | None = None) -> str:
    """A hidden name, unique to this process even on machines that share a folder."""
    return f".{name}.{platform.node()}.{os.getpid() if process is None else process}.tmp"
