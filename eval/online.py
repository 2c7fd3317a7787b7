"""k-NN during pretraining: on a fixed subset, by all ranks together, without affecting the
training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from xcit_dino.data.native.scaling import check_same_form
from xcit_dino.data.shards.index import ShardIndex, resolve_split
from xcit_dino.errors import InputError
from xcit_dino.eval.config import EvalTargetConfig
from xcit_dino.eval.context import Context, make_context
from xcit_dino.eval.features import count_classes, eval_mode, feature_blocks
from xcit_dino.eval.knn import knn_hits
from xcit_dino.eval.neighbors import evenly_spaced
from xcit_dino.eval.pictures.false_color import check_shown
from xcit_dino.eval.pictures.online import EmbeddedSubset, OnlinePictures
from xcit_dino.eval.pictures.render import TrainingCrops
from xcit_dino.inputs import InputSettings
from xcit_dino.train.distributed import dist

BANK, QUERIES = 20_000, 4_000  # images, evenly spaced over the splits
K, TEMPERATURE = 20, 0.07
Evaluate = Callable[[nn.Module, int], dict[str, Any]]
"""(backbone, epochs done) -> metrics to log, and arrays for TensorBoard."""


def online_knn(
    data_path: str | Path,
    run: dict[str, Any],
    world: dist.World,
    *,
    every: int = 1,
    name: str = "knn",
    pictures: TrainingCrops | None = None,
    show_channels: tuple[int, ...] = (),
) -> OnlineKnn | None:
    """The evaluation that ``pretrain`` calls at epoch ends: (teacher's backbone, epochs done) ->

    Args:
        data_path: shards; the bank is from train, the queries are from val.
        run: the options of the pretraining, as in config.yaml.
        every: epochs between evaluations.
        name: prefix of the metrics' names.
        pictures: also show crops made like this, attention and neighbors.
        show_channels: of these, as red, green and blue.

    Returns:
        None if no accuracy can be computed: no validation split, or images without labels.
    """
    if reason := dist.from_main(lambda: unavailable_reason(data_path)):  # on all ranks alike
        if dist.is_main():
            print(f"no k-NN during pretraining: {reason}", flush=True)
        return None
    train, val, classes = labeled_splits(data_path)
    context = online_context(run, data_path, world)
    few = replace(context.loader, num_workers=0)
    shown = replace(context, loader=few, show_channels=show_channels)
    check_shown(show_channels, shown)
    draw = OnlinePictures(pictures, shown) if pictures else None
    return OnlineKnn(train, val, classes, context, every, name, draw)


def online_context(run: dict[str, Any], data_path: str | Path, world: dist.World) -> Context:
    """How images reach the network in an evaluation between two steps of a run."""
    given = {name: run[name] for name in ("num_workers", "precision") if name in run}
    context = make_context(
        EvalTargetConfig(**given), InputSettings.from_run(run), run, data_path, world
    )
    # unreadable images are skipped, and counted: they are for the training to stop at
    return replace(context, loader=replace(context.loader, max_bad_fraction=1.0))


def labeled_splits(data_path: str | Path) -> tuple[ShardIndex, ShardIndex, int]:
    """Training and validation shards, and the number of their classes.

    Raises:
        InputError: one is missing, or has no labels.
    """
    train, val = (ShardIndex.load(resolve_split(data_path, s)) for s in ("train", "val"))
    check_same_form(train, val)
    return train, val, count_classes(train, val)


def unavailable_reason(data_path: str | Path) -> str:
    """Why no accuracy can be computed from these shards; "" if it can."""
    try:
        labeled_splits(data_path)
    except InputError as reason:
        return str(reason)
    return ""


@dataclass(frozen=True)
class OnlineKnn:
    """The callable; see :func:`online_knn`. A failure on one rank is raised on all."""

    train: ShardIndex
    val: ShardIndex
    num_classes: int
    context: Context
    every: int
    name: str = "knn"
    draw: OnlinePictures | None = None

    def of_teacher(self) -> OnlineKnn:
        """The same for a frozen teacher, as ``knn_frozen_top1``: no pictures."""
        return replace(self, name=self.name.replace("knn", "knn_frozen", 1), draw=None)

    def __call__(self, backbone: nn.Module, epoch: int) -> dict[str, Any]:
        """``NAME_top1`` and ``NAME_top5`` in percent at k = 20, and pictures; {} in epochs
        in between."""
        if epoch % self.every:
            return {}
        with eval_mode(backbone), torch.inference_mode():
            embed = partial(embed_subset, self.context, label="k-NN", labeled=True)
            bank = embed(self.train, backbone, BANK)
            queries = embed(self.val, backbone, QUERIES)
            with dist.together():
                drawn = self.draw(backbone, epoch, bank, queries) if self.draw else {}
                accuracies = self._accuracies(bank, queries)
        return accuracies | drawn

    def _accuracies(self, bank: EmbeddedSubset, queries: EmbeddedSubset) -> dict[str, float]:
        k = min(K, len(bank.labels))
        hits = knn_hits(
            bank.features, bank.labels, queries.features, queries.labels, [k], TEMPERATURE,
            self.num_classes, gpu=self.context.device.type == "cuda",
        )  # fmt: skip
        top1, top5 = (100 * hits[0] / len(queries.labels)).tolist()
        return {f"{self.name}_top1": top1, f"{self.name}_top5": top5}


def embed_subset(
    context: Context,
    index: ShardIndex,
    backbone: nn.Module,
    most: int,
    label: str,
    *,
    labeled: bool = False,
) -> EmbeddedSubset:
    """Features of the readable images of a fixed subset, on every rank.

    Args:
        backbone: in evaluation mode.
        most: images, spread evenly over the split.
        label: of the progress bar.
        labeled: images without a label do not count.

    Raises:
        InputError: there are none.
    """
    chosen = evenly_spaced(index.num_samples, most)
    world = dist.world_size()
    with dist.together():
        probe = feature_blocks(backbone, context.blank())["cls"]
        # the last column marks images that were read
        table = probe.new_zeros(len(chosen), probe.shape[1] + 1, dtype=torch.float32)
        for blocks, samples in context.batches(
            partial(feature_blocks, backbone), index, chosen[dist.rank() :: world], label, labeled
        ):
            rows = np.searchsorted(chosen, samples)
            table[rows, :-1], table[rows, -1] = blocks["cls"], 1
    if world > 1:
        torch.distributed.all_reduce(table)
    found = table.cpu().numpy()
    seen = found[:, -1] > 0
    if not seen.any():
        raise InputError(f"{index.root}: none of {len(seen)} images can be read")
    if not seen.all() and dist.is_main():
        print(f"{label}: {(~seen).sum()} of {len(seen)} images of {index.root} cannot be read")
    samples = chosen[seen]
    return EmbeddedSubset(index, samples, found[seen, :-1], index.labels[samples].astype(np.int64))
