"""What a run writes while it goes on: ``metrics.jsonl`` and TensorBoard, one curve over resumes."""

from __future__ import annotations

import json
import time
import warnings
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xcit_dino.errors import RunError
from xcit_dino.progress import progress
from xcit_dino.train import dist
from xcit_dino.train.config import RunConfig
from xcit_dino.train.provenance import write_atomic

GROUPS = {  # TensorBoard groups
    "loss": "loss",
    "lr": "schedule", "weight_decay": "schedule", "momentum_teacher": "schedule",
    "teacher_temp": "schedule", "freeze_last_layer": "schedule",
    "images_per_s": "speed", "data_wait": "speed", "memory_gib": "speed",
}  # fmt: skip


class MetricsLog:
    """Appends a line a call; what a cut-off try wrote after ``start_step`` is dropped."""

    def __init__(self, folder: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= start_step]
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(self.path, "a", buffering=1)
        self.board = SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, values: dict[str, Any]) -> None:
        """Write one line; ``values`` holds ``step`` and numbers."""
        self.file.write(json.dumps(values) + "\n")
        for name, value in values.items():
            if isinstance(value, float):
                group = GROUPS.get(name, "eval" if name.startswith(("knn", "val")) else "health")
                self.board.add_scalar(f"{group}/{name}", value, values["step"])

    def text(self, name: str, content: str) -> None:
        """Put a text (the config, the environment) on TensorBoard."""
        self.board.add_text(name, f"```\n{content}\n```")

    def close(self) -> None:
        self.file.close()
        self.board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl``; a half-written last line is left out."""
    path = folder / "metrics.jsonl"
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            warnings.warn(f"{path}: left out a half-written line", stacklevel=2)
    return lines


class Meter:
    """Means over the steps since the last reading; tensors stay on the device until then."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.since = time.perf_counter()

    def add(self, values: dict[str, Tensor]) -> None:
        """Count one step's scalars."""
        for name, value in values.items():
            known = name in self.sums
            self.sums[name] = self.sums[name] + value if known else value.detach().clone()
        self.steps += 1

    def read(self) -> tuple[dict[str, float], float, int]:
        """(means over steps and ranks, seconds, steps) since the last reading; starts anew."""
        stacked = torch.stack([v.float() for v in self.sums.values()]) / self.steps
        values = dist.all_reduce_mean(stacked).tolist()
        means = dict(zip(self.sums, values, strict=True))
        seconds, steps = time.perf_counter() - self.since, self.steps
        self.__init__()
        return means, seconds, steps


class RunLog(AbstractContextManager):
    """Progress on the terminal, metrics in files; every rank calls it, rank 0 writes.

    Args:
        run: where to write, and how often.
        step: steps done when this try began.
        total_steps: steps of the whole run.
        global_batch: images a step.
        label: of the progress bar.
    """

    def __init__(
        self,
        run: RunConfig,
        step: int,
        total_steps: int,
        global_batch: int,
        label: str = "pretraining",
    ):
        self.run, self.global_batch = run, global_batch
        self.total_steps = total_steps
        self.meter = Meter()
        self.waited = 0.0
        self.files = MetricsLog(run.output_dir, step) if dist.is_main() else None
        self.stack = ExitStack()
        self.bar = self.stack.enter_context(progress(label, total_steps, "steps", step))

    def step(
        self, step: int, metrics: dict[str, Tensor], scheduled: dict[str, float], waited: float
    ) -> None:
        """One optimiser step is done; ``waited`` is the loader's waiting so far, in seconds.

        Raises:
            RunError: every step since the last line was skipped for non-finite gradients.
        """
        self.meter.add(metrics)
        if step % self.run.log_every and step != self.total_steps:
            self.bar.advance()
            return
        means, seconds, steps = self.meter.read()
        line = means | {k: float(v) for k, v in scheduled.items()}
        line["images_per_s"] = steps * self.global_batch / seconds
        line["data_wait"] = (waited - self.waited) / seconds
        self.waited = waited
        if torch.cuda.is_available():
            line["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.write(step, line)
        shown = {"loss": f"{line['loss']:.3f}"}
        if "teacher_entropy" in line:
            shown["entropy"] = f"{line['teacher_entropy']:.2f}"
        self.bar.advance(
            1,
            **shown,
            lr=f"{line['lr']:.1e}",
            img_s=f"{line['images_per_s']:.0f}",
            wait=f"{line['data_wait']:.0%}",
        )
        if means["skipped"] == 1.0:
            raise RunError(
                f"gradients were not finite in all {steps} steps up to step {step}; the weights "
                "are those before them. Try --precision bf16 or fp32, a lower --lr, or a smaller "
                "--clip_grad"
            )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a line to the files."""
        if self.files is not None:
            self.files.write({"step": step, **values})

    def __exit__(self, *_: object) -> None:
        self.stack.close()
        if self.files is not None:
            self.files.close()
