"""Images with their targets (masks, boxes): read together, transformed together, by the plan.

For trainings and evaluations with masks or boxes, whose transforms change both, and for evaluations
of whole images. What ``data/loader.py`` is for crops: order and substitutes of unreadable samples
depend on (seed, epoch, sample) alone, so that a run resumes exactly on any number of workers and
ranks. Samples come from the workers as numpy arrays of any size; the method collates them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.decode.rgb import BadImage, Scratch, decode, read_header
from xcit_dino.data.io.remote import Unreadable
from xcit_dino.data.io.storage import Source, open_source, read_key
from xcit_dino.data.native.crops import NativeImages
from xcit_dino.data.plan import Plan, rank_slice
from xcit_dino.data.quarantine import Quarantine
from xcit_dino.data.ring import Ring
from xcit_dino.data.rng import random_bits
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.data.targets.checks import require_targets
from xcit_dino.data.targets.formats import check_target, counts, decode_target
from xcit_dino.data.workers import SUBSTITUTE_STREAM, SUBSTITUTES, Task, run_tasks
from xcit_dino.errors import InputError, warn

CHUNK = 64  # targets read at a time


class Key(NamedTuple):
    """What all random choices for a sample depend on: ``random_uniforms(*key, STREAM, ...)``."""

    seed: int
    epoch: int
    sample: int


Pixels = NDArray[Any]
"""[H, W, C]: uint8, or the set's own type (``data/pixels.py``)."""
Transform = Callable[[Pixels, Any, Key], Any]
"""(the pixels, target, key) -> what the method needs of a sample, as numpy arrays; the target is a
:class:`Mask` or :class:`Boxes`, or None where none is read."""


@dataclass(frozen=True)
class TargetBatch:
    """One rank's micro-batch; see :class:`xcit_dino.data.batch.Batch`."""

    step: int
    micro: int
    epoch: int
    samples: NDArray[np.int64]
    sources: NDArray[np.int64]
    """The samples that were read: a substitute where one is unreadable."""
    items: list[Any]
    """What the transform returned for each."""


@dataclass(frozen=True)
class _Done:
    """A worker's result."""

    task: Task
    sources: NDArray[np.int64]  # -1: an unreadable sample without a substitute
    bad: list[tuple[int, str, str]]
    items: list[Any]


class TargetWork:
    """Reads and transforms the samples of a task, in a worker."""

    def __init__(
        self,
        index: ShardIndex,
        source: Source,
        transform: Transform,
        seed: int,
        substitute: bool,
        bands: Sequence[int] = (),
        targets: bool = True,
    ) -> None:
        self.index, self.source, self.transform = index, source, transform
        self.seed, self.substitute, self.targets = seed, substitute, targets
        self.scratch = Scratch()
        self.native = None if index.pixels.is_rgb8 else NativeImages(index.pixels, bands)
        self.classes = len(index.target_classes) if index.target_classes else None

    def __getitem__(self, task: Task) -> _Done:
        items, bad, sources = [], [], task.samples % self.index.num_samples
        for place, content in enumerate(self._many(sources)):
            sample, number = int(sources[place]), int(task.samples[place])
            item, reason = self._item(content, Key(self.seed, task.epoch, number))
            if reason:
                bad.append(self._bad(sample, reason))
                sources[place] = -1
                if self.substitute:
                    sources[place], item = self._other(task, number, bad)
            items.append(item)
        return _Done(task, sources, bad, items)

    def _many(self, samples: NDArray[np.int64]) -> list[tuple[Any, Any]]:
        """(image, target) of each, bytes or the reason why there are none."""
        places = [self.index.locate(int(s)) for s in samples]
        if not self.targets:
            return [(image, None) for image in self.source.read_many(places)]
        places += [self.index.locate_target(int(s)) for s in samples]
        found = self.source.read_many(places)
        return list(zip(found[: len(samples)], found[len(samples) :], strict=True))

    def _item(self, content: tuple[Any, Any], key: Key) -> tuple[Any, str]:
        """(the transformed sample, ""), or (None, the reason)."""
        image, target = content
        try:
            for part in (image, target):
                if isinstance(part, Unreadable):
                    raise part
            if not self.targets:
                return self.transform(self._pixels(image), None, key), ""
            if not target:
                raise BadImage(f"no {self.index.targets or 'target'}")
            pixels = self._pixels(image)
            assert self.index.targets is not None
            decoded = decode_target(self.index.targets, target)
            check_target(decoded, pixels.shape[0], pixels.shape[1], self.classes)
            return self.transform(pixels, decoded, key), ""  # pyright: ignore[reportArgumentType]
        except (Unreadable, BadImage) as reason:
            return None, str(reason)

    def _pixels(self, image: bytes) -> Pixels:
        if self.native is None:
            return decode(image, read_header(image), self.scratch)
        return self.native.pixels(image, self.native.header(image))

    def _bad(self, sample: int, reason: str) -> tuple[int, str, str]:
        shard, offset, _ = self.index.locate(sample)
        return sample, read_key(self.source, shard, offset), reason

    def _other(self, task: Task, number: int, bad: list[tuple[int, str, str]]) -> tuple[int, Any]:
        """A substitute for an unreadable sample: its number and item, or (-1, None)."""
        keys = (self.seed, SUBSTITUTE_STREAM, task.epoch, number, np.arange(SUBSTITUTES))
        candidates = random_bits(*keys) % np.uint64(self.index.num_samples)
        for candidate in candidates.astype(np.int64):
            (content,) = self._many(np.array([candidate]))
            item, reason = self._item(content, Key(self.seed, task.epoch, number))
            if not reason:
                return int(candidate), item
            bad.append(self._bad(int(candidate), reason))
        return -1, None


