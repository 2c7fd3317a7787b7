"""One owner of a run folder at a time, on one machine or on many."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from xcit_dino.errors import InputError
from xcit_dino.provenance import now
from xcit_dino.train.distributed import dist
from xcit_dino.train.run.activity import WATCH
from xcit_dino.train.run.folder import LOCK

HEARTBEAT = 10.0  # seconds between two heartbeats of a run's owner
LEASE = (
    150.0  # seconds after which an NFS server has released a dead machine's lock (90 by default)
)
POLL = 1.0  # seconds


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a run folder for this run's processes; rank 0 holds the lock, all ranks raise a refusal.

    A folder in which no run has started by the end (it has no config) is restored.

    Raises:
        InputError: it is in use, or read-only.
    """
    lock = RunLock(folder)
    dist.from_main(lock.take)
    try:
        yield
    finally:
        if dist.is_main():
            lock.release()


class RunLock:
    """Locks a run folder for this process.

    A lock of the operating system if the file system supports it: it ends with the process, however
    that ends. It is a POSIX lock, which works over NFS and which child processes (the loader's
    workers) do not inherit. Not every file system shares locks between machines, and a machine that
    dies may leave its lock on the server for a while. So the owner also records its identity and
    touches the file every few seconds: one on another machine counts as dead once the file has not
    been touched for ``WATCH`` seconds *of watching*, whatever the clocks say. An earlier attempt of
    the same SLURM job is over and need not be watched.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "since": now(),
        }

    def take(self) -> None:
        """Take the folder.

        Raises:
            InputError: it is in use (names the owner's host, process and job), or read-only.
        """
        while not self._take():
            pass  # its owner removed the file while this process waited for it
        self.leaving = threading.Event()
        self.heart = threading.Thread(target=self._beat, name="owner", daemon=True)
        self.heart.start()

    def _take(self) -> bool:
        """Wait for the lock; whether its file is still the folder's."""
        try:
            above = [self.folder, *self.folder.parents]
            self.made = list(takewhile(lambda path: not path.exists(), above))
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise InputError(f"--output_dir {self.folder}: {error.strerror}") from error
        try:
            self._wait()
            if not self._is_current():
                os.close(self.file)
                return False
            self._write(json.dumps(self.me))
        except BaseException as error:
            os.close(self.file)
            if isinstance(error, OSError):
                raise InputError(f"--output_dir {self.folder}: {error.strerror}") from error
            raise
        return True

    def _is_current(self) -> bool:
        """Whether the file that was locked has not been removed."""
        try:
            return os.path.samestat(os.stat(self.folder / LOCK), os.fstat(self.file))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Release the lock."""
        self.leaving.set()
        self.heart.join()
        with contextlib.suppress(OSError):
            self._write("")  # clean exit: nobody has to watch
        if not (self.folder / "config.yaml").exists():  # no run has started: leave no trace
            with contextlib.suppress(OSError):
                (self.folder / LOCK).unlink()
                for folder in self.made:
                    folder.rmdir()
        os.close(self.file)

    def _wait(self) -> None:
        """Return once the folder is ours."""
        began, touched, said = time.monotonic(), self._touched(), False
        while True:
            lock, owner = self._lock(), self._owner()
            here = owner.get("host") == self.me["host"]
            passed = time.monotonic() - began
            if lock != "refused":
                same_job = owner.get("job") and owner["job"] == self.me["job"]
                if not owner or same_job or (lock == "taken" and here) or passed > WATCH:
                    return
            elif not owner or here or passed > LEASE:
                raise self._in_use(owner)
            if self._touched() != touched:
                raise self._in_use(owner)
            if not said:
                said = True
                print(
                    f"{self.folder} ended without a report by process {owner['pid']} on "
                    f"{owner['host']}; watching for a sign of life",
                    flush=True,
                )
            time.sleep(POLL)

    def _lock(self) -> Literal["taken", "refused", "unsupported"]:
        """Try the operating system's lock."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return "refused"
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                return "unsupported"
            raise
        return "taken"

    def _touched(self) -> int:
        # Never through a second descriptor: closing that would release a POSIX lock.
        return os.fstat(self.file).st_mtime_ns

    def _beat(self) -> None:
        while not self.leaving.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(self.file)

    def _owner(self) -> dict[str, Any]:
        try:
            return json.loads(os.pread(self.file, 4096, 0))
        except ValueError:  # nobody, or somebody who is just writing
            return {}

    def _in_use(self, owner: dict[str, Any]) -> InputError:
        who = "another process"
        if owner:
            job = f", job {owner['job']}" if owner["job"] else ""
            who = f"process {owner['pid']} on {owner['host']}{job}, since {owner['since']}"
        return InputError(
            f"--output_dir {self.folder} is in use by {who}; wait for it, stop it, or choose "
            "another folder"
        )

    def _write(self, text: str) -> None:
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, text.encode(), 0)
