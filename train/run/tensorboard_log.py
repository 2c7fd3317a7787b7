"""TensorBoard: scalars in groups, the most important first, pictures, texts, hyper-parameters."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from xcit_dino.errors import warn

HPARAMS = "hparams"  # folder in the run's
GROUPS = {  # tag prefix of a scalar; others are "eval" (knn*, val*) or "health"
    "loss": "loss",
    "lr": "schedule", "weight_decay": "schedule", "momentum_teacher": "schedule",
    "teacher_temp": "schedule", "freeze_last_layer": "schedule", "freeze_backbone": "schedule",
    "epoch": "schedule",
    "images_per_s": "speed", "data_wait": "speed", "memory_gib": "speed",
}  # fmt: skip


def _charts(**charts: str) -> dict[str, list[Any]]:
    """Title -> the tags drawn in one chart."""
    return {title.replace("_", " "): ["Multiline", tags.split()] for title, tags in charts.items()}


LAYOUT = {  # the page "Custom scalars", in this order
    "First look": _charts(
        loss="loss/loss$",
        nearest_neighbors_of_the_teacher="eval/knn_top1$ eval/knn_other_top1$",
        teacher_entropy_and_KL="health/teacher_entropy$ health/kl$",
    ),
    "Health": _charts(
        gradient_norm="health/grad_norm$",
        share_of_steps_skipped="health/skipped$",
        answers_0_is_collapse="health/information$ health/mean_entropy$",
        spread_of_features="health/feature_std$",
        directions_that_features_use="health/effective_rank$",
        share_of_prototypes_used="health/prototypes_used$",
    ),
    "Finetuning": _charts(validation_accuracy="eval/val_top1$ eval/val_ema_top1$"),
    "Schedule": _charts(
        learning_rate="schedule/lr$",
        weight_decay="schedule/weight_decay$",
        teacher_momentum="schedule/momentum_teacher$",
        teacher_temperature="schedule/teacher_temp$",
    ),
    "Speed": _charts(
        images_a_second="speed/images_per_s$",
        share_of_time_waiting_for_data="speed/data_wait$",
        memory_in_GiB="speed/memory_gib$",
    ),
}


class Board:
    """The event file of one attempt; values of earlier attempts after ``step`` are hidden."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import; rank 0 alone writes

        self.writer = SummaryWriter(str(folder), purge_step=step + 1)
        self.writer.add_custom_scalars(LAYOUT)
        self.failed = False

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Write numbers as scalars, uint8 [H, W, 3] as pictures, other arrays as histograms.

        A file system that refuses to write ends the curves of this attempt, but not the training.
        """
        if self.failed:
            return
        try:
            self._add(step, values)
        except OSError as error:
            self.failed = True
            warn(f"TensorBoard: {error}; its curves continue at the next start")

    def _add(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, float):
                self.writer.add_scalar(f"{group(name)}/{name}", value, step)
            elif isinstance(value, np.ndarray) and value.dtype == np.uint8:
                self.writer.add_image(name, value, step, dataformats="HWC")
            elif isinstance(value, np.ndarray):
                self.writer.add_histogram(name, value, step)

    def text(self, name: str, content: str, step: int) -> None:
        """A preformatted text (the options, the environment)."""
        self.writer.add_text(name, "\n".join(f"    {line}" for line in content.split("\n")), step)

    def close(self) -> None:
        with suppress(OSError):
            self.writer.close()


def group(name: str) -> str:
    """The group of a scalar."""
    return GROUPS.get(name, "eval" if name.startswith(("knn", "val")) else "health")


def write_hparams(folder: Path, options: dict[str, Any], accuracies: dict[str, float]) -> None:
    """Options and final accuracies, for the page "HParams"; replaces those written before.

    They are in a subfolder of the run's: of several files in one folder, TensorBoard reads the
    newest only, and the training may still write its own.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    for old in (folder / HPARAMS).glob("events.*"):
        old.unlink()
    plain = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in options.items()
    }
    metrics = {f"final/{name}": value for name, value in accuracies.items()}
    with SummaryWriter(str(folder / HPARAMS)) as writer:
        file = writer._get_file_writer()
        for summary in hparams(plain, metrics):
            file.add_summary(summary)
        for tag, value in metrics.items():
            writer.add_scalar(tag, value)
