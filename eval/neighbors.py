"""What a run's features say of single images: nearest neighbours, confusions, a map of the space.

Everything is computed from the features that ``knn`` has left in ``RUN/features``, on a fixed part
of the validation images.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError
from xcit_dino.eval.context import Context
from xcit_dino.eval.feature_cache import kept, newest_first
from xcit_dino.eval.knn import Search, predict, unit_rows

K, TEMPERATURE = 20, 0.07
MOST_QUERIES = 2000  # validation images that are classified, spread evenly


@dataclass(frozen=True)
class Neighbors:
    """Classified validation images; Q queries, k neighbours."""

    queries: np.ndarray
    """int64 [Q], sample numbers of the validation split."""
    features: np.ndarray
    """float32 [Q, D], of length 1."""
    labels: np.ndarray
    """int64 [Q], true classes."""
    predicted: np.ndarray
    """int64 [Q], classes with the most votes."""
    similarities: np.ndarray
    """float32 [Q, k], cosines, descending."""
    neighbors: np.ndarray
    """int64 [Q, k], sample numbers of the training split."""
    neighbor_labels: np.ndarray
    """int64 [Q, k]."""

    @property
    def right(self) -> np.ndarray:
        """bool [Q]."""
        return self.predicted == self.labels


@contextmanager
def load_cached(
    context: Context, split: str, index: ShardIndex, like: dict[str, Any] | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, Any]]]:
    """Class tokens [N, D] of all images of a split, the numbers [M] of the readable ones, and the
    facts of the cache: the newest with the input settings of the context in its folder. No command
    removes them meanwhile.

    like: further facts that have to be the same (``weights``, ``network`` ...).

    Raises:
        InputError: ``knn`` has left none, or only ones with other facts; it names one difference.
    """
    wanted = context.protocol | (like or {}) | {"index": index.checksum}
    found = ""
    for folder in newest_first(context.output_dir / "features", f"pretrained-{split}-*"):
        with kept(folder) as exists:
            facts = json.loads((folder / "meta.json").read_text()) if exists else {}
            differing = [name for name, value in wanted.items() if facts.get(name) != value]
            if exists and not differing:
                readable = np.flatnonzero(np.load(folder / "seen.npy"))
                yield np.load(folder / "cls.npy", mmap_mode="c"), readable, facts
                return
            if exists and not found:
                name = differing[0]
                found = f"those kept are of {name} {facts.get(name)}, not {wanted[name]}"
    raise InputError(
        f"features of the {split} images: {found or 'none are kept'}; xcit-dino knn makes them "
        "(embed, where there are no labels)"
    )


def classify(context: Context, train: ShardIndex, val: ShardIndex) -> Neighbors:
    """Neighbours and k-NN classes (k = 20, fewer where the bank is smaller) of a part of the
    validation images.

    Raises:
        InputError: no features, or images without labels.
    """
    if min(train.labels.min(), val.labels.min()) < 0:
        raise InputError("images without labels")
    with load_cached(context, "val", val) as (table, val_samples, facts):
        chosen = val_samples[spread(len(val_samples), MOST_QUERIES)]
        features = unit_rows(table[chosen])
    with load_cached(context, "train", train, like=facts) as (bank, bank_samples, _):
        bank = bank if len(bank_samples) == len(bank) else bank[bank_samples]
        similarities, rows = Search(bank)(features, min(K, len(bank)))
    neighbors = bank_samples[rows]
    neighbor_labels = train.labels[neighbors].astype(np.int64)
    classes = int(max(train.labels.max(), val.labels.max())) + 1
    predicted = predict(
        torch.from_numpy(similarities), torch.from_numpy(neighbor_labels), TEMPERATURE, classes
    ).numpy()
    labels = val.labels[chosen].astype(np.int64)
    return Neighbors(chosen, features, labels, predicted, similarities, neighbors, neighbor_labels)


def nearest_others(
    features: np.ndarray, rows: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The most similar other rows of some rows of a table, and their cosines, the nearest first.

    Args:
        features: float [N, D], not normalised.
        rows: int64 [Q].
        count: k, cut to N - 1.

    Returns:
        int64 [Q, k] and float32 [Q, k].
    """
    similarities, found = Search(features)(features[rows], min(count + 1, len(features)))
    others = found != rows[:, None]
    others[others.all(1), -1] = False  # more than k copies of it hide the row itself
    shape = (len(rows), found.shape[1] - 1)
    return found[others].reshape(shape), similarities[others].reshape(shape)


def spread(count: int, most: int) -> np.ndarray:
    """int64: at most ``most`` of the numbers 0 to count - 1, evenly."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64)


def examples(found: Neighbors, right: int, wrong: int) -> list[int]:
    """Rows to show: some whose class was found and some whose class was not, spread over the
    classes, the surest first in each."""
    chosen = []
    for count, rows in ((right, found.right), (wrong, ~found.right)):
        rows = np.flatnonzero(rows)
        surest = rows[np.argsort(-found.similarities[rows, 0], kind="stable")]
        _, first = np.unique(found.labels[surest], return_index=True)  # one of every class
        order = np.concatenate([np.sort(first), np.setdiff1d(np.arange(len(surest)), first)])
        chosen += surest[order[:count]].tolist()
    return chosen


def confusion(found: Neighbors, num_classes: int) -> np.ndarray:
    """float [C, C]: share of row class's images that were taken for the column class; rows of
    classes without images are 0."""
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (found.labels, found.predicted), 1)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def most_confused(found: Neighbors, most: int) -> list[tuple[int, int, int]]:
    """(class, taken for, images) of the most frequent mistakes."""
    wrong = ~found.right
    pairs = np.stack([found.labels[wrong], found.predicted[wrong]], 1)
    kinds, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return [(int(kinds[i, 0]), int(kinds[i, 1]), int(counts[i])) for i in order]


def principal_plane(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(coordinates [Q, 2] on the first two principal components, their shares of the variance)."""
    centred = features - features.mean(0)
    _, strengths, directions = np.linalg.svd(centred, full_matrices=False)
    variance = strengths**2
    return centred @ directions[:2].T, variance[:2] / max(variance.sum(), 1e-12)


def common_classes(labels: Sequence[int] | np.ndarray, most: int) -> list[int]:
    """The most frequent classes, in the order of their numbers."""
    kinds, counts = np.unique(labels, return_counts=True)
    return sorted(kinds[np.argsort(-counts, kind="stable")[:most]].tolist())
