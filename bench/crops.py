"""What multi-crop costs on the host: ``python bench/crops.py --data PATH``.

One run, one table: decoding alone, the official pipeline written plainly with torchvision and
Pillow, ours on one core, the loader with one and two workers, bytes moved, memory over 3 epochs,
packing and indexing (pack.py). PATH is a tar of images, or a folder of shards with their index.

The rates per core are images per second of CPU time, measured alternately in one process (medians
of the rounds), so that other load on the machine has little influence. Workers are timed by wall
clock, one and two alternately, while this process only receives what they deliver. Wall-clock times
need two idle cores: the number that the workers actually had is printed next to them.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import psutil
import simplejpeg
import torch
from PIL import Image, ImageFilter, ImageOps
from rich.console import Console
from rich.table import Table
from torchvision import transforms

from bench.pack import rows
from xcit_dino.data.config import CropsConfig, LoaderConfig
from xcit_dino.data.crops import crop_boxes
from xcit_dino.data.decode.rgb import read_header
from xcit_dino.data.io.storage import open_source
from xcit_dino.data.loader import CropLoader, slot_shapes
from xcit_dino.data.plan import Plan
from xcit_dino.data.ring import Ring
from xcit_dino.data.shards.index import INDEX, ShardIndex
from xcit_dino.data.shards.index_writer import write_index
from xcit_dino.data.shards.scan import scan_shard
from xcit_dino.data.workers import CropWork, Task
from xcit_dino.inputs import IMAGENET_MEAN, IMAGENET_STD


class OfficialCrops:
    """DataAugmentationDINO of dino main_dino.py, with the numbers of ``CropsConfig``."""

    def __init__(self, crops: CropsConfig) -> None:
        kinds = [(crops.global_crops_size, crops.global_crops_scale)] * crops.global_crops_number
        kinds += [(crops.local_crops_size, crops.local_crops_scale)] * crops.local_crops_number
        blurs = [1.0, 0.1] + [0.5] * crops.local_crops_number
        solarized = [0.0, 0.2] + [0.0] * crops.local_crops_number
        self.transforms = [
            self._transform(*kind, blur, solarize)
            for kind, blur, solarize in zip(kinds, blurs, solarized, strict=True)
        ]

    def _transform(self, size: int, scale: tuple[float, float], blur: float, solarize: float):
        def gaussian_blur(image: Image.Image) -> Image.Image:
            if random.random() > blur:
                return image
            return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

        def solarization(image: Image.Image) -> Image.Image:
            return ImageOps.solarize(image) if random.random() < solarize else image

        return transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    size, scale=scale, interpolation=transforms.InterpolationMode.BICUBIC
                ),
                transforms.RandomHorizontalFlip(0.5),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                transforms.RandomGrayscale(0.2),
                gaussian_blur,
                solarization,
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __call__(self, raw: bytes) -> list:
        image = Image.open(io.BytesIO(raw)).convert("RGB")
        return [transform(image) for transform in self.transforms]


@contextmanager
def opened(data: Path) -> Iterator[ShardIndex]:
    """The index of a folder of shards, or one built on the fly for a single tar."""
    if data.is_dir() and (data / INDEX).exists():
        yield ShardIndex.load(data)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / data.name).symlink_to(data.resolve())
        write_index(folder, [scan_shard(folder, data.name, with_sha256=False)], None)
        yield ShardIndex.load(folder)


def cpu_rate(work: Callable[[], int]) -> float:
    """Images per second of this thread's CPU time."""
    begin = time.thread_time()
    images = work()
    return images / (time.thread_time() - begin)


