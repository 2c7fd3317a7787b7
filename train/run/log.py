"""The log of a training: progress on the terminal, ``metrics.jsonl``, TensorBoard, trackers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from xcit_dino.errors import RunError
from xcit_dino.options import read_yaml
from xcit_dino.progress import progress
from xcit_dino.provenance import provenance
from xcit_dino.train.config import RunConfig
from xcit_dino.train.distributed import dist
from xcit_dino.train.memory import peak_bytes
from xcit_dino.train.run.metrics import RunFiles, process_seconds, read_metrics
from xcit_dino.train.run.tensorboard_log import Board
from xcit_dino.train.run.trackers import Mirror, mirrors

SHOWN = {  # below the bar: name of a metric -> (label, format)
    "epoch": ("epoch", ".2f"), "loss": ("loss", ".3f"), "teacher_entropy": ("entropy", ".2f"),
    "lr": ("lr", ".1e"), "images_per_s": ("img/s", ".0f"), "data_wait": ("wait", ".0%"),
    "memory_gib": ("GiB", ".1f"), "knn_top1": ("knn", ".1f"), "val_top1": ("val", ".1f"),
}  # fmt: skip

EVALUATED = ("knn", "val", "neighbors_kept", "feature_cka")
"""What the names of an evaluation's metrics begin with."""


class Meter:
    """Means over the steps since the last reading; tensors stay on the device until then.

    saved: :meth:`state` of an earlier attempt, to continue from.
    """

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        saved = saved or {}
        self.sums = restored(saved.get("sums", {}))
        self.steps = saved.get("steps", 0)
        self.timed = 0  # of them, those of this attempt
        self.since = time.perf_counter()

    def add(self, values: dict[str, Tensor]) -> None:
        """Add one step's scalars."""
        for name, value in values.items():
            known, value = name in self.sums, value.detach().float()
            self.sums[name] = self.sums[name] + value if known else value.clone()
        self.steps += 1
        self.timed += 1

    def read(self) -> tuple[dict[str, float], int, int, float]:
        """(means over steps and ranks, steps, those of this attempt, their seconds) since the last
        reading; resets the sums."""
        stacked = torch.stack(list(self.sums.values())) / self.steps
        values = dist.all_reduce_mean(stacked).tolist()
        means = dict(zip(self.sums, values, strict=True))
        steps, timed, seconds = self.steps, self.timed, time.perf_counter() - self.since
        self.__init__()
        return means, steps, timed, seconds

    def state(self) -> dict[str, Any]:
        """Steps, and each rank's sums of every scalar, as plain numbers: a tensor of a checkpoint
        must be finite, and a skipped step's loss need not be. All ranks call it."""
        if not self.steps:
            return {}
        sums = torch.stack(list(self.sums.values())).cpu().double()
        columns = dist.on_all_ranks(sums).T.tolist()
        return {"steps": self.steps, "sums": dict(zip(self.sums, columns, strict=True))}


def restored(sums: dict[str, list[float]]) -> dict[str, Tensor]:
    """This rank's sums, or the mean over ranks if the number of ranks was different."""
    mine = dist.rank()
    return {
        name: torch.tensor(
            ranks[mine] if len(ranks) == dist.world_size() else sum(ranks) / len(ranks)
        )
        for name, ranks in sums.items()
    }


