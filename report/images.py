"""A run's images, settings and classified samples, for the report's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from xcit_dino.data.shards.index import ShardIndex, resolve_split
from xcit_dino.errors import InputError
from xcit_dino.eval import neighbors
from xcit_dino.eval.config import EvalTargetConfig
from xcit_dino.eval.context import Context, make_context
from xcit_dino.eval.pictures import render
from xcit_dino.inputs import InputSettings
from xcit_dino.report.page import Tile
from xcit_dino.report.provenance import known_options
from xcit_dino.train.distributed import dist
from xcit_dino.train.run.reader import Run


class Images:
    """What the pictures are made from; read when it is first needed."""

    def __init__(self, run: Run):
        self.run = run
        self.options = known_options(run)
        self.unreadable = set[tuple[str, int]]()
        """(checksum of the split's index, sample number) of images that could not be read."""

    def index(self, split: str) -> ShardIndex:
        """The shards of a split.

        Raises:
            InputError: they do not exist (any more).
        """
        if not self.options.get("data_path"):
            raise InputError("the run's config.yaml has no data_path")
        return ShardIndex.load(resolve_split(self.options["data_path"], split))

    @cached_property
    def train(self) -> ShardIndex:
        return self.index("train")

    @cached_property
    def val(self) -> ShardIndex:
        return self.index("val")

    @cached_property
    def found(self) -> neighbors.Neighbors:
        """Classified validation images.

        Raises:
            InputError: see :func:`neighbors.classify`.
        """
        if self.train.labels.max() < 0:
            raise InputError("the images have no labels")
        return neighbors.classify(self.context, self.train, self.val)

    @cached_property
    def context(self) -> Context:
        """How evaluations of the run's network read images; unreadable ones are skipped."""
        options = EvalTargetConfig(self.run.folder, num_workers=0, max_bad_fraction=1.0)
        settings = InputSettings.from_run(self.options) or InputSettings()
        data_path = self.options.get("data_path") or ""
        world = dist.World(0, 1, torch.device("cpu"))
        return make_context(options, settings, self.options, data_path, world)

    def photos(self, index: ShardIndex, samples: Sequence[int]) -> dict[int, Any]:
        """Sample number -> pixels, of the readable ones."""
        found = render.photos(index, samples, self.context)
        self.unreadable |= {(index.checksum, n) for n in samples if n not in found}
        return found

    def name(self, label: int) -> str:
        """The name of a class."""
        classes = self.train.classes or self.val.classes
        return classes[label] if classes and label < len(classes) else f"class {label}"


def tile(pixels: render.Pixels, caption: str, style: str = "") -> Tile:
    """A tile of the page; small images are enlarged pixel by pixel, photos smoothly."""
    smooth = " smooth" if len(pixels) > render.SMALL else ""
    return Tile(render.data_uri(pixels), caption, f"{style}{smooth}".strip())
