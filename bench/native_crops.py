"""Multi-crop of images that are not 8-bit RGB: ``python bench/native_crops.py``.

For each kind, images are drawn, written as TIFF and packed; then a plain loader (tifffile and
torchvision's RandomResizedCrop and flip, as a user would write it) and ours make the same number of
crops of the same files in turn, on one core. Rates are images per second of CPU time, medians of
the rounds. The plain loader's crops are float32, ours of the set's own type.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
import torch
from torchvision.transforms import v2

from xcit_dino.data.config import CropsConfig, LoaderConfig
from xcit_dino.data.io.storage import open_source
from xcit_dino.data.loader import slot_shapes
from xcit_dino.data.ring import Ring
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.data.workers import CropWork, Task

KINDS = ((4, "uint16"), (13, "uint16"), (3, "float32"))
BATCH = 16


def draw(folder: Path, channels: int, dtype: str, count: int, side: int, compression: str) -> None:
    """Smooth images with noise, which compress about as photographs do."""
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = torch.from_numpy(rng.normal(2000, 600, (1, channels, 9, 9)).astype(np.float32))
        smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")[0].numpy()
        values = (smooth + rng.normal(0, 8, smooth.shape)).clip(0, 4095).transpose(1, 2, 0)
        tifffile.imwrite(
            folder / f"{number:04}.tif", values.astype(dtype), photometric="minisblack",
            planarconfig="contig", compression=None if compression == "none" else compression,
            predictor=compression != "none",
        )  # fmt: skip


def plain_loader(crops: CropsConfig) -> Callable[[bytes], list[torch.Tensor]]:
    """What a user writes: decode, to a tensor, crop and flip."""
    kinds = [(crops.global_crops_size, crops.global_crops_scale)] * crops.global_crops_number
    kinds += [(crops.local_crops_size, crops.local_crops_scale)] * crops.local_crops_number
    bicubic = v2.InterpolationMode.BICUBIC
    transforms = [
        v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=scale, interpolation=bicubic, antialias=True),
                v2.RandomHorizontalFlip(0.5),
            ]
        )
        for size, scale in kinds
    ]

    def crops_of(raw: bytes) -> list[torch.Tensor]:
        values = tifffile.imread(io.BytesIO(raw)).astype(np.float32)
        image = torch.from_numpy(values).permute(2, 0, 1)
        return [transform(image) for transform in transforms]

    return crops_of


def cpu_rate(work: Callable[[], int]) -> float:
    begin = time.thread_time()
    images = work()
    return images / (time.thread_time() - begin)


def measure(folder: Path, crops: CropsConfig, rounds: int) -> tuple[float, float]:
    """Rates of the plain loader and ours on a packed set."""
    index = ShardIndex.load(folder)
    source = open_source(index, LoaderConfig())
    samples = np.arange(index.num_samples)
    raws = [raw for raw in source.read_many([index.locate(int(n)) for n in samples])]
    tiffs = [raw for raw in raws if isinstance(raw, bytes)]
    plain = plain_loader(crops)
    form = index.pixels
    ring = Ring(2, slot_shapes(crops, BATCH, form.channels), form)
    work = CropWork(index, source, ring, crops, seed=0)

    def ours() -> int:
        for number, first in enumerate(range(0, len(samples), BATCH)):
            work[Task(number % 2, samples[first : first + BATCH])]
        return len(samples)

    contestants = (lambda: len([plain(raw) for raw in tiffs]), ours)
    ours()  # touches the ring's pages once, as the first epoch of a run does
    rates = [[cpu_rate(contestant) for contestant in contestants] for _ in range(rounds)]
    one, two = (statistics.median(each) for each in zip(*rates, strict=True))
    return one, two


def main() -> None:
    parser = argparse.ArgumentParser(description="Multi-crop of images that are not 8-bit RGB")
    parser.add_argument("--images", type=int, default=48, help="of each kind")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--compression", default="zlib", choices=("none", "zlib", "lzw", "zstd"))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    crops = CropsConfig(local_crops_number=10)
    print(f"TIFF of {args.side} x {args.side}, {args.compression}, load {os.getloadavg()[0]:.1f}")
    print("| kind | tifffile + torchvision | ours | ratio |\n|---|---|---|---|")
    for channels, dtype in KINDS:
        with tempfile.TemporaryDirectory() as scratch:
            source, shards = Path(scratch) / "images", Path(scratch) / "shards"
            source.mkdir()
            draw(source, channels, dtype, args.images, args.side, args.compression)
            pack = ("shards", "make", str(source), str(shards), "--splits", "none")
            command = (sys.executable, "-m", "xcit_dino.cli", *pack)
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            plain, ours = measure(next(shards.rglob("index.json")).parent, crops, args.rounds)
        print(f"| {channels} x {dtype} | {plain:.1f} | {ours:.1f} | {ours / plain:.1f} x |")


if __name__ == "__main__":
    main()