class TargetLoader:
    """Iterates over the optimizer steps from ``start_step`` on, without end: for each, the list of
    this rank's ``accum`` micro-batches. The arguments are those of
    :class:`xcit_dino.data.loader.CropLoader`.

    Raises:
        InputError: no targets in the shards; the global batch cannot be split evenly; too many bad
            samples.
    """

    def __init__(
        self,
        index: ShardIndex,
        plan: Plan,
        config: LoaderConfig,
        transform: Transform,
        *,
        rank: int = 0,
        world_size: int = 1,
        accum: int = 1,
        start_step: int = 0,
        run_folder: Path | None = None,
    ) -> None:
        require_targets(index)
        if plan.batch_size % (world_size * accum):
            raise InputError(
                f"the global batch of {plan.batch_size} cannot be split evenly over {world_size} "
                f"ranks x {accum} micro-batches; change --batch_size_per_gpu or the accumulation"
            )
        open_source(index, config)  # refuses options that conflict
        self.index, self.plan, self.config, self.transform = index, plan, config, transform
        self.rank, self.world_size, self.accum = rank, world_size, accum
        self.start_step, self.wait_seconds = start_step, 0.0
        self.quarantine = Quarantine(
            run_folder,
            rank=rank,
            num_samples=index.num_samples,
            max_bad_fraction=config.max_bad_fraction,
        )

    def __iter__(self) -> Generator[list[TargetBatch]]:
        source = open_source(self.index, self.config)
        work = TargetWork(
            self.index, source, self.transform, self.plan.seed, True, self.config.bands
        )
        with closing(_results(work, self._tasks(), self.config)) as results:
            while True:
                begin = time.perf_counter()
                step = [self._batch(next(results)) for _ in range(self.accum)]
                self.wait_seconds += time.perf_counter() - begin
                yield step

    def _tasks(self) -> Iterator[Task]:
        step = self.start_step
        while True:
            batch, epoch = self.plan.batch(step), step // self.plan.steps_per_epoch
            for micro in range(self.accum):
                part = rank_slice(batch, self.rank, self.world_size, self.accum, micro)
                yield Task(0, part, step, micro, epoch)
            step += 1

    def _batch(self, done: _Done) -> TargetBatch:
        record(self.quarantine, self.index, done.bad)
        if (done.sources < 0).any():
            raise InputError(
                f"--data_path {self.index.root}: no image can be read in place of an unreadable "
                f"one, {SUBSTITUTES} tries in a row; the last: {done.bad[-1]}"
            )
        task = done.task
        return TargetBatch(
            task.step, task.micro, task.epoch, task.samples, done.sources, done.items
        )


def one_pass(
    index: ShardIndex,
    config: LoaderConfig,
    transform: Transform,
    samples: Sequence[int] | NDArray[np.int64],
    run_folder: Path | None = None,
    targets: bool = True,
) -> Iterator[tuple[int, Any]]:
    """(sample number, transformed sample) of some samples in their order, for evaluations; those
    that are unreadable or have no target are quarantined and skipped, with a warning at the end.

    targets: read them; without, images of any shards alone.

    Raises:
        InputError: no targets in the shards, or too many bad samples.
    """
    if targets:
        require_targets(index)
    quarantine = Quarantine(
        run_folder, rank=0, num_samples=index.num_samples, max_bad_fraction=config.max_bad_fraction
    )
    source = open_source(index, config)
    work = TargetWork(index, source, transform, 0, False, config.bands, targets)
    tasks = (Task(0, np.array([sample], np.int64)) for sample in samples)
    with closing(_results(work, tasks, config)) as results:
        for done in results:
            record(quarantine, index, done.bad)
            if done.sources[0] >= 0:
                yield int(done.sources[0]), done.items[0]
    if quarantine.bad:
        warn(f"--data_path {index.root}: skipped {quarantine.summary()}")


def refuse_empty(index: ShardIndex, config: LoaderConfig) -> None:
    """Refuse validation images that nothing can be measured on; reads as few as are needed.

    Raises:
        InputError: no pixel or object of them counts.
    """
    source, kind = open_source(index, config), index.targets
    assert kind is not None
    for first in range(0, index.num_samples, CHUNK):
        samples = range(first, min(first + CHUNK, index.num_samples))
        for raw in source.read_many([index.locate_target(sample) for sample in samples]):
            with suppress(BadImage):
                if isinstance(raw, bytes) and raw and counts(decode_target(kind, raw)):
                    return
    what = "pixel of their masks" if kind == "mask" else "object in them"
    raise InputError(
        f"--data_path {index.root}: no {what} counts; pack validation images that have some"
    )


def _results(work: TargetWork, tasks: Iterator[Task], config: LoaderConfig) -> Generator[_Done]:
    return run_tasks(work, tasks, config, Ring(0, []))  # type: ignore[arg-type,return-value]


def record(quarantine: Quarantine, index: ShardIndex, bad: list[tuple[int, str, str]]) -> None:
    """Quarantine a worker's bad samples; raises InputError when there are too many."""
    for sample, key, reason in bad:
        quarantine.add(sample, index.shards[index.locate(sample)[0]], key, reason)
