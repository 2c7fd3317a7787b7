"""How many images per second a pretraining processes on this machine: its own steps, on its own
data, for some seconds."""

from __future__ import annotations

import time
from contextlib import closing

import torch

from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.pretrain import built, planned, train_step
from xcit_dino.ssl.start import with_input_settings
from xcit_dino.train.amp import resolve_precision
from xcit_dino.train.distributed import dist

SECONDS = 16.0
"""Of steps, of which the second half counts: at first the loader's workers are ahead."""
WARM_UP = 2  # steps that do not count at all: memory is taken, blocks are compiled
STEPS = 3  # at least, in each half
PATIENCE = 2  # a half that takes longer than so many times its share has fewer steps


def images_per_second(config: PretrainConfig) -> float:
    """Of this process alone.

    Raises:
        InputError: bad options or data.
        torch.OutOfMemoryError: the GPU's memory is too small for a micro-batch.
    """
    world = dist.init(config.run.device)
    config = with_input_settings(config)
    dtype = resolve_precision(config.run.precision, world.device)
    index, plan, schedule = planned(config, world)
    trainer, loader = built(config, world, dtype, index, plan)
    batches = iter(loader)

    def timed(least: int, seconds: float) -> tuple[int, float]:
        """Steps and the seconds that they took."""
        began, steps, spent = time.perf_counter(), 0, 0.0
        while steps == 0 or (steps < least or spent < seconds) and spent < PATIENCE * seconds:
            train_step(trainer, next(batches), schedule(trainer.state.step))
            steps, spent = steps + 1, time.perf_counter() - began
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        return steps, time.perf_counter() - began

    with closing(batches):
        timed(WARM_UP, SECONDS / 8)
        first, (steps, spent) = timed(STEPS, SECONDS / 2), timed(STEPS, SECONDS / 2)
    if steps < STEPS:  # few: every one counts
        steps, spent = steps + first[0], spent + first[1]
    return steps * plan.batch_size / spent
