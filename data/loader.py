"""Plan -> micro-batches of crops in the set's own dtype, in the plan's order, without end.

Worker processes (workers.py) fill slots of shared memory (ring.py); under CUDA the slots are
page-locked and copied to the device on a side stream, so a crop is written once, by the resize,
and copied once, to the GPU.

An unreadable sample is replaced, never dropped: shapes stay as they are and no other sample moves.
Its substitute is drawn from (seed, epoch, sample), not from the micro-batch, so that the global
batch is the same on any layout; :attr:`Batch.sources` holds the sample each place was read from.

A slot is filled again only after its micro-batch has been released: tensors in host memory may be
used until the step after the next is requested; tensors on a device belong to the caller.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcit_dino.data.batch import Batch, Copier
from xcit_dino.data.config import CropsConfig, LoaderConfig
from xcit_dino.data.gpu_crops import DeviceCropper, EncodedWork
from xcit_dino.data.io.cache import ReadAhead
from xcit_dino.data.io.storage import CachedSource, open_source
from xcit_dino.data.packed import Packed, to_device
from xcit_dino.data.plan import Plan, rank_slice
from xcit_dino.data.quarantine import Quarantine
from xcit_dino.data.ring import Ring
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.data.workers import (
    SUBSTITUTES,
    CropWork,
    Done,
    HostTransform,
    ImageWork,
    Task,
    run_tasks,
)
from xcit_dino.errors import InputError


class CropLoader:
    """Iterates over the optimizer steps from ``start_step`` on, without end.

    Yields, for each step, the list of this rank's ``accum`` micro-batches.

    Args:
        index: of the shards.
        plan: order of the samples; its batch size is the global one.
        crops: geometry, or (first epoch, geometry) of each stage of the training.
        config: workers, limits, where the shards are.
        rank, world_size, accum: this rank's part of every global batch.
        start_step: the first step to yield.
        device: where the tensors go; on the CPU they stay in shared memory.
        run_folder: for ``quarantine.jsonl``.
        host_transform: called in the worker on the crops of every micro-batch.
        recipes: draws a micro-batch's augmentation, which is attached to it.
        labeled: an image without a label counts as unreadable.

    Attributes:
        wait_seconds: total time the caller has waited for data.

    Raises:
        InputError: the global batch cannot be split evenly; too many bad samples.
    """

    def __init__(
        self,
        index: ShardIndex,
        plan: Plan,
        crops: CropsConfig | Sequence[tuple[int, CropsConfig]],
        config: LoaderConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        accum: int = 1,
        start_step: int = 0,
        device: torch.device | str | None = None,
        run_folder: Path | None = None,
        host_transform: HostTransform | None = None,
        recipes: Callable[[Batch], Packed] | None = None,
        labeled: bool = False,
    ) -> None:
        if plan.batch_size % (world_size * accum):
            raise InputError(
                f"the global batch of {plan.batch_size} cannot be split evenly over {world_size} "
                f"ranks x {accum} micro-batches; change --batch_size_per_gpu or the accumulation"
            )
        assert config.decoder == "host" or host_transform is None, "it works on the host's pixels"
        if config.decoder == "cuda" and torch.device(device or "cpu").type != "cuda":
            raise InputError("--decoder cuda needs CUDA; use --decoder host")
        open_source(index, config)  # refuses options that conflict
        self.form = index.pixels.select(config.bands)
        if config.decoder == "cuda" and not self.form.is_rgb8:
            raise InputError(
                f"--decoder cuda: decodes 8-bit RGB only, and {index.root} holds "
                f"{index.pixels.name}; use --decoder host"
            )
        self.index, self.plan, self.config = index, plan, config
        self.stages = [(0, crops)] if isinstance(crops, CropsConfig) else list(crops)
        self.rank, self.world_size, self.accum = rank, world_size, accum
        self.start_step = start_step
        self.host_transform, self.recipes, self.labeled = host_transform, recipes, labeled
        self.device = torch.device(device or "cpu")
        self.wait_seconds = 0.0
        self.quarantine = Quarantine(
            run_folder,
            rank=rank,
            num_samples=index.num_samples,
            max_bad_fraction=config.max_bad_fraction,
        )

    def __iter__(self) -> Generator[list[Batch]]:
        firsts = [epoch * self.plan.steps_per_epoch for epoch, _ in self.stages]
        ends = [*firsts[1:], sys.maxsize]
        for (epoch, crops), first, end in zip(self.stages, firsts, ends, strict=True):
            start = max(first, self.start_step)
            if start >= end:
                continue
            if len(self.stages) > 1 and self.rank == 0:
                print(f"epoch {epoch + 1} and later: {crops.sizes}", flush=True)
            yield from self._steps(crops, start, end)

    def _steps(self, crops: CropsConfig, start: int, end: int) -> Generator[list[Batch]]:
        """The steps of a stage, with workers and memory of its own."""
        on_device = self.config.decoder == "cuda"
        in_flight = self.config.num_workers * self.config.prefetch_factor
        size = self.plan.batch_size // (self.world_size * self.accum)
        num_slots = 1 if on_device else in_flight + 2 * self.accum
        ring = Ring(num_slots, slot_shapes(crops, size, self.form.channels), self.form)
        source = open_source(self.index, self.config)
        kind = EncodedWork if on_device else CropWork
        work = kind(
            self.index, source, ring, crops, self.plan.seed, self.host_transform, self.labeled,
            self.config.bands,
        )  # fmt: skip
        crops_of: Callable[[Done], tuple[Done, Tensor, Tensor]] = partial(_in_ring, ring)
        copier = None
        if on_device:
            host = CropWork(self.index, source, ring, crops, self.plan.seed)
            crops_of = DeviceCropper(host, self.device)
        elif self.device.type == "cuda":
            copier = Copier(self.device)
        steps = range(start, end)
        tasks = self._tasks(num_slots, steps)
        cache = source.cache if isinstance(source, CachedSource) else None
        with (
            closing(run_tasks(work, tasks, self.config, ring, pin=copier is not None)) as results,
            ReadAhead(cache, self.plan) as read_ahead,
        ):
            for _ in steps:
                begin = time.perf_counter()
                step = [self._batch(*crops_of(next(results))) for _ in range(self.accum)]
                self.wait_seconds += time.perf_counter() - begin
                if self.recipes is not None:
                    step = [replace(batch, recipes=self.recipes(batch)) for batch in step]
                read_ahead.reached(step[0].step)
                if self.device.type == "mps":
                    step = [batch.to(self.device) for batch in step]
                yield copier.copied(step) if copier else step

    def _tasks(self, num_slots: int, steps: Iterable[int]) -> Iterator[Task]:
        """This rank's micro-batches. With 2 x accum slots more than are in flight, a slot comes up
        again when the step before the last has been released."""
        number = 0
        for step in steps:
            batch = self.plan.batch(step)
            epoch = step // self.plan.steps_per_epoch
            for micro in range(self.accum):
                part = rank_slice(batch, self.rank, self.world_size, self.accum, micro)
                yield Task(number % num_slots, part, step, micro, epoch)
                number += 1

    def _batch(self, done: Done, global_crops: Tensor, local_crops: Tensor) -> Batch:
        record(self.quarantine, self.index, done)
        if (done.sources < 0).any():
            raise InputError(
                f"--data_path {self.index.root}: no image can be read in place of an unreadable "
                f"one, {SUBSTITUTES} tries in a row; the last: {done.bad[-1]}"
            )
        task = done.task
        labels = torch.from_numpy(self.index.labels[done.sources].astype(np.int64))
        return Batch(
            task.step, task.micro, task.epoch, task.samples, done.sources,
            to_device(labels, global_crops.device), global_crops, local_crops,
        )  # fmt: skip


class ImageLoader:
    """One pass over labeled images for feature extraction: resized, center-cropped, not augmented.

    Yields ([B, C, crop, crop] in the set's dtype, int64 labels [B], int64 sample numbers [B]); the
    images are valid until the batch after the next is requested. Unreadable images are skipped.

    Args:
        index: of the shards.
        config: workers, limits, where the shards are.
        resize: shorter side before the crop (256 for 224); None keeps an image's own size.
        crop: side of the central square.
        interpolation: bicubic or bilinear.
        batch_size: of this rank; the last batch may be smaller.
        indices: sample numbers to yield, in this order; None: all.
        rank, world_size: this rank yields every ``world_size``-th of them.
        labeled: an image without a label counts as unreadable.
    """

    def __init__(
        self,
        index: ShardIndex,
        config: LoaderConfig,
        *,
        resize: int | None = 256,
        crop: int = 224,
        interpolation: str = "bicubic",
        batch_size: int = 128,
        indices: NDArray[np.int64] | None = None,
        rank: int = 0,
        world_size: int = 1,
        run_folder: Path | None = None,
        labeled: bool = False,
    ) -> None:
        self.index, self.config, self.labeled = index, config, labeled
        self.resize, self.crop, self.batch_size = resize, crop, batch_size
        self.interpolation = interpolation
        self.form = index.pixels.select(config.bands)
        everything = np.arange(index.num_samples) if indices is None else np.asarray(indices)
        self.samples = everything[rank::world_size]
        self.quarantine = Quarantine(
            run_folder,
            rank=rank,
            num_samples=index.num_samples,
            max_bad_fraction=config.max_bad_fraction,
        )

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Generator[tuple[Tensor, Tensor, NDArray[np.int64]]]:
        in_flight = self.config.num_workers * self.config.prefetch_factor
        shape = (1, self.batch_size, self.crop, self.crop, self.form.channels)
        ring = Ring(in_flight + 2, [shape], self.form)
        source = open_source(self.index, self.config)
        work = ImageWork(
            self.index, source, ring, self.resize, self.crop, self.labeled, self.interpolation,
            self.config.bands,
        )  # fmt: skip
        with closing(run_tasks(work, self._tasks(ring.num_slots), self.config, ring)) as results:
            for done in results:
                record(self.quarantine, self.index, done)
                images = ring.views(done.task.slot)[0][0, : len(done.task.samples)]
                readable = done.sources >= 0
                samples = done.task.samples[readable]
                images = images if readable.all() else images[torch.from_numpy(readable)]
                yield images, torch.from_numpy(self.index.labels[samples].astype(np.int64)), samples

    def _tasks(self, num_slots: int) -> Iterator[Task]:
        for number, first in enumerate(range(0, len(self.samples), self.batch_size)):
            yield Task(number % num_slots, self.samples[first : first + self.batch_size])


def _in_ring(ring: Ring, done: Done) -> tuple[Done, Tensor, Tensor]:
    global_crops, local_crops = ring.views(done.task.slot)
    return done, global_crops, local_crops


def record(quarantine: Quarantine, index: ShardIndex, done: Done) -> None:
    """Quarantine a worker's bad samples; raises InputError when there are too many."""
    for sample, key, reason in done.bad:
        quarantine.add(sample, index.shards[index.locate(sample)[0]], key, reason)


def slot_shapes(crops: CropsConfig, size: int, channels: int = 3) -> list[tuple[int, ...]]:
    """What a slot of the ring holds for ``size`` samples."""
    G, S = crops.global_crops_number, crops.global_crops_size
    L, s = crops.local_crops_number, crops.local_crops_size
    return [(G, size, S, S, channels), (L, size, s, s, channels)]
