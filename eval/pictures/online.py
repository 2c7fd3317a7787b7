"""Pictures for TensorBoard at each k-NN evaluation of pretraining: the crops as the network sees
them, attention maps and nearest neighbors of fixed images, the std of the features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.eval.context import Context
from xcit_dino.eval.knn import unit_rows
from xcit_dino.eval.neighbors import evenly_spaced
from xcit_dino.eval.pictures.media import Pixels
from xcit_dino.eval.pictures.render import (
    TrainingCrops,
    attention_rows,
    framed,
    mosaic,
    photos,
    training_crops,
    views,
)
from xcit_dino.train.distributed import dist

FIXED = 6  # number of images, the same every time
NEIGHBORS = 6
CROP_SAMPLES = 2


@dataclass(frozen=True)
class EmbeddedSubset:
    """A subset of a split and its features."""

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
    """With a loader that reads in the main process: the images are few."""

    def __call__(
        self, backbone: nn.Module, epoch: int, bank: EmbeddedSubset, queries: EmbeddedSubset
    ) -> dict[str, np.ndarray]:
        """Mosaics (uint8 [H, W, 3]) and the std of every feature, float32 [D]; a picture that fails
        is skipped with a note and does not end the training."""
        made: dict[str, Callable[[], np.ndarray]] = {
            "crops": lambda: self.crops(bank.index, epoch),
            "attention": lambda: self.attention(backbone, queries),
            "neighbors": lambda: self.neighbors(bank, queries),
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
        """One row of crops per sample, as augmented in the epoch that has just ended."""
        config = self.crops_config
        config = replace(config, loader=replace(config.loader, num_workers=0))
        samples = evenly_spaced(index.num_samples, CROP_SAMPLES + 2)[1:-1].tolist()
        return mosaic(training_crops(config, index, samples, max(0, epoch - 1), self.context))

    def attention(self, backbone: nn.Module, queries: EmbeddedSubset) -> Pixels:
        """One row per image: the image, its heads' maps, their mean."""
        chosen = queries.samples[evenly_spaced(len(queries.samples), FIXED)]
        images = views(queries.index, chosen.tolist(), self.context)
        return mosaic(attention_rows(backbone, list(images.values()), self.context))

    def neighbors(self, bank: EmbeddedSubset, queries: EmbeddedSubset) -> Pixels:
        """One row per image: the image, then the nearest of the bank, framed by whether the class
        is correct."""
        chosen = evenly_spaced(len(queries.samples), FIXED)
        cosines = unit_rows(queries.features[chosen]) @ unit_rows(bank.features).T
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :NEIGHBORS]
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
        """Sample number -> picture of the center crop as in evaluations."""
        return photos(index, samples.tolist(), self.context)
