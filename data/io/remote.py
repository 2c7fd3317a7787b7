"""Shards on servers, with retries.

Requests that fail, stall or come back short are repeated with growing pauses; a copy goes on where
it stopped; and a shard that failed every attempt is given up for a while, so that a lost shard
costs one round of attempts and not one for each of its samples.
"""

from __future__ import annotations

import os
import random
import select
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, TypeVar

from xcit_dino.errors import InputError, one_line

T = TypeVar("T")
CHUNK = 1 << 23  # bytes a request when a whole shard is copied
ATTEMPTS = 5
PAUSE = 0.5  # seconds after the first failed attempt; doubled after each further one
TIMEOUT = 60.0  # seconds in which a server must respond to a request
HOLD_OFF = 60.0  # seconds for which a shard that failed every attempt is not retried


class Unreadable(Exception):
    """The bytes cannot be read; the message is the reason."""


class Remote:
    """Files below a URL, through fsspec.

    Raises:
        InputError: fsspec does not support such URLs, or lacks a package for them.
    """

    def __init__(self, base: str) -> None:
        import fsspec

        self.base = base.rstrip("/")
        try:
            fsspec.get_filesystem_class(fsspec.core.split_protocol(base)[0])
        except (ImportError, ValueError) as error:
            extra = {"s3": "; pip install 'xcit-dino[s3]'", "gs": "; pip install 'xcit-dino[gs]'"}
            raise InputError(f"{base}: {error}{extra.get(base.partition(':')[0], '')}") from None

    @cached_property
    def _opened(self) -> tuple[Any, str]:  # connections do not survive a fork
        import fsspec

        return fsspec.core.url_to_fs(self.base)

    def exists(self, name: str) -> bool:
        """Tested by reading a byte; a request that fails is repeated.

        Raises:
            Unreadable: every attempt failed.
        """

        def request() -> bool:
            try:
                self._cat(name, start=0, end=1)
            except (FileNotFoundError, PermissionError):  # S3 hides names that may not be listed
                return False
            except Exception as error:
                if getattr(error, "status", None) == 403:  # the same, by way of https
                    return False
                raise
            return True

        return persistently(request)

    def whole(self, name: str) -> bytes:
        """A small file.

        Raises:
            Unreadable: every attempt failed, or it is not there.
        """
        return persistently(lambda: self._cat(name))

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Bytes of a shard; any failure is an exception."""
        data = self._get(name, offset, size)
        if len(data) > size:
            raise Unreadable("the server ignores byte ranges; copy whole shards with --cache_dir")
        return data

    def chunks(self, name: str, size: int, begin: int) -> Iterator[bytes]:
        """The whole shard of ``size`` bytes from ``begin`` on, one request a chunk."""
        for first in range(begin, size, CHUNK):
            data = self._get(name, first, min(CHUNK, size - first))
            if len(data) > CHUNK:  # the server ignores byte ranges and sent all of it
                yield data[first:]
                return
            yield data

    def _get(self, name: str, offset: int, size: int) -> bytes:
        data = self._cat(name, start=offset, end=offset + size)
        if len(data) < size:
            raise OSError(f"{len(data)} of {size} bytes at {offset}")
        return data

    def _cat(self, name: str, **part: int) -> bytes:
        filesystem, root = self._opened
        deadline = {"timeout": TIMEOUT} if filesystem.async_impl else {}
        return filesystem.cat_file(f"{root}/{name}", **part, **deadline)


def pipe_chunks(command: str, name: str, size: int, begin: int) -> Iterator[bytes]:
    """The output of a command (words split as a shell would, no shell) from byte ``begin`` on."""
    words = [word.replace("{shard}", name) for word in shlex.split(command)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        output = select.poll()  # select() takes no file beyond the 1,024th
        output.register(process.stdout, select.POLLIN)
        try:
            while True:
                if not output.poll(TIMEOUT * 1000):
                    raise OSError(f"{words[0]} wrote nothing for {TIMEOUT:.0f} s")
                chunk = os.read(process.stdout.fileno(), 1 << 20)
                if not chunk:
                    break
                if len(chunk) > begin:
                    yield chunk[begin:]
                begin = max(0, begin - len(chunk))
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise OSError(f"{words[0]} ended with code {process.returncode}")


def persistent_chunks(
    chunks: Callable[[str, int, int], Iterator[bytes]], name: str, size: int
) -> Iterator[bytes]:
    """A shard's bytes; after a failure it resumes where it stopped.

    Raises:
        Unreadable: ATTEMPTS failures without a byte between them.
    """
    done = failures = 0
    while True:
        try:
            for chunk in chunks(name, size, done):
                yield chunk
                done, failures = done + len(chunk), 0
            return
        except (Unreadable, FileNotFoundError) as error:
            raise _unreadable(error) from None
        except Exception as error:
            failures = _pause_after(failures, error)


def persistently(request: Callable[[], T]) -> T:
    """The request's result, tried up to ATTEMPTS times.

    Raises:
        Unreadable: each attempt failed, or a retry cannot help.
    """
    failures = 0
    while True:
        try:
            return request()
        except (Unreadable, FileNotFoundError) as error:
            raise _unreadable(error) from None
        except Exception as error:  # network libraries have dozens
            failures = _pause_after(failures, error)


def _pause_after(failures: int, error: Exception) -> int:
    """Wait before the next attempt: random, so that workers do not retry at once."""
    if failures + 1 == ATTEMPTS:
        raise Unreadable(f"{ATTEMPTS} attempts failed, the last: {_text(error)}") from None
    time.sleep(PAUSE * 2**failures * random.SystemRandom().uniform(0.5, 1))
    return failures + 1


class GivenUp:
    """Shards that failed every attempt; their samples fail at once for a while."""

    def __init__(self) -> None:
        self._until: dict[int, tuple[float, Unreadable]] = {}

    def unless(self, shard: int, request: Callable[[], T]) -> T:
        until, failure = self._until.get(shard, (0.0, None))
        if failure is not None and time.monotonic() < until:
            raise failure
        try:
            return request()
        except Unreadable as failure:
            self._until[shard] = time.monotonic() + HOLD_OFF, failure
            raise


def _unreadable(error: Exception) -> Unreadable:
    return error if isinstance(error, Unreadable) else Unreadable(f"no such file: {_text(error)}")


def _text(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")
