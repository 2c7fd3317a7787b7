"""k-NN and linear probe on features of your own, with scikit-learn's ``fit`` and ``predict``.

The same arithmetic as the commands ``knn`` and ``linear``, on arrays instead of shards.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from xcit_dino.errors import InputError
from xcit_dino.eval.config import LinearConfig
from xcit_dino.eval.features import Features
from xcit_dino.eval.knn import Search, vote_tables
from xcit_dino.eval.linear import train_cached
from xcit_dino.eval.linear_grid import grid
from xcit_dino.options import replace


class _Classifier(ABC):
    """What both have: labels of any kind, numbered by their sorted values."""

    classes_: NDArray[Any]
    """The labels seen by ``fit``, sorted."""

    _dimensions: int
    """Of the features given to ``fit``; missing before."""

    def _numbered(self, X: ArrayLike, y: Sequence[Any] | NDArray[Any]) -> tuple[Any, Any]:
        features, labels = as_features(X, type(self).__name__), np.asarray(y)
        if labels.shape != (len(features),):
            raise InputError(
                f"fit: {len(features)} rows of features, but labels of shape {labels.shape}; give "
                "one label a row"
            )
        self._dimensions = features.shape[1]
        self.classes_, numbers = np.unique(labels, return_inverse=True)
        return features, numbers.astype(np.int64)

    @abstractmethod
    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Probability of each class [Q, classes], in the order of ``classes_``."""

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The label of each row [N]; the first in order where two are equally likely."""
        numbers = self.predict_proba(X).argmax(1)
        return self.classes_[numbers]

    def score(self, X: ArrayLike, y: Sequence[Any] | NDArray[Any]) -> float:
        """Share of rows whose label is predicted, from 0 to 1."""
        predicted, labels = self.predict(X), np.asarray(y)
        if labels.shape != predicted.shape:
            raise InputError(
                f"score: {len(predicted)} rows of features, but labels of shape {labels.shape}; "
                "give one label a row"
            )
        return float((predicted == labels).mean())

    def _like_those_of_fit(self, X: ArrayLike) -> NDArray[np.float32]:
        """float32 [Q, D] of as many dimensions as ``fit`` was given."""
        name = type(self).__name__
        if not hasattr(self, "_dimensions"):
            raise InputError(f"{name}: knows no features yet; call fit first")
        features = as_features(X, name)
        if features.shape[1] != self._dimensions:
            raise InputError(
                f"{name}: features of {features.shape[1]} dimensions, but fit was given "
                f"{self._dimensions}; embed both with the same network"
            )
        return features


class KNN(_Classifier):
    """Weighted k-NN by cosine similarity (DINO ``eval_knn.py``).

    Args:
        k: neighbors that vote; at most as many as there are rows.
        temperature: T of a vote exp(cosine / T).
    """

    def __init__(self, k: int = 20, temperature: float = 0.07):
        if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
            raise InputError(f"KNN: temperature={temperature!r}; give a number above 0")
        self.k, self.temperature = _neighbors(k, "KNN"), temperature

    def fit(self, X: ArrayLike, y: Sequence[Any] | NDArray[Any]) -> KNN:
        """Remember features [N, D] and their labels [N]."""
        self._bank, self._labels = self._numbered(X, y)
        self._search = Search(self._bank)
        return self

    def kneighbors(self, X: ArrayLike, k: int | None = None) -> tuple[Any, Any]:
        """Cosines float32 [Q, k] and rows int64 [Q, k] of the nearest, the most similar first."""
        features = self._like_those_of_fit(X)
        k = self.k if k is None else _neighbors(k, "kneighbors")
        return self._search(features, min(k, len(self._bank)))

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Share of the votes [Q, classes]."""
        similarities, rows = self.kneighbors(X)
        labels = torch.from_numpy(self._labels[rows])
        (votes,) = vote_tables(
            torch.from_numpy(similarities), labels, [labels.shape[1]], self.temperature,
            len(self.classes_),
        )  # fmt: skip
        return (votes / votes.sum(1, keepdim=True)).numpy()


class LinearProbe(_Classifier):
    """Linear classifier; the learning rate is chosen on held-out rows, then all rows are used.

    Args:
        epochs: passes over the rows.
        lrs: learning rates tried, for batches of 256.
        batch_size: rows a step, at most.
        holdout: fraction of the rows used to choose.
        seed: of initialization, order and held-out rows.
    """

    def __init__(
        self,
        epochs: int = 100,
        lrs: Sequence[float] = LinearConfig.lrs,
        batch_size: int = 1024,
        holdout: float = 0.1,
        seed: int = 0,
    ):
        lrs = tuple(lrs) if isinstance(lrs, Iterable) else lrs
        values = {"epochs": epochs, "lrs": lrs, "probe_batch_size": batch_size}
        self._config = replace(
            LinearConfig(), values | {"holdout": holdout, "seed": seed}, "LinearProbe"
        )

    def fit(self, X: ArrayLike, y: Sequence[Any] | NDArray[Any]) -> LinearProbe:
        """Train on features [N, D] and labels [N]. ``lr_`` is the learning rate chosen, ``coef_``
        [classes, D] and ``intercept_`` [classes] the classifier."""
        features, numbers = self._numbered(X, y)
        table = Features({"cls": features}, numbers, len(self.classes_), 0)
        choices = grid(("cls",), self._config.lrs, (0.0,))
        probe = train_cached(table, choices, len(self.classes_), self._config, torch.device("cpu"))
        self.lr_ = probe.choice.lr
        self.coef_, self.intercept_ = probe.weight.numpy(), probe.bias.numpy()
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[np.float32]:
        """Logits [Q, classes]."""
        return self._like_those_of_fit(X) @ self.coef_.T + self.intercept_

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Probabilities [Q, classes]."""
        logits = torch.from_numpy(self.decision_function(X)).double()
        return logits.softmax(1).numpy()


def _neighbors(k: Any, of: str) -> int:
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise InputError(f"{of}: k={k!r}; give a whole number from 1")
    return int(k)


def as_features(X: ArrayLike, of: str) -> NDArray[np.float32]:
    """float32 [N, D], contiguous.

    Raises:
        InputError: not numbers, not two-dimensional, empty, or with NaN or infinite values.
    """
    try:
        features = np.ascontiguousarray(X, np.float32)
    except (TypeError, ValueError):
        raise InputError(f"{of}: features are not numbers; give [rows, dimensions]") from None
    if features.ndim != 2 or not features.size:
        raise InputError(f"{of}: features of shape {features.shape}; give [rows, dimensions]")
    if not np.isfinite(features).all():
        raise InputError(f"{of}: features contain NaN or infinite values")
    return features
