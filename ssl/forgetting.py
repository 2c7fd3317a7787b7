"""Guard against forgetting: how much of its starting weights a continued training preserves.

A fixed subset of images is embedded with the starting weights (features kept in the run folder)
and with the current ones. Two measures need no labels: how many of each image's nearest neighbors
are still the same, and linear CKA (Kornblith et al. 2019, arXiv 1905.00414, eq. 1) between the two
sets of features. If there are labels, the k-NN accuracy on the other data is judged too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import torch
from torch import nn

from xcit_dino.data.shards.index import ShardIndex, resolve_split
from xcit_dino.errors import RunError, warn
from xcit_dino.eval.context import Context
from xcit_dino.eval.features import eval_mode
from xcit_dino.eval.knn import unit_rows
from xcit_dino.eval.online import embed_subset, online_context
from xcit_dino.eval.pictures.online import EmbeddedSubset
from xcit_dino.files import atomic_path
from xcit_dino.options import options
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.train.distributed import dist
from xcit_dino.train.run.metrics import Line, read_metrics
from xcit_dino.train.run.rollback import RollBack

IMAGES, NEIGHBORS = 2_000, 10
KEPT, CKA, OTHER = "neighbors_kept", "feature_cka", "_other"
KNN_OTHER = "knn_other_top1"
ADVICE = (
    "change: a lower --lr; a higher --momentum_teacher; a longer --freeze_backbone; a lower "
    "--layer_decay; --freeze_batchnorm true"
)


def neighbors_kept(start: np.ndarray, now: np.ndarray, k: int = NEIGHBORS) -> float:
    """Share of each image's k nearest neighbors by ``start`` that are among its k by ``now``.

    Args:
        start, now: float32 [N, D] features of the same N > 1 images; the D may differ.
    """
    k = min(k, len(start) - 1)
    before, after = nearest(start, k), nearest(now, k)
    return float((before[:, :, None] == after[:, None, :]).any(2).mean())


def nearest(features: np.ndarray, k: int) -> np.ndarray:
    """int64 [N, k]: the other images with the highest cosine."""
    rows = unit_rows(features)
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)  # type: ignore[call-arg]
    found = index.search(rows, k + 1)[1]  # type: ignore[call-arg]
    own = found == np.arange(len(rows))[:, None]
    own[~own.any(1), -1] = True  # duplicates of an image may push it out of its own list
    return found[~own].reshape(len(rows), k)


def linear_cka(start: np.ndarray, now: np.ndarray) -> float:
    """Linear CKA of two sets of features [N, D] of the same images: 1 if they are equal up to
    rotation and scale, near 0 if they have nothing in common."""
    one, two = (x.astype(np.float64) - x.mean(0, dtype=np.float64) for x in (start, now))
    cross, own = np.linalg.norm(one.T @ two) ** 2, np.linalg.norm(one.T @ one)
    return float(cross / max(own * np.linalg.norm(two.T @ two), 1e-30))


@dataclass(frozen=True)
class Drift:
    """Compares a backbone with the starting weights on a subset of some shards."""

    index: ShardIndex
    context: Context
    file: Path
    """Features of the starting weights, ``.npz``; written by the first call."""
    suffix: str = ""
    """Appended to the metrics' names."""

    def __call__(self, backbone: nn.Module, step: int) -> dict[str, float]:
        """``neighbors_kept`` and ``feature_cka`` after a step; empty if the features of the
        starting weights are lost. All ranks call this."""
        with eval_mode(backbone), torch.inference_mode():
            now = embed_subset(self.context, self.index, backbone, IMAGES, "forgetting")
        return dist.from_main(lambda: self.measure(now, step))

    def measure(self, now: EmbeddedSubset, step: int) -> dict[str, float]:
        """Compare features with those of the starting weights, which are stored at step 0."""
        if step == 0:
            with atomic_path(self.file) as temporary, temporary.open("wb") as file:
                np.savez(file, samples=now.samples, features=now.features)
        try:
            with np.load(self.file) as saved:
                samples, features = saved["samples"], saved["features"]
        except (OSError, ValueError, KeyError) as error:
            warn(f"{self.file} cannot be read ({error}): forgetting is not measured")
            return {}
        _, ours, theirs = np.intersect1d(now.samples, samples, return_indices=True)
        before, after = features[theirs], now.features[ours]
        return {
            KEPT + self.suffix: neighbors_kept(before, after),
            CKA + self.suffix: linear_cka(before, after),
        }


