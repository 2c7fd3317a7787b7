"""The loader's worker processes: read, decode and crop into a slot of the ring.

torch's DataLoader runs them: it keeps the order, limits what is in flight and detects dead workers.
It takes tasks instead of indices and returns bookkeeping instead of pixels.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from xcit_dino.data.config import CropsConfig, LoaderConfig
from xcit_dino.data.crops import Cutter, center_view, crop_boxes, cut_crops
from xcit_dino.data.decode.native import NativeHeader
from xcit_dino.data.decode.rgb import BadImage, Header, Pixels, Scratch, decode, read_header
from xcit_dino.data.io.remote import Unreadable
from xcit_dino.data.io.storage import Source, read_key
from xcit_dino.data.native.crops import NativeImages
from xcit_dino.data.ring import Ring
from xcit_dino.data.rng import random_bits
from xcit_dino.data.shards.index import ShardIndex

T = TypeVar("T")
SUBSTITUTE_STREAM = 12
SUBSTITUTES = 50  # unreadable substitutes in a row after which loading fails
GRACE = 120  # seconds a worker lives on after SIGTERM, so that its run can save and exit


@dataclass(frozen=True)
class Task:
    """A worker's task: one micro-batch, and the slot that takes it."""

    slot: int
    samples: NDArray[np.int64]
    step: int = 0
    micro: int = 0
    epoch: int = 0


@dataclass(frozen=True)
class Done:
    """A worker's result; the pixels are in the slot."""

    task: Task
    sources: NDArray[np.int64]  # -1: an empty place
    bad: list[tuple[int, str, str]]  # (sample, key, reason)
    images: list[bytes | Pixels] | None = None  # only from gpu_crops.EncodedWork ...
    boxes: NDArray[np.int64] | None = None  # ... [B, V, 4]


AnyHeader = Header | NativeHeader
HostTransform = Callable[[list[Tensor], Task], None]
"""Changes the crops of a slot in place, on the host, after cropping."""


class Work(Protocol):
    """A DataLoader's data set, indexed by tasks."""

    def __getitem__(self, task: Task) -> Done: ...


@dataclass
class Reading:
    """Reads images by sample number and collects those that cannot be read.

    Args:
        labeled: count images without a label among them.
    """

    index: ShardIndex
    source: Source
    labeled: bool = False
    bad: list[tuple[int, str, str]] = field(default_factory=list)

    def many(self, samples: NDArray[np.int64]) -> list[bytes | Unreadable]:
        images = self.source.read_many([self.index.locate(int(sample)) for sample in samples])
        if self.labeled:
            labels = self.index.labels[samples]
            pairs = zip(images, labels, strict=True)
            return [image if label >= 0 else Unreadable("no label") for image, label in pairs]
        return images

    def reject(self, sample: int, reason: Exception) -> None:
        shard, offset, _ = self.index.locate(sample)
        self.bad.append((sample, read_key(self.source, shard, offset), str(reason)))

    def take_bad(self) -> list[tuple[int, str, str]]:
        bad, self.bad = self.bad, []
        return bad


class CropWork:
    """Fills a slot with the crops of a micro-batch."""

    def __init__(
        self,
        index: ShardIndex,
        source: Source,
        ring: Ring,
        crops: CropsConfig,
        seed: int,
        host_transform: HostTransform | None = None,
        labeled: bool = False,
        bands: Sequence[int] = (),
    ) -> None:
        self.reading = Reading(index, source, labeled)
        self.native = None if index.pixels.is_rgb8 else NativeImages(index.pixels, bands)
        self.ring, self.crops, self.seed, self.host_transform = ring, crops, seed, host_transform
        self.num_samples = index.num_samples
        self.scratch, self.cutter = Scratch(), Cutter()

    def __getitem__(self, task: Task) -> Done:
        sources = task.samples % self.num_samples  # copies of a sample (Plan.repeats) share pixels
        images = self.reading.many(sources)
        headers = [self._header(image) for image in images]
        boxes = self._boxes(task, headers)
        for place, (image, header) in enumerate(zip(images, headers, strict=True)):
            try:
                self._fill(task.slot, place, *_readable(image, header), boxes[place])
            except (Unreadable, BadImage) as reason:
                self.reading.reject(int(sources[place]), reason)
                sources[place] = self._substitute(task, place)
        if self.host_transform is not None:
            self.host_transform(self.ring.views(task.slot), task)
        return Done(task, sources, self.reading.take_bad())

    def _header(self, image: bytes | Unreadable) -> AnyHeader | Exception:
        if not isinstance(image, bytes):
            return image
        try:
            return read_header(image) if self.native is None else self.native.header(image)
        except BadImage as reason:
            return reason

    def _boxes(self, task: Task, headers: list[AnyHeader | Exception]) -> NDArray[np.int64]:
        """[B, V, 4]; those of an unreadable image are unused."""
        sizes = [(1, 1) if isinstance(h, Exception) else (h.height, h.width) for h in headers]
        heights, widths = np.array(sizes).T
        return crop_boxes(
            self.crops, heights, widths, seed=self.seed, epoch=task.epoch, samples=task.samples
        )

    def _fill(
        self, slot: int, place: int, image: bytes, header: AnyHeader, boxes: NDArray[np.int64]
    ) -> None:
        outputs = [crop for group in self.ring.views(slot) for crop in group[:, place, None]]
        if self.native is not None:
            self.native.cut_crops(image, cast(NativeHeader, header), boxes, outputs)
        else:
            cut_crops(image, cast(Header, header), boxes, outputs, self.scratch, self.cutter)

    def _substitute(self, task: Task, place: int) -> int:
        """Fill the place with another image, a pure function of (seed, epoch, sample).

        Returns its number, or -1 when SUBSTITUTES in a row are unreadable. Its random
        numbers are those of the sample it replaces, so the crops differ from its own.
        """
        wanted = task.samples[place : place + 1]
        keys = (self.seed, SUBSTITUTE_STREAM, task.epoch, int(wanted[0]), np.arange(SUBSTITUTES))
        for candidate in (random_bits(*keys) % np.uint64(self.num_samples)).astype(np.int64):
            image = self.reading.many(np.array([candidate]))[0]
            header = self._header(image)
            one = Task(task.slot, wanted, task.step, task.micro, task.epoch)
            try:
                boxes = self._boxes(one, [header])[0]
                self._fill(task.slot, place, *_readable(image, header), boxes)
                return int(candidate)
            except (Unreadable, BadImage) as reason:
                self.reading.reject(int(candidate), reason)
        return -1


