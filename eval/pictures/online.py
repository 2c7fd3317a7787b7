"""Pictures for TensorBoard at each k-NN evaluation of pretraining: the crops as the network sees
them, attention maps and nearest neighbours of fixed images, the spread of the features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.eval.context import Context
from xcit_dino.eval.knn import unit_rows
from xcit_dino.eval.neighbors import spread
from xcit_dino.eval.pictures.attention import Pixels
from xcit_dino.eval.pictures.render import (
    TrainingCrops,
    attention_of,
    crops_of,
    framed,
    mosaic,
    photos,
)
from xcit_dino.train.distributed import dist

FIXED = 6  # images, the same every time
NEIGHBOURS = 6
CROP_SAMPLES = 2


@dataclass(frozen=True)
class Embedded:
    """A part of a split and its features."""

    index: ShardIndex
    samples: np.ndarray
    """int64 [n]."""
    features: np.ndarray
    """float32 [n, D]."""
    labels: np.ndarray
    """int64 [n]."""


@dataclass(frozen=True)
class OnlinePictures:
    """The callable: (backbone in evaluation mode, epoch, bank, queries) -> name -> array."""

    crops_config: TrainingCrops
    context: Context
    """One process, that of the training, reads a few images."""

    def __call__(
        self, backbone: nn.Module, epoch: int, bank: Embedded, queries: Embedded
    ) -> dict[str, np.ndarray]:
        """Mosaics (uint8 [H, W, 3]) and the deviation of every feature, float32 [D]; what cannot be
        made is left out with a word: a picture ends no training."""
        made: dict[str, Callable[[], np.ndarray]] = {
            "crops": lambda: self.crops(bank.index, epoch),
            "attention": lambda: self.attention(backbone, queries),
            "neighbours": lambda: self.neighbours(bank, queries),
            "feature_deviation": lambda: bank.features.std(0),
        }
        found = {}
        for name, make in made.items():
            try:
                found[name] = make()
            except Exception as reason:
                if dist.is_main():
                    print(f"no picture of {name}: {type(reason).__name__}: {reason}", flush=True)
        return found

    def crops(self, index: ShardIndex, epoch: int) -> Pixels:
        """A row of crops a sample, as augmented in the epoch that has just ended."""
        config = self.crops_config
        config = replace(config, loader=replace(config.loader, num_workers=0))
        samples = spread(index.num_samples, CROP_SAMPLES + 2)[1:-1].tolist()
        return mosaic(crops_of(config, index, samples, max(0, epoch - 1)))

    def attention(self, backbone: nn.Module, queries: Embedded) -> Pixels:
        """A row an image: itself, its heads' maps, their mean."""
        chosen = queries.samples[spread(len(queries.samples), FIXED)]
        images = self.photos(queries.index, chosen)
        return mosaic(attention_of(backbone, list(images.values()), self.context))

    def neighbours(self, bank: Embedded, queries: Embedded) -> Pixels:
        """A row an image: itself, then the nearest of the bank, framed by whether the class is
        right."""
        chosen = spread(len(queries.samples), FIXED)
        cosines = unit_rows(queries.features[chosen]) @ unit_rows(bank.features).T
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :NEIGHBOURS]
        asked = self.photos(queries.index, queries.samples[chosen])
        found = self.photos(bank.index, bank.samples[nearest].ravel())
        rows = []
        for row, columns in zip(chosen, nearest, strict=True):
            right = bank.labels[columns] == queries.labels[row]
            tiles = [found[int(sample)] for sample in bank.samples[columns]]
            framed_tiles = [framed(t, bool(same)) for t, same in zip(tiles, right, strict=True)]
            rows.append([asked[int(queries.samples[row])], *framed_tiles])
        return mosaic(rows)

    def photos(self, index: ShardIndex, samples: np.ndarray) -> dict[int, Pixels]:
        """Sample number -> the centre view that evaluations see."""
        return photos(index, samples.tolist(), self.context)