def drifts(config: PretrainConfig, index: ShardIndex, world: dist.World) -> list[Drift]:
    """What is measured in a run: its own images, and those of ``--knn_data_path``. Empty if it
    starts from random weights.

    index: of the training images.
    """
    if config.start.init_from is None or not config.health.forgetting_every:
        return []
    run, other = dict(options(config)), config.online.knn_data_path
    assert config.loader.data_path is not None
    places = [(index, config.loader.data_path, "")]
    if other is not None:
        places.append((ShardIndex.load(resolve_split(other, "train")), other, OTHER))
    return [
        Drift(
            shards,
            online_context(run, path, world),
            config.run.output_dir / f"start_features{suffix}.npz",
            suffix,
        )
        for shards, path, suffix in places
    ]


def judge(config: PretrainConfig) -> Judge:
    """The judge of a run, with the measurements so far."""
    health = config.health
    metrics = dist.from_main(lambda: read_metrics(config.run.output_dir))
    return Judge(health.on_forgetting, health.forgetting_threshold, metrics)


@dataclass
class Judge:
    """What follows from forgetting: a warning, a stop, or a roll-back with half the learning rate.

    The first roll-back goes to the last good step. The student may have drifted far by then, and
    the teacher, its average, follows it at any learning rate: the next roll-back goes to half that
    step, and so on, in the end to the starting weights.

    Args:
        action: ``--on_forgetting``.
        threshold: share of the starting weights' neighbors and accuracy that must be preserved.
        metrics: of the run so far, if it resumes.
    """

    action: Literal["warn", "stop", "rollback"]
    threshold: float
    metrics: Iterable[Line] = ()
    good: int = 0
    """The last step at which enough was preserved."""
    knn_start: float | None = None
    warned: bool = False

    def __post_init__(self) -> None:
        for line in self.metrics:
            self.lost(line["step"], line)

    def __call__(self, step: int, found: dict[str, Any], rollbacks: int = 0) -> int:
        """Judge the measurements of a step, after a number of roll-backs; returns the last good
        step.

        Raises:
            RollBack, RunError: too little is preserved, and ``action`` is not ``warn``.
        """
        lost = self.lost(step, found)
        if not lost:
            return self.good
        text = f"step {step}: the starting weights are being forgotten: {lost}"
        if self.action == "rollback":
            self.good >>= rollbacks
            raise RollBack(text, ADVICE, until=self.good)
        if self.action == "stop":
            raise RunError(
                f"{text}; {ADVICE}. The last good checkpoint is that of step {self.good}: continue "
                "from it with --init_from in another --output_dir"
            )
        if dist.is_main() and not self.warned:
            warn(f"{text}; {ADVICE}")
        self.warned = True
        return self.good

    def lost(self, step: int, found: dict[str, Any]) -> str:
        """What is below its threshold in the measurements of a step, in words; "" if nothing is, or
        nothing was measured. Keeps in mind the last good step and the k-NN of step 0."""
        if step == 0:
            self.knn_start = found.get(KNN_OTHER, self.knn_start)
        lost = []
        kept = found.get(KEPT + OTHER, found.get(KEPT))
        if kept is not None and kept < self.threshold:
            lost.append(f"{kept:.0%} of each image's nearest neighbors are still the same")
        knn = found.get(KNN_OTHER)
        if knn is not None and self.knn_start and knn < self.threshold * self.knn_start:
            lost.append(f"k-NN on the other data fell from {self.knn_start:.1f} to {knn:.1f} %")
        if kept is not None and not lost:
            self.good, self.warned = step, False
        return ", ".join(lost)
