"""Per-image analysis of a run's features: nearest neighbors, confusions, a map of the space.

Everything is computed from the features cached by ``knn`` in ``RUN/features``, on a fixed subset
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
from xcit_dino.eval.feature_cache import newest_first, reading
from xcit_dino.eval.knn import Search, predict, unit_rows

K, TEMPERATURE = 20, 0.07
MOST_QUERIES = 2000  # validation images to classify, evenly spaced
MOST_AVERAGED = 20_000  # features of a table of any size from which the mean is computed


@dataclass(frozen=True)
class Neighbors:
    """Classified validation images; Q queries, k neighbors."""

    queries: np.ndarray
    """int64 [Q], sample numbers of the validation split."""
    features: np.ndarray
    """float32 [Q, D], L2-normalized."""
    labels: np.ndarray
    """int64 [Q], true classes."""
    predicted: np.ndarray
    """int64 [Q], classes with the most votes."""
    similarities: np.ndarray
    """float32 [Q, k], cosines, descending."""
    centered: np.ndarray
    """float32 [Q, k], cosines of the same pairs once the mean feature is subtracted from both."""
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
    context: Context,
    split: str,
    index: ShardIndex,
    like: dict[str, Any] | None = None,
    network: str = "pretrained",
) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, Any]]]:
    """Class tokens [N, D] of all images of a split, the numbers [M] of the readable ones, and the
    facts of the cache: the newest with the input settings of the context. No command removes them
    meanwhile.

    like: further facts that must match (``weights``, ``network`` ...).
    network: ``random`` and ``pixels`` are cached with ``--baselines``.

    Raises:
        InputError: none are cached, or only ones with other facts; names one difference.
    """
    wanted = context.protocol | (like or {}) | {"index": index.checksum}
    found = ""
    for folder in newest_first(context.output_dir / "features", f"{network}-{split}-*"):
        with reading(folder) as exists:
            facts = json.loads((folder / "meta.json").read_text()) if exists else {}
            differing = [name for name, value in wanted.items() if facts.get(name) != value]
            if exists and not differing:
                readable = np.flatnonzero(np.load(folder / "seen.npy"))
                yield np.load(folder / "cls.npy", mmap_mode="c"), readable, facts
                return
            if exists and not found:
                name = differing[0]
                found = f"those cached are of {name} {facts.get(name)}, not {wanted[name]}"
    raise InputError(
        f"features of the {split} images: {found or 'none are cached'}; xcit-dino knn makes them "
        "(embed, if there are no labels)"
    )


def classify(context: Context, train: ShardIndex, val: ShardIndex) -> Neighbors:
    """Neighbors and k-NN predictions (k = 20, fewer if the bank is smaller) of a subset of the
    validation images.

    Raises:
        InputError: no features, or images without labels.
    """
    if min(train.labels.min(), val.labels.min()) < 0:
        raise InputError("images without labels")
    with load_cached(context, "val", val) as (table, val_samples, facts):
        chosen = val_samples[evenly_spaced(len(val_samples), MOST_QUERIES)]
        features = unit_rows(table[chosen])
    with load_cached(context, "train", train, like=facts) as (bank, bank_samples, _):
        bank = bank if len(bank_samples) == len(bank) else bank[bank_samples]
        similarities, rows = Search(bank)(features, min(K, len(bank)))
        mean = mean_direction(bank)
        centered = np.stack([
            unit_rows(unit_rows(bank[found]) - mean) @ query
            for found, query in zip(rows, unit_rows(features - mean), strict=True)
        ])  # fmt: skip
    neighbors = bank_samples[rows]
    neighbor_labels = train.labels[neighbors].astype(np.int64)
    classes = int(max(train.labels.max(), val.labels.max())) + 1
    predicted = predict(
        torch.from_numpy(similarities), torch.from_numpy(neighbor_labels), TEMPERATURE, classes
    ).numpy()
    labels = val.labels[chosen].astype(np.int64)
    return Neighbors(
        chosen, features, labels, predicted, similarities, centered, neighbors, neighbor_labels
    )  # fmt: skip


def mean_direction(features: np.ndarray) -> np.ndarray:
    """float32 [D]: the mean of the L2-normalized rows of a table, of at most ``MOST_AVERAGED``."""
    return unit_rows(features[evenly_spaced(len(features), MOST_AVERAGED)]).mean(0)


def centered_rows(features: np.ndarray) -> np.ndarray:
    """float32 [N, D]: unit rows without what all have in common, their mean, and of unit length
    again; a random network's features, whose cosines are all near 1, can be told apart so."""
    rows = unit_rows(features)
    return unit_rows(rows - rows.mean(0))


def nearest_others(
    features: np.ndarray, rows: np.ndarray, count: int, search: Search | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The most similar other rows for some rows of a table, and their cosines, nearest first.

    Args:
        features: float [N, D], not normalized.
        rows: int64 [Q].
        count: k, limited to N - 1.
        search: over ``features``, where it is used for several calls.

    Returns:
        int64 [Q, k] and float32 [Q, k].
    """
    search = search or Search(features)
    similarities, found = search(features[rows], min(count + 1, len(features)))
    others = found != rows[:, None]
    others[others.all(1), -1] = False  # more than k duplicates hide the row itself
    shape = (len(rows), found.shape[1] - 1)
    return found[others].reshape(shape), similarities[others].reshape(shape)


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """int64: at most ``most`` of the numbers 0 to count - 1, evenly spaced."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64)


def examples(found: Neighbors, right: int, wrong: int) -> list[int]:
    """Rows to show: some classified correctly and some not, spread over the classes, the most
    confident first in each."""
    chosen = []
    for count, rows in ((right, found.right), (wrong, ~found.right)):
        rows = np.flatnonzero(rows)
        surest = rows[np.argsort(-found.similarities[rows, 0], kind="stable")]
        _, first = np.unique(found.labels[surest], return_index=True)  # one of every class
        order = np.concatenate([np.sort(first), np.setdiff1d(np.arange(len(surest)), first)])
        chosen += surest[order[:count]].tolist()
    return chosen


def confusion(found: Neighbors, num_classes: int) -> np.ndarray:
    """float [C, C]: fraction of the row class's images predicted as the column class; rows of
    classes without images are 0."""
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (found.labels, found.predicted), 1)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def most_confused(found: Neighbors, most: int) -> list[tuple[int, int, int]]:
    """(class, predicted class, images) of the most frequent errors."""
    wrong = ~found.right
    pairs = np.stack([found.labels[wrong], found.predicted[wrong]], 1)
    kinds, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return [(int(kinds[i, 0]), int(kinds[i, 1]), int(counts[i])) for i in order]


def principal_plane(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(coordinates [Q, 2] on the first two principal components, their fractions of the
    variance)."""
    centered = features - features.mean(0)
    _, strengths, directions = np.linalg.svd(centered, full_matrices=False)
    variance = strengths**2
    return centered @ directions[:2].T, variance[:2] / max(variance.sum(), 1e-12)


def common_classes(labels: Sequence[int] | np.ndarray, most: int) -> list[int]:
    """The most frequent classes, sorted by number."""
    kinds, counts = np.unique(labels, return_counts=True)
    return sorted(kinds[np.argsort(-counts, kind="stable")[:most]].tolist())
