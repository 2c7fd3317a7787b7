"""Does the plan scale, and how well does it shuffle? ``python bench/plan.py``

An index of 1e9 samples in 1e5 shards (its arrays are sparse files: 16 GB that take no disk), and
1024 ranks x 16 workers: what one worker keeps in memory, and the time to the first sample when a
run starts and when it resumes in the middle of an epoch. Then, for ImageNet's size, how far samples
travel between their place in storage and their place in an epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from xcit_dino.data.plan import Plan, rank_slice
from xcit_dino.data.shards import index as index_module
from xcit_dino.data.shards.index import ARRAYS, INDEX, VERSION, ShardIndex

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """(result, seconds)"""
    begin = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begin


def make_index(folder: Path, samples: int, shards: int) -> None:
    """An index as ``shards make`` would write it, with holes for its arrays."""
    for name, dtype in ARRAYS.items():
        np.lib.format.open_memmap(
            folder / f"index.{name}.npy", mode="w+", dtype=dtype, shape=(samples,)
        )
    counts = np.diff(np.linspace(0, samples, shards + 1).astype(int)).tolist()
    meta = {
        "version": VERSION, "samples": samples, "bytes": samples * 100_000, "classes": None,
        "shards": [
            {"name": f"{n:06}.tar", "samples": count, "bytes": count * 100_000, "sha256": None}
            for n, count in enumerate(counts)
        ],
        "arrays": {},
    }  # fmt: skip
    meta["checksum"] = index_module.checksum_of(meta)
    (folder / INDEX).write_text(json.dumps(meta))


def worker_memory(folder: Path, batch: np.ndarray, answer) -> None:
    """Memory in MB that a worker needs to locate the samples of one micro-batch after another."""
    index = ShardIndex.load(folder)
    process = psutil.Process()
    for sample in batch[:1]:
        index.locate(int(sample))
    before = process.memory_info().rss
    for sample in batch:
        index.locate(int(sample))
    answer.put(((process.memory_info().rss - before) / 1e6, process.memory_full_info().uss / 1e6))


def scale(args: argparse.Namespace) -> Table:
    table = Table(
        "step", "", title=f"{args.samples:.0e} samples, {args.shards:.0e} shards, "
        f"{args.ranks} ranks x {args.workers} workers, global batch {args.batch}"
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_index(folder, args.samples, args.shards)
        index, loading = timed(lambda: ShardIndex.load(folder))
        process = psutil.Process()
        before = process.memory_info().rss

        def planned(step: int) -> np.ndarray:
            plan = Plan(
                index.counts, seed=0, checksum=index.checksum, batch_size=args.batch, window=16
            )
            return rank_slice(
                plan.batch(step % plan.steps_per_epoch + step), args.ranks // 2, args.ranks
            )

        first, starting = timed(lambda: planned(0))
        _, locating = timed(lambda: [index.locate(int(sample)) for sample in first])
        _, resuming = timed(lambda: planned(7 * (args.samples // args.batch) + 3001))
        plan = Plan(index.counts, seed=0, batch_size=args.batch, window=16)
        _, stepping = timed(lambda: [plan.batch(step) for step in range(200)])
        used = (process.memory_info().rss - before) / 1e6
        answer = get_context("spawn").SimpleQueue()
        batch = np.concatenate([rank_slice(plan.batch(s), 5, args.ranks) for s in range(20)])
        child = get_context("spawn").Process(target=worker_memory, args=(folder, batch, answer))
        child.start()
        touched, total = answer.get()
        child.join()
        on_disk = sum(os.stat(path).st_blocks * 512 for path in folder.iterdir()) / 1e6
    table.add_row("open the index (map, verify checksum)", f"{loading:.2f} s")
    table.add_row("plan the first step", f"{starting:.2f} s")
    table.add_row("locate a micro-batch", f"{locating * 1e3:.1f} ms")
    table.add_row(
        "time to the first sample, in all", f"{loading + starting + locating:.2f} s", style="bold"
    )
    table.add_row(
        "the same, resuming in epoch 7", f"{loading + resuming + locating:.2f} s", style="bold"
    )
    table.add_row("each further step (mean of 200)", f"{stepping / 200 * 1e3:.1f} ms")
    table.add_row("memory of the plan in a training process", f"{used:.0f} MB")
    table.add_row("pages of the index that 20 micro-batches touch", f"{touched:.1f} MB")
    table.add_row(
        "a worker's own memory, Python and numpy included", f"{total:.0f} MB", style="bold"
    )
    table.add_row("(index on disk here, sparse)", f"{on_disk:.0f} MB")
    return table


def shuffle(samples: int, shards: int) -> Table:
    table = Table(
        "window", "travel", "neighbors part", "same-shard pairs in a batch",
        title=f"shuffling of {samples:,} samples in {shards:,} shards, batch 1024",
    )  # fmt: skip
    counts = np.diff(np.linspace(0, samples, shards + 1).astype(int))
    shard_of = np.repeat(np.arange(shards), counts)
    for window in (1, 4, 16, 64, shards):
        plan = Plan(counts, seed=0, batch_size=1024, window=window)
        order = plan.slice(0, 0, samples)
        place = np.empty(samples, np.int64)
        place[order] = np.arange(samples)
        travel = abs(place - np.arange(samples)).mean() / samples
        apart = np.median(abs(np.diff(place)))
        pairs = []
        for step in range(0, plan.steps_per_epoch, 37):
            _, same = np.unique(shard_of[plan.batch(step)], return_counts=True)
            pairs.append((same * (same - 1)).sum() / (1024 * 1023))
        table.add_row(
            f"{window:,} shards", f"{travel:.3f} of the set", f"{apart:,.0f} places",
            f"{np.mean(pairs):.2%}",
        )  # fmt: skip
    ideal = (counts * (counts - 1)).sum() / (samples * (samples - 1))
    table.add_row(
        "(uniform)", "0.333 of the set", f"{samples * (1 - 0.5**0.5):,.0f} places", f"{ideal:.2%}"
    )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10**9)
    parser.add_argument("--shards", type=int, default=10**5)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1024 * 64, help="global")
    args = parser.parse_args()
    console = Console(width=110)
    console.print(scale(args))
    console.print(shuffle(1_281_167, 1282))


if __name__ == "__main__":
    main()
