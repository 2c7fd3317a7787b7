"""Options of near-duplicates and retrieval; free of torch, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from xcit_dino.errors import InputError, within
from xcit_dino.eval.config import EvalTargetConfig


@dataclass(frozen=True)
class DuplicatesConfig:
    """Near-duplicates inside a set of images, leaks between train and val, and outliers:
    duplicates.csv (for `shards make --exclude`), pairs.csv, outliers.csv and pictures."""

    dst: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[DST]")] = None
    """Folder to write. Default: duplicates in the run folder."""
    target: EvalTargetConfig = field(default_factory=EvalTargetConfig)
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")
    """Splits to compare, with themselves and with each other."""
    threshold: float = 0.94
    """Correlation of two images' thumbnails from which they are near-duplicates; 1: equal."""
    outliers: int = 100
    """Images listed as outliers: those least similar to their nearest neighbors; 0: none."""
    examples: int = 16
    """Pairs and outliers in the pictures; 0: no pictures."""

    def __post_init__(self) -> None:
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise InputError("--splits: name train, val or both, each once")
        if self.target.baselines:
            raise InputError(
                "--baselines: near-duplicates are those of one network; evaluate them by knn or "
                "linear, or leave it out"
            )
        within(self, 0.5, 1, "threshold")
        within(self, 0, 1e9, "outliers")
        within(self, 0, 200, "examples")