def one_core(index: ShardIndex, crops: CropsConfig, images: int, rounds: int) -> dict[str, float]:
    """Median rates of decoding, the official pipeline and ours, measured alternately."""
    samples = np.random.RandomState(0).permutation(index.num_samples)[:images]
    source = open_source(index, LoaderConfig())
    raws = [raw for raw in source.read_many([index.locate(int(n)) for n in samples])]
    jpegs = [raw for raw in raws if isinstance(raw, bytes)]
    official = OfficialCrops(crops)
    few = jpegs[: max(1, len(jpegs) // 8)]
    buffer = np.empty(1 << 26, np.uint8)
    batch = 32
    ring = Ring(2, slot_shapes(crops, batch))
    work = CropWork(index, source, ring, crops, seed=0)

    def ours() -> int:
        for number, first in enumerate(range(0, len(samples), batch)):
            work[Task(number % 2, samples[first : first + batch])]
        return len(samples)

    contestants = {
        "bare decoding (simplejpeg)": lambda: len([simplejpeg.decode_jpeg(raw) for raw in jpegs]),
        "bare decoding, memory reused": lambda: len(
            [simplejpeg.decode_jpeg(raw, buffer=buffer) for raw in jpegs]
        ),
        "official pipeline (torchvision, Pillow)": lambda: len([official(raw) for raw in few]),
        "ours: read, decode, crop": ours,
    }
    ours()  # touches the ring's pages once, as the first epoch of a run does
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            rates[name].append(cpu_rate(contestant))
    return {name: statistics.median(values) for name, values in rates.items()}


def loader_rate(
    index: ShardIndex, crops: CropsConfig, workers: int, seconds: float
) -> tuple[float, float, float]:
    """(images per second by the clock, images per second of the workers' CPU time, microseconds
    of the training process's CPU time for each image)."""
    config = LoaderConfig(num_workers=workers)
    plan = Plan.of(index, config, seed=0, batch_size=min(32, index.num_samples))
    with closing(iter(CropLoader(index, plan, crops, config))) as steps:
        for _ in range(2 * workers * config.prefetch_factor):  # every slot has been touched
            next(steps)
        begin, cpu, own, images = time.perf_counter(), workers_cpu(), time.process_time(), 0
        while time.perf_counter() - begin < seconds:
            next(steps)
            images += plan.batch_size
        passed = time.perf_counter() - begin
        own = (time.process_time() - own) / images * 1e6
        return images / passed, images / (workers_cpu() - cpu), own


def workers_cpu() -> float:
    times = [child.cpu_times() for child in psutil.Process().children()]
    return sum(t.user + t.system for t in times)


def memory_over_epochs(index: ShardIndex, crops: CropsConfig, epochs: int = 3) -> list[float]:
    """MB that this process and two workers own (shared pages counted once), after each epoch."""
    config = LoaderConfig(num_workers=2)
    plan = Plan.of(index, config, seed=0, batch_size=min(32, index.num_samples))
    sizes = []
    with closing(iter(CropLoader(index, plan, crops, config))) as steps:
        for _ in range(epochs):
            for _ in range(plan.steps_per_epoch):
                next(steps)
            me = psutil.Process()
            family = [me, *me.children()]
            sizes.append(sum(process.memory_full_info().pss for process in family) / 1e6)
    return sizes


def moved(index: ShardIndex, crops: CropsConfig, images: int) -> dict[str, str]:
    """Bytes moved for an image's crops, computed from their sizes."""
    samples = np.arange(min(images, index.num_samples))
    raws = open_source(index, LoaderConfig()).read_many([index.locate(int(n)) for n in samples])
    headers = [read_header(raw) for raw in raws if isinstance(raw, bytes)]
    sides = np.array([(header.height, header.width) for header in headers])
    boxes = crop_boxes(crops, *sides.T, seed=0, epoch=0, samples=samples[: len(sides)])
    read = 3 * boxes[..., 2].astype(float) * boxes[..., 3]
    one = [3 * crops.global_crops_size**2, 3 * crops.local_crops_size**2]
    total = one[0] * crops.global_crops_number + one[1] * crops.local_crops_number
    return {
        "read from storage": f"{index.sizes.mean() / 1e3:.0f} kB an image",
        "decoded pixels": f"{3 * sides.prod(1).mean() / 1e3:.0f} kB an image, in memory used again",
        "pixels that a crop is made of": f"{read.mean() / 1e3:.0f} kB, gathered for the resize",
        "a global crop, written once and copied once": f"{one[0]:,} B",
        "a local crop, written once and copied once": f"{one[1]:,} B",
        "to the device": f"{total / 1e3:.0f} kB an image (uint8; float32 would be four times that)",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="tar of images or shard folder")
    parser.add_argument("--images", type=int, default=400, help="images a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=15, help="for each number of workers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    crops = CropsConfig(local_crops_number=10)
    with opened(args.data) as index:
        rates = one_core(index, crops, args.images, args.rounds)
        two_rounds = [
            [loader_rate(index, crops, n, args.seconds / 3) for n in (1, 2)] for _ in "123"
        ]
        memory = memory_over_epochs(index, crops)
        bytes_moved = moved(index, crops, args.images)
        packing = list(rows(Path(index.path(0)), rounds=3))
    clock, cpu, own = (
        [statistics.median(r[i][k] for r in two_rounds) for i in (0, 1)] for k in (0, 1, 2)
    )
    scaling = statistics.median(r[1][0] / r[0][0] for r in two_rounds)

    table = Table(
        "multi-crop 2x224 + 10x96", "", title=f"{args.data.name}, load {os.getloadavg()[0]:.1f}"
    )
    for name, rate in rates.items():
        table.add_row(name, f"{rate:.0f} images/s per core")
    decoding, reused, official, ours = rates.values()
    alone = f"{1e3 / ours - 1e3 / reused:.2f} ms an image"
    table.add_row("crops alone (ours less decoding)", alone)
    table.add_row("ours / official", f"{ours / official:.1f} x", style="bold")
    table.add_row("ours / bare decoding", f"{ours / decoding:.0%}", style="bold")
    table.add_row("ours / bare decoding, memory reused", f"{ours / reused:.0%}", style="bold")
    for number, (rate, own_rate) in enumerate(zip(clock, cpu, strict=True), 1):
        had = f"{rate:.0f} images/s by the clock, on {rate / own_rate:.2f} cores"
        table.add_row(f"loader, workers: {number}", had)
    table.add_row("2 workers / 1 worker, by the clock", f"{scaling:.2f} x", style="bold")
    table.add_row("2 workers / 1 worker, by CPU time", f"{2 * cpu[1] / cpu[0]:.2f} x", style="bold")
    table.add_row("training process, CPU time", f"{own[1]:.0f} us an image")
    for name, text in bytes_moved.items():
        table.add_row(name, text)
    table.add_row("memory after epoch 1, 2, 3", ", ".join(f"{size:.0f} MB" for size in memory))
    for row in packing:
        table.add_row(*row)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
