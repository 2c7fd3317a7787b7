"""A run's images, settings and classified samples, for the report's pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xcit_dino.data.shards.index import ShardIndex, resolve_split
from xcit_dino.errors import InputError
from xcit_dino.eval import neighbors
from xcit_dino.eval.config import EvalTargetConfig
from xcit_dino.eval.context import Context, make_context
from xcit_dino.eval.online import embed_subset
from xcit_dino.eval.pictures import render
from xcit_dino.eval.pictures.false_color import check_shown
from xcit_dino.eval.pictures.online import EmbeddedSubset
from xcit_dino.eval.target import random_network
from xcit_dino.inputs import InputSettings
from xcit_dino.models.tokens import stride_of
from xcit_dino.models.weights.load import load_backbone
from xcit_dino.models.zoo import create_model
from xcit_dino.report.page import Tile
from xcit_dino.report.provenance import known_options
from xcit_dino.train.distributed import dist
from xcit_dino.train.run.reader import Run
from xcit_dino.train.state import newest_checkpoint

COMPUTED = 1e12  # multiplications that the features of one network may cost: half a minute or so
FEWEST, MOST = 48, 400  # images, whatever they cost


class Images:
    """What the pictures are made from; read when it is first needed."""

    def __init__(self, run: Run, show_channels: tuple[int, ...] = ()):
        self.run, self.show_channels = run, show_channels
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

    @property
    def labeled(self) -> bool:
        """Whether training images have classes."""
        return bool(self.train.labels.max() >= 0)

    @cached_property
    def found(self) -> neighbors.Neighbors:
        """Classified validation images.

        Raises:
            InputError: see :func:`neighbors.classify`.
        """
        return neighbors.classify(self.context, self.train, self.val)

    @cached_property
    def context(self) -> Context:
        """How evaluations of the run's network read images; unreadable ones are skipped."""
        options = EvalTargetConfig(self.run.folder, num_workers=0, max_bad_fraction=1.0)
        settings = InputSettings.from_run(self.options)
        data_path = self.options.get("data_path") or ""
        world = dist.World(0, 1, torch.device("cpu"))
        context = make_context(options, settings, self.options, data_path, world)
        check_shown(self.show_channels, context)
        return replace(context, show_channels=self.show_channels)

    @cached_property
    def network(self) -> nn.Module:
        """The run's newest network, in evaluation mode.

        Raises:
            InputError: there is no checkpoint.
        """
        weights = newest_checkpoint(self.run.folder)
        if weights is None:
            raise InputError("no whole checkpoint in the run folder")
        return self.network_of(weights)

    def network_of(self, weights: Path) -> nn.Module:
        """The network of a checkpoint, in evaluation mode."""
        channels = self.context.inputs.channels
        model = create_model(self.options["arch"], num_classes=0, in_chans=channels)
        load_backbone(weights, model)
        return model.eval()

    @cached_property
    def untrained(self) -> nn.Module:
        """The same architecture with random weights, in evaluation mode."""
        return random_network(self.options["arch"], self.context.inputs.channels).model

    def affordable(self, network: nn.Module) -> int:
        """Images of which features are computed for the report, so that it stays quick."""
        stride, crop = stride_of(network), self.context.crop
        parameters = sum(p.numel() for p in network.parameters())
        cost = parameters * max(1, crop // stride) ** 2  # multiplications of a transformer
        return min(max(int(COMPUTED / cost), FEWEST), MOST)

    def embed(self, network: nn.Module) -> EmbeddedSubset:
        """Features of evenly spaced training images."""
        with torch.inference_mode():
            count = self.affordable(network)
            return embed_subset(self.context, self.train, network, count, "report")

    @cached_property
    def embedded(self) -> EmbeddedSubset:
        """Those of the run's newest network."""
        return self.embed(self.network)

    def photos(self, index: ShardIndex, samples: Sequence[int]) -> dict[int, Any]:
        """Sample number -> picture, of the readable ones."""
        return self._readable(render.photos, index, samples)

    def views(self, index: ShardIndex, samples: Sequence[int]) -> dict[int, Any]:
        """Sample number -> [H, W, C] in the set's own units, of the readable ones."""
        return self._readable(render.views, index, samples)

    def _readable(
        self, read: Callable[..., dict[int, Any]], index: ShardIndex, samples: Sequence[int]
    ) -> dict[int, Any]:
        found = read(index, samples, self.context)
        self.unreadable |= {(index.checksum, n) for n in samples if n not in found}
        return found

    def name(self, label: int) -> str:
        """The name of a class."""
        classes = self.train.classes or self.val.classes
        return classes[label] if classes and label < len(classes) else f"class {label}"


def wide_tile(pixels: render.Pixels, caption: str) -> Tile:
    """A tile that keeps the shape of a frame."""
    return Tile(render.data_uri(pixels, render.WIDE), caption, "wide smooth")


def tile(pixels: render.Pixels, caption: str, style: str = "") -> Tile:
    """A tile of the page; small images are enlarged pixel by pixel, photos smoothly."""
    smooth = " smooth" if len(pixels) > render.SMALL else ""
    return Tile(render.data_uri(pixels), caption, f"{style}{smooth}".strip())
