"""Restart dead loader workers, and detect changed shards."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any, Protocol

from xcit_dino.data.shards.index import ShardIndex, is_url
from xcit_dino.errors import RunError, warn
from xcit_dino.train.state import TrainState

MAX_DEATHS = 3


class StepLoader(Protocol):
    """A loader of a training: iterates over the optimizer steps from ``start_step`` on."""

    index: ShardIndex
    start_step: int
    wait_seconds: float

    def __iter__(self) -> Generator[list[Any]]:
        """This rank's micro-batches of each step."""
        ...


def restarting_workers(loader: StepLoader, state: TrainState) -> Iterator[list[Any]]:
    """Yield the loader's steps from ``state.step`` on; if a worker process dies, restart the
    workers.

    Raises:
        RunError: they die repeatedly without a step in between.
    """
    deaths, last = 0, -1
    while deaths < MAX_DEATHS:
        loader.start_step = state.step
        with closing(iter(loader)) as steps:
            try:
                for batches in steps:
                    # torch's handler would raise wherever the main thread is, halfway through a
                    # step; without it a death is noticed at the next request to the loader
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    yield batches
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                deaths, last = (1 if state.step > last else deaths + 1), state.step
                warn(f"{error}; starting new workers at step {state.step + 1}")
    raise RunError(
        f"loader workers died {MAX_DEATHS} times at step {state.step + 1}, most likely because the "
        "machine ran out of memory: with a lower --num_workers or --prefetch_factor the same "
        "command resumes"
    )


def check_shards(index: ShardIndex) -> None:
    """Warn about shards on a local file system that are gone, or changed in size since the index
    was made. Their unreadable samples will be skipped; too many of them end the run."""
    if is_url(index.root):
        return  # remote shards are checked when they are fetched
    for number, expected in enumerate(index.shard_bytes.tolist()):
        try:
            found = f"has {os.stat(index.path(number)).st_size:,} bytes"
        except OSError as error:
            found = f"cannot be opened ({error.strerror})"
        if found != f"has {expected:,} bytes":
            warn(
                f"--data_path: {index.path(number)} {found} and had {expected:,} when it was "
                "indexed (xcit-dino shards check finds the cause)"
            )
