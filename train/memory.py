"""Running out of memory in a step, in words: what it was used for, and what to lower."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from xcit_dino.errors import RunError
from xcit_dino.train.config import RunConfig
from xcit_dino.train.distributed import dist
from xcit_dino.train.distributed.fsdp import local
from xcit_dino.train.state import TrainState

SIGNS = ("out of memory", "can't allocate memory", "not enough memory")  # CUDA, CPU, Windows


@contextmanager
def explained(state: TrainState, run: RunConfig, sizes: str, unit: int = 1) -> Iterator[None]:
    """Turn an allocation that fails inside into a message.

    Args:
        sizes: the options of this training that make an image cheaper, as the message names them.
        unit: a process's batch has to remain a multiple of it.

    Raises:
        RunError: it names the step, what weights and a micro-batch take, and the options to turn.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        words = str(error)
        if not isinstance(error, MemoryError) and not any(sign in words for sign in SIGNS):
            raise
        raise RunError(advice(state, run, sizes, unit)) from error


def advice(state: TrainState, run: RunConfig, sizes: str, unit: int = 1) -> str:
    """What was needed and what to lower, in one line; see :func:`explained`."""
    fixed, peak, images = lasting_bytes(state), peak_bytes(), run.batch_size_per_gpu
    each = max(0, peak - fixed) / images
    text = (
        f"out of memory in step {state.step + 1} on rank {dist.rank()}: weights, gradients, "
        f"optimiser and teacher take {gib(fixed)}, {images} images at once more than "
        f"{gib(peak - fixed)} (some {each / 2**20:.0f} MiB an image). "
    )
    if images % (2 * unit) == 0:
        text += (
            f"Take --batch_size_per_gpu {images // 2} --accum_iter {2 * run.accum_iter}: the "
            "same run goes on, with the same global batch. Or lower "
        )
    else:
        text += "Lower "
    return f"{text}{sizes} or the size of the model"


def lasting_bytes(state: TrainState) -> int:
    """Bytes that stay from step to step: networks, gradients, optimiser."""
    tensors = [t for module in state.modules.values() for t in module.state_dict().values()]
    moments = [
        value
        for inner in state.optimizer.state.values()
        for value in inner.values()
        if isinstance(value, Tensor)
    ]
    trained = [p for group in state.optimizer.param_groups for p in group["params"]]
    moments = moments or trained * 2  # before the first step: Adam will keep two of each
    here = [local(tensor) for tensor in (*tensors, *moments, *trained)]
    return sum(t.numel() * t.element_size() for t in here)


def peak_bytes() -> int:
    """The most that this process has held: on the GPU, or in host memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gib(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.2f} GiB"
