"""What the images of shards without an index are: their kind, and the statistics of each channel.

By the rule of packing. The images are read where they lie in the tars.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from xcit_dino.data.decode.native import decode_values, invalid, read_native_header
from xcit_dino.data.decode.rgb import MAX_PIXELS, BadImage
from xcit_dino.data.pack.image_file import Image, read_image
from xcit_dino.data.parallel import Advance, map_processes
from xcit_dino.data.pixels import RGB8, PixelFormat
from xcit_dino.data.shards.config import CheckConfig
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.data.shards.kinds import RGB, PixelOptions, find_kind
from xcit_dino.data.shards.measure import ENOUGH, Shares, is_measured, merged, meter
from xcit_dino.errors import InputError
from xcit_dino.progress import progress


class Images(Sequence[Image]):
    """The images of an index, as parts of its tars."""

    def __init__(self, index: ShardIndex) -> None:
        self._of = index

    def __len__(self) -> int:
        return self._of.num_samples

    def __getitem__(self, sample: int) -> Image:  # type: ignore[override]
        if sample >= len(self):
            raise IndexError
        shard, offset, size = self._of.locate(sample)
        name = f"{self._of.shards[shard]} at byte {offset}"
        return Image(name, self._of.path(shard), offset, size)


class _Task(NamedTuple):
    first: int
    images: list[Image]
    form: PixelFormat
    total: int


def find_pixels(index: ShardIndex, options: PixelOptions, config: CheckConfig) -> PixelFormat:
    """The kind of an index's images, measured on a thousand evenly spread ones.

    Raises:
        InputError: several kinds, or none of the images is of the kind of ``--pixels``.
    """
    if not index.num_samples:
        return RGB8
    kind, lines = find_kind(Images(index), options, config.num_workers)
    for line in lines:
        print(line)
    form = replace(options, pixels=kind).form
    if kind == RGB:
        most = options.max_pixels or 0
        return replace(RGB8, max_pixels=most) if most > MAX_PIXELS else RGB8
    tasks = _tasks(Images(index), form)
    with progress("Measure", sum(len(task.images) for task in tasks), "images") as bar:
        shares = map_processes(_measure, tasks, config.num_workers, bar)
        statistics = merged(form, index.num_samples, shares)
    if not statistics.images:
        raise InputError(f"{index.root}: none of the images that were looked at is {kind}")
    return replace(form, statistics=statistics)


def _tasks(images: Images, form: PixelFormat) -> list[_Task]:
    """Some images each; five hundred to a thousand of many."""
    total = len(images)
    chosen = [n for n in range(0, total, -(-total // ENOUGH)) if is_measured(n, total, False)]
    parts = np.array_split(np.array(chosen), -(-len(chosen) // 50))
    return [_Task(int(p[0]), [images[n] for n in p.tolist()], form, total) for p in parts]


def _measure(task: _Task, advance: Advance) -> Shares:
    found = meter(task.form, task.total)
    for n, image in enumerate(task.images):
        advance(1)
        try:
            header = read_native_header(read_image(image), task.form)
            values = decode_values(header)
        except BadImage:
            continue
        nodata = header.nodata if task.form.nodata is None else task.form.nodata
        found.add(task.first + n, values, invalid(values, nodata))
    return found.shares()
