"""What a run's features say of single images: nearest neighbours, confusions, a map of the space.

Everything is computed from the features that ``knn`` has left in ``RUN/features``, on a fixed part
of the validation images.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError
from xcit_dino.eval.feature_cache import kept, newest_first
from xcit_dino.eval.knn import Search, unit_rows

K, TEMPERATURE = 20, 0.07
MOST_QUERIES = 2000  # validation images that are classified, spread evenly
VOTE_ROWS = 256  # queries whose votes are counted at a time


@dataclass(frozen=True)
class Neighbours:
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
    neighbours: np.ndarray
    """int64 [Q, k], sample numbers of the training split."""
    neighbour_labels: np.ndarray
    """int64 [Q, k]."""

    @property
    def right(self) -> np.ndarray:
        """bool [Q]."""
        return self.predicted == self.labels


@contextmanager
def cached(
    run_folder: Path, split: str, index: ShardIndex, like: dict[str, Any] | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, Any]]]:
    """Class tokens [N, D] of the readable images of a split, their sample numbers [N], and what
    they were computed from; no command removes them meanwhile.

    like: these facts of the other split have to be the same (weights, geometry ...).

    Raises:
        InputError: ``knn`` has left none, or they are of other shards or weights.
    """
    found = False
    for folder in newest_first(run_folder / "features", f"pretrained-{split}-*"):
        with kept(folder) as there:
            facts = json.loads((folder / "meta.json").read_text()) if there else {}
            found = found or there
            same = like is None or {**facts, "index": ""} == {**like, "index": ""}
            if there and facts["index"] == index.checksum and same:
                seen = np.flatnonzero(np.load(folder / "seen.npy"))
                yield np.load(folder / "cls.npy", mmap_mode="c"), seen, facts
                return
    what = (
        "those kept are of other shards or weights"
        if found
        else "none are kept; xcit-dino knn makes them (embed, where there are no labels)"
    )
    raise InputError(f"features of the {split} images: {what}")


def classify(run_folder: Path, train: ShardIndex, val: ShardIndex) -> Neighbours:
    """Neighbours and k-NN classes (k = 20, fewer where the bank is smaller) of a part of the
    validation images.

    Raises:
        InputError: no features, or images without labels.
    """
    if min(train.labels.min(), val.labels.min()) < 0:
        raise InputError("images without labels")
    with cached(run_folder, "val", val) as (table, val_samples, facts):
        chosen = val_samples[spread(len(val_samples), MOST_QUERIES)]
        features = unit_rows(table[chosen])
    with cached(run_folder, "train", train, like=facts) as (bank, bank_samples, _):
        bank = bank if len(bank_samples) == len(bank) else bank[bank_samples]
        similarities, rows = Search(bank)(features, min(K, len(bank)))
    neighbours = bank_samples[rows]
    neighbour_labels = train.labels[neighbours].astype(np.int64)
    classes = int(max(train.labels.max(), val.labels.max())) + 1
    predicted = winners(similarities, neighbour_labels, classes)
    labels = val.labels[chosen].astype(np.int64)
    return Neighbours(
        chosen, features, labels, predicted, similarities, neighbours, neighbour_labels
    )


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


def winners(similarities: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [Q]: the class with the most votes exp(cosine / T); of equal ones the lowest."""
    found = np.empty(len(labels), np.int64)
    for start in range(0, len(labels), VOTE_ROWS):
        part = slice(start, start + VOTE_ROWS)
        votes = np.exp((similarities[part] - similarities[part, :1]).astype(float) / TEMPERATURE)
        table = np.zeros((len(votes), num_classes))
        np.add.at(table, (np.arange(len(votes))[:, None], labels[part]), votes)
        found[part] = table.argmax(1)
    return found


def examples(found: Neighbours, right: int, wrong: int) -> list[int]:
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


def confusion(found: Neighbours, num_classes: int) -> np.ndarray:
    """float [C, C]: share of row class's images that were taken for the column class; rows of
    classes without images are 0."""
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (found.labels, found.predicted), 1)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def most_confused(found: Neighbours, most: int) -> list[tuple[int, int, int]]:
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
