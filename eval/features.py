"""Features of all images of a split, extracted once to disk and memory-mapped.

They are in ``RUN/features/NETWORK-SPLIT-KEY/``: one float32 ``.npy`` per *block* (``cls``,
``patch``, ``cls2``, on request ``deep``), ``seen.npy`` (0 if the image could not be read) and
``meta.json``. KEY is a hash of everything that affects them (weights, network, index checksum,
input settings, precision); features with ``deep`` are a set of their own, NETWORK+deep-SPLIT-KEY.
Every rank writes its own rows; the folder gets its name when all are done
(``eval/feature_cache.py``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit_dino.data.shards.index import ShardIndex, sparse_labels
from xcit_dino.data.targets.checks import SEVERAL, check_labels
from xcit_dino.data.targets.several import target_table
from xcit_dino.errors import InputError
from xcit_dino.eval.context import Context
from xcit_dino.eval.feature_cache import CachedFeatures
from xcit_dino.eval.ranges import OutputRange, warn_constant
from xcit_dino.eval.target import Network
from xcit_dino.train.amp import resolve_precision
from xcit_dino.train.async_copy import HostCopy
from xcit_dino.train.distributed import dist

FORMAT = 2
LAYERS = {  # feature sets of a linear probe -> blocks, concatenated
    "cls": ("cls",),
    "cls+patch": ("cls", "patch"),
    "cls2": ("cls", "cls2"),
    "cls2+patch": ("cls", "cls2", "patch"),
    "deep": ("cls", "cls2", "patch", "deep"),
}
DEEP = 4  # cross-covariance blocks; DINO and DINOv2 probe as many of a ViT


@dataclass(frozen=True)
class Features:
    """Features and labels of the readable, labeled images of a split, in index order."""

    blocks: dict[str, np.ndarray]
    """Block name -> float32 [N, D], memory-mapped."""
    labels: np.ndarray
    """int64 [N]; of images with several labels uint8 [N, C], 1 where an image has one; of values
    float64 [N, C]."""
    num_classes: int
    unreadable: int
    """Images skipped because they could not be decoded or have no label."""
    cache: CachedFeatures | None = None
    """Prevents other commands from removing the files."""

    def __len__(self) -> int:
        return len(self.labels)


def wants_deep(layers: Iterable[str]) -> bool:
    """Whether feature sets have the block ``deep``."""
    return any("deep" in LAYERS.get(each, ()) for each in layers)


def feature_blocks(model: nn.Module, images: Tensor, deep: bool = False) -> dict[str, Tensor]:
    """Feature blocks of a batch, each (B, D).

    ``cls`` is the network's output (XCiT: class token after the last norm). XCiT adds ``patch``,
    the mean patch token, and ``cls2``, the class token one class-attention layer earlier, both
    after the same norm; with ``deep`` also the mean patch tokens of the last four cross-covariance
    blocks, normalized without weights, as (B, 4 D): these have no class token, whose last four
    DINO concatenates for ViTs (``eval_linear.py --n_last_blocks 4``).
    """
    if not hasattr(model, "get_intermediate"):
        return {"cls": model(images)}
    maps: dict[int, Tensor] | None = {} if deep else None
    (earlier, _), (cls, patch) = model.get_intermediate(images, 2, maps)  # type: ignore[operator]
    blocks = {"cls": cls, "patch": patch, "cls2": earlier}
    if maps:
        last = [maps[number].flatten(2).transpose(1, 2) for number in sorted(maps)[-DEEP:]]
        normed = [F.layer_norm(tokens, tokens.shape[-1:]).mean(1) for tokens in last]
        blocks["deep"] = torch.cat(normed, dim=1)
    return blocks


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards modules and random generators are as before.

    During pretraining DINO's teacher is in training mode, in which its batch-norms collect the
    statistics used here.
    """
    modes = {module: module.training for module in model.modules()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training


def count_classes(*indexes: ShardIndex) -> int:
    """Number of classes of labeled splits of one data set.

    Raises:
        InputError: no image has a label, or their class lists differ.
    """
    for index in indexes:
        check_labels(index)
    lists = [index.classes for index in indexes if index.classes]
    if any(classes != lists[0] for classes in lists):
        raise InputError(
            f"--data_path: {' and '.join(i.root for i in indexes)} have different class names; "
            "pack both with one label map"
        )
    for index in indexes:
        if gaps := sparse_labels(index.labels):
            raise InputError(
                f"--data_path {index.root}: {gaps}; number the classes from 0 on, where they are "
                "packed with --label_map"
            )
    highest = max(int(index.labels.max()) + 1 for index in indexes)
    return max([highest, *(len(classes) for classes in lists)])


def kind_of_labels(*indexes: ShardIndex) -> dict[str, str]:
    """What the images of the splits have in place of one label, for the protocol; empty of one
    label each."""
    kinds = {index.targets for index in indexes} & set(SEVERAL)
    return {"labels": "values" if "values" in kinds else "several an image"} if kinds else {}


def count_labels(*indexes: ShardIndex) -> int:
    """Number of labels, or values, of splits whose images have several each.

    Raises:
        InputError: the splits have different ones.
    """
    kinds = {index.targets for index in indexes}
    if len(kinds) > 1:
        raise InputError(
            f"--data_path: {' and '.join(i.root for i in indexes)} have different kinds of labels; "
            "pack both alike"
        )
    lists = [index.target_classes or [] for index in indexes]
    if any(classes != lists[0] for classes in lists):
        raise InputError(
            f"--data_path: {' and '.join(i.root for i in indexes)} have different labels; pack "
            "both from one table"
        )
    return len(lists[0])


def load_features(
    network: Network, index: ShardIndex, split: str, context: Context, deep: bool = False
) -> Features:
    """Load features and labels of a split, to compute accuracies; see :func:`cached_features`."""
    cache = cached_features(network, index, split, context, deep)
    if index.targets not in SEVERAL:
        labels = np.asarray(index.labels, dtype=np.int64)
        return _open(cache, index, labels, labels >= 0, count_classes(index))
    table, known = target_table(index, context.loader)
    return _open(cache, index, table, known, count_labels(index))


def cached_features(
    network: Network, index: ShardIndex, split: str, context: Context, deep: bool = False
) -> CachedFeatures:
    """Features of all readable images of a split, labeled or not: from the run folder's cache, or
    computed by all ranks and cached. deep: see :func:`feature_blocks`.

    Raises:
        InputError: they are not finite.
    """
    dtype = resolve_precision(context.precision, context.device)
    facts = (
        network.facts
        | context.protocol
        | {
            "format": FORMAT,
            "index": index.checksum,
            "precision": str(dtype).removeprefix("torch."),
        }
    )
    facts |= {"deep": DEEP} if deep else {}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    folder, name = context.output_dir / "features", network.name + "+deep" * deep
    cache = CachedFeatures(folder / f"{name}-{split}-{key}")
    while cache.claim():
        try:
            constant = _compute(network, index, split, context, cache.unfinished, deep).constant()
        except BaseException:
            cache.abandon()
            raise
        if context.world.is_main:
            cache.publish(facts | {"constant": constant})
        dist.barrier()
    if context.world.is_main and cache.facts().get("constant"):
        warn_constant(f"{split} features ({network.name})")
    return cache


def _compute(
    network: Network, index: ShardIndex, split: str, context: Context, folder: Path, deep: bool
) -> OutputRange:
    """Compute features of this rank's part of the images and write its rows."""
    world, model, count = context.world, network.model.to(context.device), index.num_samples
    with torch.inference_mode():
        function = partial(feature_blocks, model, deep=deep)
        shapes = function(context.blank())
        ranges = OutputRange(shapes["cls"].shape[1], context.device)
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for name, block in shapes.items():
                Rows.create(folder / f"{name}.npy", (count, block.shape[1]), np.float32)
            Rows.create(folder / "seen.npy", (count,), np.uint8)
        dist.barrier()
        rows = {name: Rows(folder / f"{name}.npy") for name in (*shapes, "seen")}
        first, last = (count * (world.rank + i) // world.size for i in (0, 1))
        label = f"features {network.name} {split}"
        batches = context.batches(function, index, np.arange(first, last), label, labeled=False)
        for copied, samples in one_behind(batches, lambda blocks: ranges.add(blocks["cls"])):
            for name, block in copied.items():
                rows[name].write(samples, block.numpy())
            rows["seen"].write(samples, np.ones(len(samples), np.uint8))
    for file in rows.values():
        file.close()
    dist.barrier()
    return ranges


Batches = Iterable[tuple[dict[str, Tensor], np.ndarray]]


def one_behind(batches: Batches, seen: Callable[[dict[str, Tensor]], None]) -> Batches:
    """The same batches in host memory, each once the next one is queued, so that a GPU computes
    while the host writes; ``seen`` is called with each on the device."""
    copies = cycle((HostCopy(), HostCopy()))
    queued: list[tuple[HostCopy, np.ndarray]] = []
    for blocks, samples in batches:
        queued.append((next(copies).take(blocks), samples))
        seen(blocks)
        if len(queued) == 2:
            copy, numbers = queued.pop(0)
            yield copy.ready(), numbers
    for copy, numbers in queued:
        yield copy.ready(), numbers


def _open(
    cache: CachedFeatures, index: ShardIndex, labels: np.ndarray, known: np.ndarray, classes: int
) -> Features:
    blocks = {p.stem: np.load(p, mmap_mode="c") for p in sorted(cache.path.glob("*.npy"))}
    kept = np.flatnonzero(blocks.pop("seen") & known)
    unreadable = len(labels) - len(kept)
    if unreadable:
        if dist.is_main():
            print(
                f"{index.root}: {unreadable:,} of {len(labels):,} images skipped: unreadable, or "
                "without a label",
                flush=True,
            )
        blocks = {name: block[kept] for name, block in blocks.items()}
        labels = labels[kept]
    return Features(blocks, labels, classes, unreadable, cache)


class Rows:
    """Rows of an ``.npy`` file written by several processes, each its own.

    Plain writes at byte offsets instead of a shared memory map: two machines that map the same page
    of a network file would overwrite each other's half.
    """

    def __init__(self, path: Path):
        array = np.load(path, mmap_mode="r")
        self.dtype, self.offset = array.dtype, array.offset  # type: ignore[attr-defined]
        self.row_bytes = array.dtype.itemsize * int(np.prod(array.shape[1:]))
        self.file = os.open(path, os.O_WRONLY)

    @staticmethod
    def create(path: Path, shape: tuple[int, ...], dtype: Any) -> None:
        """Create a file of zeros."""
        np.lib.format.open_memmap(path, "w+", dtype, shape).flush()

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Write ``values`` [n, ...] to rows ``rows`` [n], consecutive ones in one call."""
        values = np.ascontiguousarray(values, self.dtype)
        cuts = np.flatnonzero(np.diff(rows) != 1) + 1
        for numbers, part in zip(np.split(rows, cuts), np.split(values, cuts), strict=True):
            if len(numbers):
                os.pwrite(self.file, part.tobytes(), self.offset + int(numbers[0]) * self.row_bytes)

    def close(self) -> None:
        """Flush to disk."""
        os.fsync(self.file)
        os.close(self.file)
