"""PCA whitening of features, as in DINO's copy detection (``utils.py:PCA``)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FLOOR = 1e-5  # of the largest variance: the least by which a component is divided


@dataclass(frozen=True)
class Whitening:
    """An affine map after which the components of the images it was made of are uncorrelated."""

    mean: np.ndarray
    """float64 [D]."""
    axes: np.ndarray
    """float64 [D, D]: principal components, divided by their standard deviations."""

    @classmethod
    def of(cls, features: np.ndarray) -> Whitening:
        """features: float [N, D]. As in DINO, the matrix that is diagonalized is the second moment
        about zero, though features are centered before they are mapped."""
        table = features.astype(np.float64)
        variances, axes = np.linalg.eigh(table.T @ table / len(table))
        floor = FLOOR * variances.max()
        return cls(table.mean(0), axes / np.sqrt(np.maximum(variances, floor)))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """float32 [N, D] of any images."""
        return ((features - self.mean) @ self.axes).astype(np.float32)
