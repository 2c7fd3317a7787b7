"""Metrics of images with several labels each: mean average precision over the classes, as
scikit-learn's ``average_precision_score`` defines it."""

from __future__ import annotations

import csv
import io
from dataclasses import astuple, dataclass, fields

import numpy as np

from xcit_dino.eval.scores.metrics import binary_auroc

SHOWN = 6  # labels named in a message


@dataclass(frozen=True)
class LabelRow:
    """One class by itself; shares in percent."""

    label: int
    images: int
    """That have it."""
    ap: float
    auroc: float
    f1: float
    """Where an image is predicted to have it from a score of 0.5 on."""


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Mean over the positives, in [0, 1], of the precision among all images that score at least as
    high; equal scores count together.

    Args:
        scores: float [N].
        positive: bool [N], at least one.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of each group of equal scores
    found = np.cumsum(positive[order])[last]
    seen = np.flatnonzero(last) + 1
    return float((np.diff(found, prepend=0) * found / seen).sum() / found[-1])


def label_rows(scores: np.ndarray, labels: np.ndarray) -> list[LabelRow]:
    """Every class that some images have and some do not.

    Args:
        scores: float [N, C] in [0, 1].
        labels: uint8 [N, C].
    """
    rows = []
    for label in range(labels.shape[1]):
        positive, column = labels[:, label] > 0, scores[:, label]
        count = int(positive.sum())
        if not 0 < count < len(positive):
            continue
        guessed = column >= 0.5
        f1 = 200 * (guessed & positive).sum() / (guessed.sum() + count)
        ap, auroc = average_precision(column, positive), binary_auroc(column, positive)
        rows.append(LabelRow(label, count, 100 * ap, 100 * auroc, float(f1)))
    return rows


def label_means(rows: list[LabelRow]) -> dict[str, float]:
    """``map``, ``auroc`` and ``macro_f1``: means over the classes, in percent."""
    names = {"map": "ap", "auroc": "auroc", "macro_f1": "f1"}
    return {
        name: float(np.mean([getattr(row, field) for row in rows])) for name, field in names.items()
    }


def lines_of_labels(rows: list[LabelRow], classes: list[str]) -> list[str]:
    """The rows as lines of CSV under a header, with class names, for ``results.json``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("class", *(field.name for field in fields(LabelRow))))
    for row in rows:
        values = (round(v, 4) if isinstance(v, float) else v for v in astuple(row))
        writer.writerow((classes[row.label], *values))
    return text.getvalue().splitlines()


def unscored(lines: list[str], names: list[str]) -> str:
    """A line on the labels that no image has, or all, from the lines of :func:`lines_of_labels`;
    empty where there is none."""
    scored = {row[0] for row in csv.reader(lines[1:])}
    idle = [name for name in names if name not in scored]
    if not idle or not lines[0].startswith("class,"):
        return ""
    return (
        f"  {len(idle)} of {len(names)} labels do not count, as no image of val has them, or all: "
        f"{', '.join(idle[:SHOWN])}{', ...' if len(idle) > SHOWN else ''}"
    )
