"""Metrics of a classifier from its scores for all images: balanced accuracy, macro F1, AUROC, and
each class by itself; as scikit-learn defines them."""

from __future__ import annotations

import csv
import dataclasses
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xcit_dino.train.distributed import dist

CELLS = 1 << 28  # scores kept for the AUROC, of all ranks: 1 GiB


@dataclass(frozen=True)
class Scored:
    """Scores of N images by a classifier of C classes, on this rank or on all together."""

    labels: np.ndarray
    """int64 [N], true classes."""
    predicted: np.ndarray
    """int64 [N], classes of the highest score; the lowest in a tie."""
    scores: np.ndarray | None
    """float32 [N, C], higher for a more likely class; None: too many to keep."""
    num_classes: int

    def __len__(self) -> int:
        return len(self.labels)


class Scores:
    """Collects scores batch by batch.

    num_images, num_classes: of all ranks together; they decide whether the scores are kept.
    """

    def __init__(self, num_images: int, num_classes: int):
        self.num_classes, self.keeps = num_classes, num_images * num_classes <= CELLS
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """scores: [B, C] probabilities, votes or the like, comparable between images; labels: int64
        [B]."""
        table = scores.detach().cpu().numpy()
        kept = table.astype(np.float32) if self.keeps else None
        self.parts.append((labels.cpu().numpy(), table.argmax(1), kept))

    def gathered(self) -> Scored:
        """Those of all ranks, on every rank; to be called once on all of them."""
        own = self.joined()
        if dist.world_size() == 1:
            return own
        found: list[Any] = [None] * dist.world_size()
        torch.distributed.all_gather_object(found, own)
        scores = [part.scores for part in found]
        return Scored(
            np.concatenate([part.labels for part in found]),
            np.concatenate([part.predicted for part in found]),
            np.concatenate(scores) if self.keeps else None,  # type: ignore[arg-type]
            self.num_classes,
        )

    def joined(self) -> Scored:
        """Those of this rank."""
        none = np.empty(0, np.int64), np.empty(0, np.int64)
        parts = [(*none, np.empty((0, self.num_classes), np.float32)), *self.parts]
        labels, predicted, scores = zip(*parts, strict=True)
        return Scored(
            np.concatenate(labels),
            np.concatenate(predicted),
            np.concatenate(scores) if self.keeps else None,  # type: ignore[arg-type]
            self.num_classes,
        )


@dataclass(frozen=True)
class ClassRow:
    """One class by itself; shares in percent."""

    label: int
    images: int
    recall: float
    precision: float
    """0 where no image was predicted to be of it."""
    f1: float
    auroc: float | None = None
    """Against all others; None where one side has no images, or no scores were kept."""


def class_rows(scored: Scored) -> list[ClassRow]:
    """All classes that an image has or was predicted to have, in the order of their numbers."""
    size = scored.num_classes
    right = np.bincount(scored.labels[scored.labels == scored.predicted], minlength=size)
    images = np.bincount(scored.labels, minlength=size)
    guesses = np.bincount(scored.predicted, minlength=size)
    rows = []
    for label in np.flatnonzero(images + guesses).tolist():
        auroc = None
        if scored.scores is not None and 0 < images[label] < len(scored):
            auroc = 100 * binary_auroc(scored.scores[:, label], scored.labels == label)
        rows.append(ClassRow(
            label, int(images[label]),
            100 * right[label] / max(images[label], 1),
            100 * right[label] / max(guesses[label], 1),
            200 * right[label] / (images[label] + guesses[label]), auroc,
        ))  # fmt: skip
    return rows


def class_means(rows: list[ClassRow]) -> dict[str, float]:
    """``balanced_accuracy`` (mean recall of the classes with images), ``macro_f1``, and ``auroc``
    (mean of one class against the rest) where there is one, in percent."""
    found = {
        "balanced_accuracy": [row.recall for row in rows if row.images],
        "macro_f1": [row.f1 for row in rows],
        "auroc": [row.auroc for row in rows if row.auroc is not None],
    }
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def binary_auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve in [0, 1]: how often a positive has the higher score, ties counting
    half (Mann and Whitney).

    Args:
        scores: float [N].
        positive: bool [N], with at least one of each kind.
    """
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # from 1; ties share their mean
    ones = int(positive.sum())
    return float((ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * (len(scores) - ones)))


def lines_of(rows: list[ClassRow], classes: list[str] | None) -> list[str]:
    """The rows as lines of CSV under a header, with class names, for ``results.json``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("class", *(field.name for field in dataclasses.fields(ClassRow))))
    for row in rows:
        name = classes[row.label] if classes and row.label < len(classes) else str(row.label)
        values = dataclasses.astuple(row)
        writer.writerow((name, *(round(v, 4) if isinstance(v, float) else v for v in values)))
    return text.getvalue().splitlines()
