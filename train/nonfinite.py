"""Non-finite gradients: steps are counted, traced to a tensor, recorded, and rolled back.

The step itself skips them on the device, on all ranks together (``optim.step_unless_nonfinite``).
Here the host learns of it: at once on a CPU, a step later on a GPU, to avoid waiting. Every rank
sees the same flags and therefore decides the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.io.storage import open_source, read_key
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import RunError, warn
from xcit_dino.train.async_copy import first_nonfinite
from xcit_dino.train.distributed import dist
from xcit_dino.train.distributed.fsdp import local
from xcit_dino.train.run.rollback import RollBack

ADVICE = "try --precision bf16 or fp32, a lower --lr, or a smaller --clip_grad"
GRADIENT = "the gradient of "  # begins what is said of one


class Batch(Protocol):
    """A micro-batch of any method."""

    @property
    def sources(self) -> NDArray[np.int64]:
        """The samples that were read."""
        ...


class Flag(NamedTuple):
    """Flag of a skipped step, being copied to the host."""

    step: int
    skipped: Tensor
    arrived: torch.cuda.Event | None
    batches: Sequence[Batch]


@dataclass
class Skips:
    """Handles skipped steps.

    Args:
        limit: maximum number of consecutive skipped steps.
        roll_back: beyond the limit raise :class:`RollBack`, else RunError.
        modules: networks and center; a skipped step must have left them finite.
        trace: returns the first non-finite tensor of a step on this rank, "" if there is none.
        keys: of a batch's samples.
        folder: of the run, for ``nonfinite.jsonl`` (``nonfinite.rankN.jsonl`` of other ranks).
    """

    limit: int
    roll_back: bool
    modules: dict[str, nn.Module]
    trace: Callable[[int, Sequence[Batch]], str]
    keys: Callable[[Batch], list[str]]
    folder: Path
    scaled: bool = False
    """Losses are scaled for fp16: by more and more, until gradients overflow. Such a step is to be
    expected, and skipped without a warning; what is not finite before the gradients is none."""
    in_a_row: int = 0
    late: Flag | None = None

    def add(self, step: int, skipped: Tensor, batches: Sequence[Batch]) -> None:
        """Step ``step`` is done; ``skipped`` is 1.0 or 0.0, perhaps still to be computed.

        Raises:
            RollBack, RunError: too many in a row, or a corrupted state.
        """
        if not skipped.is_cuda:
            return self._judge(Flag(step, skipped, None, batches))
        pinned = torch.empty((), pin_memory=True)
        pinned.copy_(skipped, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        before, self.late = self.late, Flag(step, pinned, event, batches)
        if before is not None:
            self._judge(before)

    def _judge(self, flag: Flag) -> None:
        if flag.arrived is not None:
            flag.arrived.synchronize()
        if not flag.skipped:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        place = self.trace(flag.step, flag.batches) if self.in_a_row == 1 else ""
        self._write_down(flag, place)
        spoilt = first_nonfinite({name: m.state_dict() for name, m in self.modules.items()})
        if not spoilt and self.in_a_row < self.limit:
            return
        reason = f"{self.in_a_row} steps in a row" + (f", {spoilt} is non-finite" if spoilt else "")
        reason = f"non-finite gradients up to step {flag.step} ({reason})"
        if self.roll_back:
            raise RollBack(reason, ADVICE)
        raise RunError(f"{reason}; the last checkpoint predates them: {ADVICE}, and resume from it")

    def _write_down(self, flag: Flag, place: str) -> None:
        rank = dist.rank()
        expected = self.scaled and (not place or place.startswith(GRADIENT))
        if not expected and (place or (self.in_a_row == 1 and rank == 0)):
            what = place or "nothing on this rank when repeated"
            warn(f"step {flag.step} skipped: non-finite on rank {rank}: {what}")
        line = {"step": flag.step, "rank": rank, "first": place, "in_a_row": self.in_a_row}
        line["samples"] = [int(s) for batch in flag.batches for s in batch.sources]
        line["keys"] = [key for batch in flag.batches for key in self.keys(batch)]
        name = f"nonfinite.rank{rank}.jsonl" if rank else "nonfinite.jsonl"
        with suppress(OSError), open(self.folder / name, "a") as file:
            file.write(json.dumps(line) + "\n")


def keys_of(index: ShardIndex, config: LoaderConfig, batch: Batch) -> list[str]:
    """``shard:key`` of the samples of a batch."""
    source = open_source(index, config)
    places = [index.locate(int(sample)) for sample in batch.sources]
    return [f"{index.shards[s]}:{read_key(source, s, offset)}" for s, offset, _ in places]


# -- tracing the tensor


def first_tensor(
    modules: dict[str, nn.Module],
    passes: Callable[[int, Sequence[Batch]], Tensor],
    step: int,
    batches: Sequence[Batch],
) -> str:
    """Repeat a step's passes and return the first non-finite tensor on this rank ("" if
    there is none); afterwards everything is as before. Called on all ranks together.

    Args:
        modules: networks and loss.
        passes: forward and backward over the micro-batches of a step; returns the loss.
    """
    with undone(modules.values()), watching(modules) as places:
        if not passes(step, batches).isfinite():
            places.append("loss")
        places += gradients(modules)
    return next(iter(places), "")


@contextmanager
def undone(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore buffers (batch-norm statistics, center) afterwards, and clear gradients."""
    modules = list(modules)
    before = [(b, b.detach().clone()) for m in modules for b in m.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.detach().copy_(value)
        for module in modules:
            module.zero_grad(set_to_none=True)


@contextmanager
def watching(modules: dict[str, nn.Module]) -> Iterator[list[str]]:
    """Names of the modules with non-finite output, in the order of computation.

    It never raises inside: with synchronized batch-norm, the other ranks wait for this one.
    """
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append(f"the output of {name}")

    with ExitStack() as stack:
        for top, module in modules.items():
            for name, inner in module.named_modules(prefix=top):
                handle = inner.register_forward_hook(partial(look, name))
                stack.callback(handle.remove)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield found


def gradients(modules: dict[str, nn.Module]) -> list[str]:
    """Parameters with non-finite gradients, closest to the loss first."""
    named = [pair for top, module in modules.items() for pair in module.named_parameters(top)]
    return [
        f"{GRADIENT}{name}"
        for name, parameter in reversed(named)
        if parameter.grad is not None and not local(parameter.grad).isfinite().all()
    ]
