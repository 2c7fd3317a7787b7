"""Data go on when a process that prepares them dies."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing

from xcit_dino.data.loader import Batch, CropLoader
from xcit_dino.errors import RunError, warn
from xcit_dino.train.state import TrainState

MAX_DEATHS = 3


def steady(loader: CropLoader, state: TrainState) -> Iterator[list[Batch]]:
    """The loader's steps from ``state.step`` on; where a worker process dies, from new workers.

    Raises:
        RunError: they die again and again.
    """
    for _ in range(MAX_DEATHS):
        loader.start_step = state.step
        with closing(iter(loader)) as steps:
            try:
                for batches in steps:
                    # torch's handler would raise wherever the main thread is, halfway through a
                    # step; without it a death is noticed where the loader is asked for more
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    yield batches
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                warn(f"{error}; starting new workers at step {state.step + 1}")
    raise RunError(
        f"loader workers died {MAX_DEATHS} times, most likely because the machine ran out of "
        "memory: lower --num_workers or --prefetch_factor, and the same command goes on"
    )
