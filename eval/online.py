"""k-NN while pretraining goes on: a fixed subset, all ranks together, nothing of the training
disturbed. ``xcit-dino pretrain`` is pretraining with it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from xcit_dino.data.index import ShardIndex, resolve_split
from xcit_dino.errors import InputError
from xcit_dino.eval.config import SubjectConfig
from xcit_dino.eval.features import blocks_of, evaluating, num_classes_of, output_batches
from xcit_dino.eval.gallery import spread
from xcit_dino.eval.knn import knn_hits
from xcit_dino.eval.online_pictures import Embedded, OnlinePictures
from xcit_dino.eval.subject import Subject, geometry
from xcit_dino.ssl import pretrain as dino
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.train import dist, stop
from xcit_dino.train.precision import resolve_precision

BANK, QUERIES = 20_000, 4_000  # images, spread evenly over the splits
K, TEMPERATURE = 20, 0.07
Evaluate = Callable[[nn.Module, int], dict[str, Any]]
"""(backbone, epochs done) -> numbers to log, and arrays for TensorBoard."""


def main(config: PretrainConfig) -> None:
    """``xcit-dino pretrain``: :func:`pretrain` with signals that save before they end it."""
    stop.install(signal.SIGTERM, signal.SIGINT)
    try:
        pretrain(config)
    finally:
        dist.shutdown()


def pretrain(config: PretrainConfig) -> None:
    """:func:`xcit_dino.ssl.pretrain.pretrain`, with k-NN every ``--knn_every`` epochs."""
    world = dist.init(config.run.device)
    evaluations = []
    for name, data_path in (
        ("knn", config.loader.data_path),
        ("knn_other", config.online.knn_data_path),
    ):
        if config.online.knn_every and data_path is not None:
            evaluation = online_knn(
                data_path,
                crop=config.crops.global_crops_size,
                every=config.online.knn_every,
                num_workers=config.loader.num_workers,
                cache_dir=config.loader.cache_dir,
                precision=config.run.precision,
                device=world.device,
                name=name,
                pictures=config if name == "knn" else None,
            )
            evaluations += [evaluation] if evaluation else []

    def evaluate(backbone: nn.Module, epoch: int) -> dict[str, Any]:
        return {k: v for each in evaluations for k, v in each(backbone, epoch).items()}

    dino.pretrain(config, evaluate if evaluations else None)


def online_knn(
    data_path: str | Path,
    *,
    crop: int,
    every: int = 1,
    batch_size: int = 128,
    num_workers: int = 0,
    cache_dir: Path | None = None,
    precision: str = "fp32",
    device: torch.device | None = None,
    name: str = "knn",
    pictures: PretrainConfig | None = None,
) -> Evaluate | None:
    """What ``pretrain`` calls at epoch ends: (teacher's backbone, epochs done) -> metrics to log.

    Args:
        data_path: shards; the bank comes from train, the queries from val.
        crop: the run's global_crops_size.
        every: epochs between evaluations.
        device: where the network lies.
        name: what the metrics' names begin with.
        pictures: the run whose crops, attention and neighbours are to be shown too.

    Returns:
        None where no accuracy can be had: no validation split, or images without labels.
    """
    try:
        train, val = (ShardIndex.load(resolve_split(data_path, s)) for s in ("train", "val"))
        classes = num_classes_of(train, val)
    except InputError as reason:
        if dist.is_main():
            print(f"no k-NN during pretraining: {reason}", flush=True)
        return None
    config = SubjectConfig(
        batch_size_per_gpu=batch_size,
        num_workers=num_workers,
        cache_dir=cache_dir,
        precision=precision,  # type: ignore
    )
    resize, crop = geometry(config, crop)
    subject = Subject("", Path(), None, str(data_path), resize, crop)
    device = device or torch.device("cpu")
    draw = OnlinePictures(pictures, subject, cache_dir, device) if pictures else None
    return OnlineKnn(train, val, classes, subject, config, every, device, name, draw)


@dataclass(frozen=True)
class OnlineKnn:
    """The callable; see :func:`online_knn`."""

    train: ShardIndex
    val: ShardIndex
    num_classes: int
    subject: Subject
    config: SubjectConfig
    every: int
    device: torch.device
    name: str = "knn"
    draw: OnlinePictures | None = None

    def __call__(self, backbone: nn.Module, epoch: int) -> dict[str, Any]:
        """``NAME_top1`` and ``NAME_top5`` in percent at k = 20, and pictures; nothing in epochs
        between."""
        if epoch % self.every:
            return {}
        with evaluating(backbone), torch.inference_mode():
            bank = self._embedded(backbone, self.train, BANK)
            queries = self._embedded(backbone, self.val, QUERIES)
            drawn = self.draw(backbone, epoch, bank, queries) if self.draw else {}
        k = min(K, len(bank.labels))
        hits = knn_hits(
            bank.features, bank.labels, queries.features, queries.labels, [k], TEMPERATURE,
            self.num_classes, gpu=self.device.type == "cuda",
        )  # fmt: skip
        top1, top5 = (100 * hits[0] / len(queries.labels)).tolist()
        return {f"{self.name}_top1": top1, f"{self.name}_top5": top5} | drawn

    def _embedded(self, backbone: nn.Module, index: ShardIndex, most: int) -> Embedded:
        """Features of the readable images of the subset, on every rank."""
        chosen = spread(index.num_samples, most)
        count = len(chosen)
        world, rank = (
            dist.world_size(),
            torch.distributed.get_rank() if dist.world_size() > 1 else 0,
        )
        side = self.subject.crop
        probe = blocks_of(backbone, torch.zeros(1, 3, side, side, device=self.device))["cls"]
        # the last column says that the image was read
        table = torch.zeros(count, probe.shape[1] + 1, device=self.device)
        dtype = resolve_precision(self.config.precision, self.device)
        for blocks, samples in output_batches(
            partial(blocks_of, backbone), index, self.subject, self.config, self.device, dtype,
            chosen[rank::world], "k-NN",
        ):  # fmt: skip
            rows = np.searchsorted(chosen, samples)
            table[rows, :-1], table[rows, -1] = blocks["cls"], 1
        if world > 1:
            torch.distributed.all_reduce(table)
        found = table.cpu().numpy()
        seen = found[:, -1] > 0
        samples = chosen[seen]
        return Embedded(index, samples, found[seen, :-1], index.labels[samples].astype(np.int64))
