"""Images of every depth from a file to the loader's batch: packed by the command, and each value
still that of tifffile or NumPy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from xcit_dino.cli import main
from xcit_dino.data.augment import scaled
from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.loader import ImageLoader
from xcit_dino.data.native.scaling import form_of
from xcit_dino.data.pixels import default_window
from xcit_dino.data.shards.index import ShardIndex

SIDE, COUNT = 24, 3
Write = Callable[[Path, np.ndarray], None]


def some(low: int, high: int, dtype: str, channels: int = 1) -> Callable[[int], np.ndarray]:
    """Image n: [H, W] or [H, W, C] of values from low to high, both included."""

    def image(number: int) -> np.ndarray:
        shape = (SIDE, SIDE, channels)[: 2 + (channels > 1)]
        rng = np.random.default_rng(number)
        values = rng.integers(low, high, shape, np.int64, endpoint=True).astype(dtype)
        return values + rng.random(shape, np.float32) if dtype == "float32" else values

    return image


def tif(**how: Any) -> Write:
    """Through tifffile; ``order``: of the axes, those of [H, W, C]."""
    order = how.pop("order", None)

    def write(path: Path, values: np.ndarray) -> None:
        stored = values if order is None else values.transpose(order)
        given = {"photometric": "minisblack", "metadata": None} | how
        tifffile.imwrite(path.with_suffix(".tif"), stored, **given)

    return write


def pgm(path: Path, values: np.ndarray) -> None:
    """By the format's description: big-endian, most significant byte first."""
    head = f"P5\n# of a camera\n{SIDE} {SIDE}\n4095\n".encode()
    path.with_suffix(".pgm").write_bytes(head + values.astype(">u2").tobytes())


def ppm(path: Path, values: np.ndarray) -> None:
    head = f"P6 {SIDE} {SIDE} 65535\n".encode()
    path.with_suffix(".ppm").write_bytes(head + values.astype(">u2").tobytes())


def white_is_zero(path: Path, values: np.ndarray) -> None:
    tif(photometric="miniswhite")(path, 65535 - values)


def npy(path: Path, values: np.ndarray) -> None:
    np.save(path.with_suffix(".npy"), values)


PLANAR, PAGES = {"planarconfig": "separate", "order": (2, 0, 1)}, {"order": (2, 0, 1)}
CASES: dict[str, tuple[Write, Callable[[int], np.ndarray], str]] = {
    "12 bits in 16, TIFF": (tif(), some(0, 4095, "uint16"), "1xuint16"),
    "16-bit PGM": (pgm, some(0, 4095, "uint16"), "1xuint16"),
    "16-bit PPM": (ppm, some(0, 65535, "uint16", 3), "3xuint16"),
    **{
        f"{bits} bits a sample": (
            tif(bitspersample=bits), some(0, (1 << bits) - 1, "uint16"), "1xuint16"
        )
        for bits in (9, 10, 12, 14, 15)
    },
    "white is zero": (white_is_zero, some(0, 65535, "uint16"), "1xuint16"),
    "5 bands, planar": (tif(**PLANAR), some(0, 65535, "uint16", 5), "5xuint16"),
    "5 pages": (tif(**PAGES), some(0, 65535, "uint16", 5), "5xuint16"),
    "13 bands, interleaved": (
        tif(planarconfig="contig"), some(0, 65535, "uint16", 13), "13xuint16"
    ),
    "big-endian": (tif(byteorder=">"), some(0, 65535, "uint16"), "1xuint16"),
    "negative": (tif(), some(-32768, 32767, "int16"), "1xint16"),
    "floating point": (tif(compression="zlib"), some(-99, 99, "float32"), "1xfloat32"),
    "NumPy": (npy, some(-32768, 32767, "int16", 2), "2xint16"),
}  # fmt: skip


def loaded(shards: Path, **options: Any) -> torch.Tensor:
    index = ShardIndex.load(shards)
    loader = ImageLoader(
        index, LoaderConfig(num_workers=0, **options), resize=None, crop=SIDE, batch_size=COUNT,
        labeled=False,
    )  # fmt: skip
    images, _, samples = next(iter(loader))
    return images[np.argsort(samples)]


def packed(source: Path, destination: Path, *options: str) -> Path:
    words = ["shards", "make", source, destination, "--shuffle", "false", "--num_workers", "1"]
    assert main([*map(str, words), *options]) == 0
    return destination


@pytest.mark.parametrize("name", CASES)
def test_values_are_the_files_own_up_to_the_batch(name, tmp_path):
    write, image, kind = CASES[name]
    (tmp_path / "source").mkdir()
    for number in range(COUNT):
        write(tmp_path / "source" / f"{number}", image(number))
    shards = packed(tmp_path / "source", tmp_path / "shards")
    assert ShardIndex.load(shards).pixels.name == kind
    found = loaded(shards).permute(0, 2, 3, 1).numpy()
    expected = np.stack([image(n).reshape(SIDE, SIDE, -1) for n in range(COUNT)])
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_page_takes_one_of_a_stack(tmp_path):
    write, image, _ = CASES["5 pages"]
    (tmp_path / "source").mkdir()
    for number in range(COUNT):
        write(tmp_path / "source" / f"{number}", image(number))
    shards = packed(tmp_path / "source", tmp_path / "shards", "--page", "3")
    found = loaded(shards)[:, 0].numpy()
    np.testing.assert_array_equal(found, np.stack([image(n)[..., 3] for n in range(COUNT)]))


def test_twelve_bits_keep_all_their_levels_up_to_the_device(tmp_path):
    """4,096 of them, and as many once they are scaled."""
    (tmp_path / "source").mkdir()
    levels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    for number in range(2):
        tif()(tmp_path / "source" / f"{number}", np.roll(levels, number))
    shards = packed(tmp_path / "source", tmp_path / "shards")
    index, form = ShardIndex.load(shards), form_of(shards)
    assert form is not None
    config = LoaderConfig(num_workers=0)
    loader = ImageLoader(index, config, resize=None, crop=64, batch_size=2, labeled=False)
    images = next(iter(loader))[0]
    assert len(images[0].unique()) == 4096
    window = default_window(form)
    assert (window.low, window.high) == ((0.0,), (4095.0,))
    unit = scaled(images, window.low, window.high)
    assert len(unit[0].unique()) == 4096 and unit.min() == 0 and unit.max() == 1
