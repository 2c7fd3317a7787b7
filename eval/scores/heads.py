"""Metrics of a linear head on extracted features: of one label an image, several, or values."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from xcit_dino.errors import InputError
from xcit_dino.eval.features import LAYERS, Features
from xcit_dino.eval.linear_grid import CHUNK, Table
from xcit_dino.eval.scores.label_map import LabelMap
from xcit_dino.eval.scores.metrics import ClassRow, Scores, class_means, class_rows
from xcit_dino.eval.scores.several import label_means, label_rows, lines_of_labels
from xcit_dino.eval.scores.values import lines_of_values, value_means, value_rows


def accuracy(
    features: Features,
    layers: str,
    weight: Tensor,
    bias: Tensor,
    label_map: LabelMap | None = None,
) -> tuple[dict[str, float], list[ClassRow]]:
    """(``top1``, ``top5`` and metrics over classes in percent, each class) of one head on extracted
    features."""
    right = torch.zeros(2, dtype=torch.float64)
    scores = Scores(len(features), len(label_map.groups if label_map else weight))
    for logits, labels in applied(features, layers, weight, bias):
        logits = label_map(logits) if label_map else logits
        right += topk_hits(logits, labels)
        scores.add(logits.softmax(1), labels)
    top1, top5 = (100 * right / len(features)).tolist()
    rows = class_rows(scores.joined())  # every rank has all images
    return {"top1": top1, "top5": top5} | class_means(rows), rows


def of_targets(
    features: Features, layers: str, weight: Tensor, bias: Tensor, names: list[str]
) -> tuple[dict[str, float], list[str]]:
    """See :func:`target_scores`: of a head for images with several labels or values."""
    outputs = torch.cat([part.cpu() for part, _ in applied(features, layers, weight, bias)])
    return target_scores(outputs.numpy(), features.labels, names, logits=True)


def target_scores(
    outputs: np.ndarray, targets: np.ndarray, names: list[str], logits: bool
) -> tuple[dict[str, float], list[str]]:
    """Of several labels (``map``, ``auroc`` and ``macro_f1`` in percent, lines of each class); of
    values (``r2`` in percent, and errors in their own units; lines of each value).

    Args:
        outputs: float [N, C].
        targets: uint8 [N, C] of labels, float64 of values.
        names: of the C labels or values.
        logits: labels are scored by the sigmoid of the outputs; else outputs are scores in [0, 1].

    Raises:
        InputError: no label divides the images.
    """
    if targets.dtype != np.uint8:
        rows = value_rows(outputs, targets)
        return value_means(rows, names), lines_of_values(rows, names)
    scores = torch.from_numpy(outputs).sigmoid().numpy() if logits else outputs
    labels = label_rows(scores, targets)
    if not labels:
        raise InputError("--data_path: no label of val is one that some images have and some lack")
    return label_means(labels), lines_of_labels(labels, names)


def applied(
    features: Features, layers: str, weight: Tensor, bias: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits (B, C) and labels of all images in order, some at a time."""
    table = Table(features, LAYERS[layers], weight.device)
    for part in torch.arange(len(features)).split(CHUNK):
        blocks, labels = table.rows(part)
        yield torch.cat([blocks[name] for name in LAYERS[layers]], 1) @ weight.t() + bias, labels


def topk_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """float64 (2,): number of labels ranked first, and among the first five (fewer classes: all of
    them)."""
    found = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack((found[:, 0].sum(), found.sum())).cpu().double()
