"""Small labeled sets of images that are not 8-bit RGB: classes differ in spectrum and texture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from xcit_dino.data.pack.shard_writer import Sample, write_shard
from xcit_dino.data.pixels import SHARES, PixelFormat, Statistics
from xcit_dino.data.shards.index_writer import write_index

CLASSES = 4


def image(number: int, channels: int, dtype: str, size: int = 24) -> np.ndarray:
    """[H, W, C]; values of 12 bits, and as many below 0 where the type has them."""
    rng = np.random.default_rng(number)
    spectrum = np.random.default_rng(1000 + number % CLASSES).uniform(500, 3500, channels)
    noise = rng.normal(0, 200, (size + number % 3, size, channels))
    values = (spectrum + noise).clip(0, 4095)
    if dtype in ("int16", "float32"):
        values = values - 2000
    if dtype == "uint8":
        values = values / 16
    return values.astype(dtype)


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def form_of(images: list[np.ndarray]) -> PixelFormat:
    """Their format, with statistics over all pixels."""
    channels = images[0].shape[2]
    pixels = np.concatenate([each.reshape(-1, channels) for each in images]).astype(np.float64)
    statistics = Statistics(
        mean=tuple(pixels.mean(0).tolist()),
        std=tuple(pixels.std(0).tolist()),
        quantiles=tuple(tuple(row) for row in np.percentile(pixels, SHARES, axis=0).T.tolist()),
        invalid=(0.0,) * channels,
        images=len(images),
    )
    return PixelFormat(channels, images[0].dtype.name, statistics=statistics)


def make_set(
    folder: Path, channels: int, dtype: str, *, train: int = 24, val: int = 12, size: int = 24
) -> Path:
    """Shards of train and val; sample n of a split is ``image(n)``, or ``image(1000 + n)``, and of
    class n modulo CLASSES."""
    for split, count, first in (("train", train, 0), ("val", val, 1000)):
        (folder / split).mkdir(parents=True)
        images = [image(first + n, channels, dtype, size) for n in range(count)]
        samples = [
            Sample(f"{n:05}", "tif", npy(values), n % CLASSES, {})
            for n, values in enumerate(images)
        ]
        parts = [
            write_shard(folder / split, f"shard-{shard:06}.tar", samples[shard::2])
            for shard in range(2)
        ]
        names = [f"class {n}" for n in range(CLASSES)]
        write_index(folder / split, parts, names, pixels=form_of(images))
    return folder