class RunLog(AbstractContextManager):
    """Progress on the terminal, metrics in files; every rank calls it, rank 0 writes.

    Args:
        run: where to write, and how often.
        step: steps done when this attempt started.
        total_steps: steps of the whole run.
        global_batch: images per step.
        label: of the progress bar.
        saved: :meth:`state` at the time that step was saved.
        waited: seconds of data waiting in earlier attempts.
    """

    def __init__(
        self,
        run: RunConfig,
        step: int,
        total_steps: int,
        global_batch: int,
        label: str = "pretraining",
        saved: dict[str, Any] | None = None,
        waited: float = 0.0,
    ):
        self.run, self.global_batch, self.label = run, global_batch, label
        self.first, self.done, self.total_steps = step, step, total_steps
        self.meter = Meter(saved)
        self.waited, self.skipped = waited, (saved or {}).get("skipped", 0)
        self.line: dict[str, float] = {}
        self.files: RunFiles | None = None
        if dist.is_main() and step < total_steps:
            self.open_files()
        self.accuracy = last_accuracy(run) if dist.is_main() else {}
        self.stack = ExitStack()
        self.bar = self.stack.enter_context(progress(label, total_steps, "steps", step))
        if 0 < step < total_steps:
            self.bar.note(f"{label} resumes from step {step} of {total_steps}")

    def open_files(self) -> None:
        """Start this attempt's part of the files."""
        facts = {
            "total_steps": self.total_steps,
            "processes": dist.world_size(),
            "global_batch": self.global_batch,
        }
        folder = self.run.output_dir
        self.files = RunFiles(folder, self.first, facts)
        config = folder / "config.yaml"
        text = config.read_text() if config.is_file() else ""
        self.boards: list[Board | Mirror] = []
        if "tensorboard" in self.run.logger:
            board = Board(folder, self.first)
            if text:
                board.text("config", text, self.first)
            board.text("environment", json.dumps(provenance() | facts, indent=1), self.first)
            self.boards.append(board)
        self.boards += mirrors(folder, self.run.logger, read_yaml(config) if text else {})

    def step(
        self, step: int, metrics: dict[str, Tensor], scheduled: dict[str, float], waited: float
    ) -> dict[str, float]:
        """Record one optimizer step; ``waited`` is the total data waiting time so far, in seconds.

        Returns:
            The line written, the same on all ranks; empty if none was due.

        Raises:
            RunError: more than ``max_skipped`` consecutive steps had non-finite gradients.
        """
        self.meter.add(metrics)
        self.done = step
        if step == self.first + 1:
            self.bar.note(f"first step {process_seconds():.1f} s after the start of the process")
        if step % self.run.log_every and step != self.total_steps:
            self.bar.advance()
            return {}
        means, steps, timed, seconds = self.meter.read()
        line = {"epoch": step * self.run.epochs / self.total_steps}
        line |= means | {name: float(value) for name, value in scheduled.items()}
        line["images_per_s"] = timed * self.global_batch / seconds
        line["data_wait"] = (waited - self.waited) / seconds
        line["memory_gib"] = peak_memory()
        self.waited, self.line = waited, line
        self.write(step, line)
        self.bar.advance(1, **shown(line | self.accuracy))
        self.skipped = self.skipped + steps if means["skipped"] == 1.0 else 0
        if self.skipped > self.run.max_skipped:
            raise RunError(
                f"non-finite gradients in all {self.skipped} steps up to step {step}; the "
                "weights are from before them. Try --precision bf16 or fp32, a lower --lr, or a "
                "smaller --clip_grad"
            )
        return line

    def state(self) -> dict[str, Any]:
        """State with which the next attempt writes the same lines; to be called on all ranks."""
        return self.meter.state() | {"skipped": self.skipped}

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Exclude the time inside the block from the steps' speed."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.meter.since += time.perf_counter() - began

    def evaluated(self, step: int) -> dict[str, float]:
        """What evaluations of this step found, in this try or an earlier one; as rank 0 sees it."""
        lines = dist.from_main(lambda: read_metrics(self.run.output_dir))
        return {
            name: value
            for line in lines
            if line.get("step") == step
            for name, value in accuracies_in(line).items()
        }

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Add metrics to the files; pictures (uint8 [H, W, 3]) and arrays only to TensorBoard."""
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        if numbers and dist.is_main():
            if self.files is None:  # a finished training, whose evaluation is still to come
                self.open_files()
            assert self.files is not None
            self.files.write(step, numbers)
            for board in self.boards:
                board.add(step, values)
        if accuracies := accuracies_in(numbers):
            self.accuracy = accuracies
            found = "  ".join(f"{name} {value:.2f}" for name, value in accuracies.items())
            self.bar.note(f"step {step}: {found}")
            self.bar.advance(0, **shown(self.line | accuracies))

    def __exit__(self, kind: type[BaseException] | None, error: Any, _: object) -> None:
        self.stack.close()
        if kind is None and 0 < self.run.max_steps <= self.done < self.total_steps:
            self.bar.note(
                f"{self.label} stopped after step {self.done} of {self.total_steps} (--max_steps "
                f"{self.run.max_steps}); with a higher one, or 0, the same command resumes"
            )
        if self.files is not None:
            reason = "stopped" if self.done < self.total_steps else "done"
            self.files.close(self.done, f"{kind.__name__}: {error}"[:300] if kind else reason)
            for board in self.boards:
                board.close()


def last_accuracy(run: RunConfig) -> dict[str, float]:
    """Results of the newest evaluation of earlier attempts."""
    for line in reversed(read_metrics(run.output_dir)):
        if found := accuracies_in(line):
            return found
    return {}


def accuracies_in(line: dict[str, Any]) -> dict[str, float]:
    """The metrics of a line that come from an evaluation."""
    return {name: value for name, value in line.items() if name.startswith(EVALUATED)}


def shown(line: dict[str, float]) -> dict[str, str]:
    """The values displayed with the bar."""
    return {word: format(line[name], form) for name, (word, form) in SHOWN.items() if name in line}


def peak_memory() -> float:
    """Peak memory in GiB: of tensors on the GPU, or of this process on the host."""
    return peak_bytes() / 2**30
