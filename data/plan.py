"""The samples of a step's global batch: a pure function of (seed, step, data).

An epoch visits every sample once. Its order: the shards in random order; then, inside each window
of consecutive shards in that order, all samples in random order. Storage is thus read window by
window, nearly in sequence, while neighbors in a shard are separated. Nothing here reads data, and
nothing has to be replayed: any step of any epoch is computed directly, from O(shards + window)
memory, so a run continues at the exact next sample from one integer, on any number of ranks.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.rng import random_permutation, text_key
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError

LastBatch = Literal["drop", "wrap"]
SHARD_ORDER, WINDOW_ORDER = 1, 2


class Plan:
    """The order of all samples over all epochs, in global batches.

    Args:
        counts: samples of each shard, in the index's order; a sample's number counts through it.
        seed: of the run.
        checksum: of the index; other data, another order.
        batch_size: global: samples of one optimizer step over all ranks and micro-batches.
        window: shards among which samples are mixed.
        last_batch: whether an epoch's last partial batch is dropped, or wrapped round to the
            epoch's first samples.
        repeats: repeated augmentation (arXiv 1901.09335): each sample stands that many times in a
            row, so that its copies share a global batch. An epoch is then as many times longer.
    """

    def __init__(
        self,
        counts: NDArray[np.int64],
        *,
        seed: int,
        checksum: str = "",
        batch_size: int,
        window: int = 16,
        last_batch: LastBatch = "drop",
        repeats: int = 1,
    ) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.starts = np.cumsum(self.counts) - self.counts
        self.num_samples = int(self.counts.sum())
        self.seed = seed
        self.batch_size = batch_size
        self.window = window
        self.last_batch = last_batch
        self.repeats = repeats
        self._data_key = text_key(checksum)
        self._epoch = -1
        self._windows: dict[int, NDArray[np.int64]] = {}
        if self.num_samples < batch_size:
            raise InputError(
                f"the data has {self.num_samples} images, fewer than one global batch of "
                f"{batch_size}; lower --batch_size_per_gpu or use more data"
            )

    @staticmethod
    def of(index: ShardIndex, config: LoaderConfig, *, seed: int, batch_size: int) -> Plan:
        """The plan of an index; ``batch_size`` is the global one."""
        return Plan(
            index.counts,
            seed=seed,
            checksum=index.checksum,
            batch_size=batch_size,
            window=config.shuffle_window,
            last_batch=config.last_batch,
        )

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(self.num_samples * self.repeats, self.batch_size)
        return whole + (rest > 0 and self.last_batch == "wrap")

    def batch(self, step: int) -> NDArray[np.int64]:
        """Sample numbers [batch_size] of the global batch of optimizer step ``step`` (from 0).

        The r-th copy of sample n has the number n + r * num_samples, so that its random
        choices differ between copies.
        """
        epoch, step = divmod(step, self.steps_per_epoch)
        first = step * self.batch_size
        last = first + self.batch_size
        total = self.num_samples * self.repeats
        head = self._copies(epoch, first, min(last, total))
        if last <= total:
            return head
        return np.concatenate([head, self._copies(epoch, 0, last - total)])

    def _copies(self, epoch: int, first: int, last: int) -> NDArray[np.int64]:
        """Numbers at ``first <= place < last`` of the order with every sample repeated."""
        places = np.arange(first, last)
        begin = first // self.repeats
        samples = self.slice(epoch, begin, -(-last // self.repeats))
        return samples[places // self.repeats - begin] + places % self.repeats * self.num_samples

    def slice(self, epoch: int, first: int, last: int) -> NDArray[np.int64]:
        """Sample numbers at the positions ``first <= position < last`` of an epoch's order."""
        self._enter(epoch)
        begin = np.searchsorted(self._window_ends, first, side="right")
        end = np.searchsorted(self._window_ends, last, side="left")
        parts = []
        for number in range(begin, end + 1):
            offset = self._window_ends[number - 1] if number else 0
            parts.append(self._window_order(number)[max(first - offset, 0) : last - offset])
        return np.concatenate(parts)

    def shards_of_window(self, epoch: int, number: int) -> NDArray[np.int64]:
        """Shard numbers of an epoch's n-th window, in reading order."""
        return self._shards_in(epoch, number)

    def _shards_in(self, epoch: int, number: int) -> NDArray[np.int64]:
        self._enter(epoch)
        return self._shard_order[number * self.window : (number + 1) * self.window]

    def window_of(self, step: int) -> tuple[int, int, int]:
        """(epoch, number of the window where this step begins, windows an epoch)."""
        epoch, step = divmod(step, self.steps_per_epoch)
        self._enter(epoch)
        place = step * self.batch_size // self.repeats
        number = int(np.searchsorted(self._window_ends, place, side="right"))
        return epoch, number, len(self._window_ends)

    def _enter(self, epoch: int) -> None:
        """Keep the shard order of one epoch at a time."""
        if epoch == self._epoch:
            return
        keys = (self.seed, self._data_key, epoch, SHARD_ORDER)
        self._shard_order = random_permutation(len(self.counts), *keys)
        ends = np.cumsum(self.counts[self._shard_order])
        last_shards = np.arange(self.window, len(ends) + self.window, self.window) - 1
        self._window_ends = ends[np.minimum(last_shards, len(ends) - 1)]
        self._epoch = epoch
        self._windows.clear()

    def _window_order(self, number: int) -> NDArray[np.int64]:
        """The samples of one window, shuffled; the last two windows used are cached."""
        if number not in self._windows:
            shards = self._shards_in(self._epoch, number)
            counts, starts = self.counts[shards], self.starts[shards]
            samples = np.arange(counts.sum()) + np.repeat(
                starts - np.cumsum(counts) + counts, counts
            )
            keys = (self.seed, self._data_key, self._epoch, WINDOW_ORDER, number)
            order = samples[random_permutation(len(samples), *keys)]
            if len(self._windows) > 1:
                del self._windows[next(iter(self._windows))]
            self._windows[number] = order
        return self._windows[number]


class Subset(Plan):
    """The plan of some samples of an index, as if they alone were there, in one shard.

    Args:
        samples: int64 [n], numbers in the index.
        index: of all samples.
        options: those of :class:`Plan` besides counts and checksum.
    """

    def __init__(self, samples: NDArray[np.int64], index: ShardIndex, **options: Any) -> None:
        super().__init__(np.array([len(samples)]), checksum=index.checksum, **options)
        self.samples, self.total = np.asarray(samples, np.int64), index.num_samples
        self._shards = np.unique(np.searchsorted(index.starts, self.samples, side="right") - 1)

    def batch(self, step: int) -> NDArray[np.int64]:
        """Sample numbers as of the whole index; the r-th copy of sample n is n + r x its size."""
        copies, places = np.divmod(super().batch(step), self.num_samples)
        return self.samples[places] + copies * self.total

    def shards_of_window(self, epoch: int, number: int) -> NDArray[np.int64]:
        """All shards that hold a sample: an epoch is one window."""
        return self._shards


def rank_slice(
    batch: NDArray[np.int64], rank: int, world_size: int, accum: int = 1, micro: int = 0
) -> NDArray[np.int64]:
    """The part of a global batch that one rank takes in one micro-batch.

    Micro-batches come one after the other and are split over the ranks in order, so the global
    batch is the same list for every ``world_size x accum``.
    """
    assert len(batch) % (world_size * accum) == 0, (len(batch), world_size, accum)
    return batch.reshape(accum, world_size, -1)[micro, rank]
