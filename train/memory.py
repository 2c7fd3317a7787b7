"""Explain an out-of-memory error in a step: what memory was used for, and what to lower."""

from __future__ import annotations

import resource
import sys
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
    """Turn a failed allocation inside the block into a message.

    Args:
        sizes: options of this training that reduce the memory per image, as named in the message.
        unit: a process's batch size must remain a multiple of this.

    Raises:
        RunError: names the step, the memory of weights and of a micro-batch, and the options to
        lower.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and not any(sign in text for sign in SIGNS):
            raise
        raise RunError(advice(state, run, sizes, unit)) from error


def advice(state: TrainState, run: RunConfig, sizes: str, unit: int = 1) -> str:
    """The message with memory needed and options to lower; see :func:`explained`."""
    fixed, peak, images = lasting_bytes(state), peak_bytes(), run.batch_size_per_gpu
    each = max(0, peak - fixed) / images
    text = (
        f"out of memory in step {state.step + 1} on rank {dist.rank()}: weights, gradients, "
        f"optimizer and teacher take {gib(fixed)}, {images} images at once more than "
        f"{gib(peak - fixed)} (some {each / 2**20:.0f} MiB an image). "
    )
    if images % (2 * unit) == 0:
        text += (
            f"Take --batch_size_per_gpu {images // 2} --accum_iter {2 * run.accum_iter}: the "
            "same run resumes, with the same global batch. Or lower "
        )
    else:
        text += "Lower "
    return f"{text}{sizes} or the size of the model"


def lasting_bytes(state: TrainState) -> int:
    """Bytes that persist between steps: networks, gradients, optimizer."""
    tensors = [t for module in state.modules.values() for t in module.state_dict().values()]
    moments = [
        value
        for inner in state.optimizer.state.values()
        for value in inner.values()
        if isinstance(value, Tensor)
    ]
    trained = [p for group in state.optimizer.param_groups for p in group["params"]]
    moments = moments or trained * 2  # before the first step: Adam will keep two moments each
    here = [local(tensor) for tensor in (*tensors, *moments, *trained)]
    return sum(t.numel() * t.element_size() for t in here)


def peak_bytes() -> int:
    """Peak memory of this process: on the GPU, or in host memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def gib(count: float) -> str:
    """Format bytes."""
    return f"{count / 2**30:.2f} GiB"