class ImageWork:
    """Fills a slot with center views; the places of unreadable images stay empty."""

    def __init__(
        self,
        index: ShardIndex,
        source: Source,
        ring: Ring,
        resize: int | None,
        crop: int,
        labeled: bool = False,
        interpolation: str = "bicubic",
        bands: Sequence[int] = (),
    ) -> None:
        self.reading = Reading(index, source, labeled)
        self.native = None if index.pixels.is_rgb8 else NativeImages(index.pixels, bands)
        self.ring, self.resize, self.crop = ring, resize, crop
        self.interpolation = interpolation
        self.scratch = Scratch()

    def __getitem__(self, task: Task) -> Done:
        sources = task.samples.copy()
        (out,) = self.ring.views(task.slot)
        for place, image in enumerate(self.reading.many(sources)):
            try:
                if isinstance(image, Unreadable):
                    raise image
                self._fill(image, out[0, place, None])
            except (Unreadable, BadImage) as reason:
                self.reading.reject(int(task.samples[place]), reason)
                sources[place] = -1
        return Done(task, sources, self.reading.take_bad())

    def _fill(self, image: bytes, view: Tensor) -> None:
        where = (self.resize, self.crop, view, self.interpolation)
        if self.native is not None:
            self.native.center_view(image, self.native.header(image), *where)
        else:
            center_view(decode(image, read_header(image), self.scratch), *where)


def run_tasks(
    work: Work, tasks: Iterable[Task], config: LoaderConfig, ring: Ring, *, pin: bool = False
) -> Generator[Done]:
    """Results of ``tasks``, in their order, from ``config.num_workers`` processes (0: this one).

    Close the generator to stop the processes.

    Args:
        pin: page-lock the ring for copies to a GPU.

    Raises:
        RuntimeError: a worker died (DataLoader's message names it).
    """
    options: dict[str, Any] = {}
    if config.num_workers:
        options = dict(multiprocessing_context="fork", prefetch_factor=config.prefetch_factor)
    with warnings.catch_warnings():
        # Fork shares the ring and starts in milliseconds; the children touch neither CUDA nor the
        # parent's threads (Python 3.12 warns of those). How many workers is the user's choice.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        results = iter(
            DataLoader(
                work,  # pyright: ignore[reportArgumentType]  (anything with __getitem__ works)
                batch_size=None,
                sampler=tasks,
                num_workers=config.num_workers,
                collate_fn=_identity,
                worker_init_fn=_start_worker,
                **options,
            )
        )
    try:
        if pin:
            ring.pin()
        yield from results
    finally:
        del results  # stops the workers
        ring.unpin()


def _readable(image: bytes | Unreadable, header: AnyHeader | Exception) -> tuple[bytes, AnyHeader]:
    if isinstance(header, Exception):
        raise header
    assert isinstance(image, bytes)
    return image, header


def _identity(done: T) -> T:
    return done


def _start_worker(_: int) -> None:
    """Signals go to all processes of a job; the training process alone handles them."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process
    signal.signal(signal.SIGTERM, lambda *_: _end_later())


def _end_later() -> None:
    signal.alarm(GRACE)
