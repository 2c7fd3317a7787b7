"""k-NN and linear probe on features of your own, with scikit-learn's ``fit`` and ``predict``.

The same arithmetic as the commands ``knn`` and ``linear``, on arrays instead of shards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
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


class _Classifier(ABC):
    """What both have: labels of any kind, numbered by their sorted values."""

    classes_: NDArray[Any]
    """The labels seen by ``fit``, sorted."""

    def _numbered(self, X: ArrayLike, y: Sequence[Any] | NDArray[Any]) -> tuple[Any, Any]:
        features, labels = as_features(X), np.asarray(y)
        if labels.shape != (len(features),):
            raise InputError(
                f"fit: {len(features)} rows of features, but labels of shape {labels.shape}; give "
                "one label a row"
            )
        self.classes_, numbers = np.unique(labels, return_inverse=True)
        return features, numbers.astype(np.int64)

    @abstractmethod
    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Probability of each class [Q, classes], in the order of ``classes_``."""

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The label of each row [N]; the first in order where two are equally likely."""
        return self.classes_[self.predict_proba(X).argmax(1)]

    def score(self, X: ArrayLike, y: Sequence[Any] | NDArray[Any]) -> float:
        """Share of rows whose label is predicted, from 0 to 1."""
        return float((self.predict(X) == np.asarray(y)).mean())


class KNN(_Classifier):
    """Weighted k-NN by cosine similarity (DINO ``eval_knn.py``).

    Args:
        k: neighbors that vote; at most as many as there are rows.
        temperature: T of a vote exp(cosine / T).
    """

    def __init__(self, k: int = 20, temperature: float = 0.07):
        if k < 1 or temperature <= 0:
            raise InputError(f"KNN(k={k}, temperature={temperature}): both must be above 0")
        self.k, self.temperature = k, temperature

    def fit(self, X: ArrayLike, y: Sequence[Any] | NDArray[Any]) -> KNN:
        """Remember features [N, D] and their labels [N]."""
        self._bank, self._labels = self._numbered(X, y)
        self._search = Search(self._bank)
        return self

    def kneighbors(self, X: ArrayLike, k: int | None = None) -> tuple[Any, Any]:
        """Cosines float32 [Q, k] and rows int64 [Q, k] of the nearest, the most similar first."""
        return self._search(as_features(X), min(k or self.k, len(self._bank)))

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
        self._config = LinearConfig(
            epochs=epochs, lrs=tuple(lrs), probe_batch_size=batch_size, holdout=holdout, seed=seed
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
        return as_features(X) @ self.coef_.T + self.intercept_

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Probabilities [Q, classes]."""
        logits = torch.from_numpy(self.decision_function(X)).double()
        return logits.softmax(1).numpy()


def as_features(X: ArrayLike) -> NDArray[np.float32]:
    """float32 [N, D], contiguous.

    Raises:
        InputError: not two-dimensional, empty, or with NaN or infinite values.
    """
    features = np.ascontiguousarray(X, np.float32)
    if features.ndim != 2 or not features.size:
        raise InputError(f"features have shape {features.shape}; give [rows, dimensions]")
    if not np.isfinite(features).all():
        raise InputError("features contain NaN or infinite values")
    return features
