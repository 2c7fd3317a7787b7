"""The built-in data set: textured figures under strong nuisance, made in a second.

Twelve classes, each a shape with its texture (striped disk, banded square ...). Position, size,
rotation, texture frequency and phase, colors, lighting, clutter and noise are drawn at random and
are independent of the class. Two properties make it a fair test of self-supervised pretraining:

* pixels are of little use: a nearest neighbor in raw pixels is one of the same colors and place;
* what two crops of an image share is the class. Colors change over the image as under colored
  lamps, so that they do not identify it, while shape and texture survive a random crop.

Image ``n`` of a split is a function of (seed, split, n) alone, so that more images extend a set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import simplejpeg

from xcit_dino.data.pack.shard_writer import SHARD_NAME, Sample, write_shard
from xcit_dino.data.rng import random_bits, text_key
from xcit_dino.data.shards.config import DemoConfig
from xcit_dino.data.shards.index import INDEX, ShardIndex
from xcit_dino.data.shards.index_writer import write_index
from xcit_dino.errors import InputError
from xcit_dino.progress import progress

BATCH = 250  # images drawn at once: the arrays of one batch stay in the processor's cache
SHARD_SIZE = 1000
SPLITS = {"train": 0, "val": 1}
CLUTTER = 3  # strokes behind the figure

Plane = np.ndarray  # float32 [images, size, size]


def make(config: DemoConfig) -> int:
    """Write ``dst/train`` and ``dst/val``; returns the exit code."""
    with progress("Demo images", config.train + config.val, "images") as bar:
        for split in SPLITS:
            folder = config.dst / split
            _clear(folder)
            total, parts = getattr(config, split), []
            for number, start in enumerate(range(0, total, SHARD_SIZE)):
                stop = min(start + SHARD_SIZE, total)
                samples = _samples(config, split, start, stop)
                parts.append(write_shard(folder, SHARD_NAME.format(number), samples))
                bar.advance(stop - start)
            write_index(folder, parts, CLASSES)
    print(f"{config.train:,} training and {config.val:,} validation images in {config.dst}")
    return 0


def _clear(folder: Path) -> None:
    """Make the folder, or take the demo images that it holds out of it.

    Raises:
        InputError: it holds other shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX).exists() and ShardIndex.load(folder).classes == CLASSES:
        (folder / INDEX).unlink()
        for shard in folder.glob(SHARD_NAME.format(0).replace("0", "[0-9]")):
            shard.unlink()
    elif next(folder.glob("*.tar"), None) is not None:
        raise InputError(f"{folder} holds other shards; give another DST or delete them")


def _samples(config: DemoConfig, split: str, start: int, stop: int) -> Iterator[Sample]:
    for first in range(start, stop, BATCH):
        numbers = np.arange(first, min(first + BATCH, stop))
        images, labels = render(numbers, split, config.size, config.seed)
        for number, image, label in zip(numbers, images, labels, strict=True):
            data = simplejpeg.encode_jpeg(image, quality=95, colorsubsampling="444")
            yield Sample(f"{number:09d}", "jpg", data, int(label), {})


class _Draws:
    """Uniform float32 numbers of each image, a function of (seed, split, image number, purpose)."""

    def __init__(self, numbers: np.ndarray, split: str, seed: int):
        self.keys = random_bits(seed, SPLITS[split], numbers)

    def __call__(self, purpose: str, *shape: int) -> np.ndarray:
        """[images, *shape], in [0, 1)."""
        places = np.arange(int(np.prod(shape)))
        bits = random_bits(text_key(purpose), self.keys[:, None], places) >> np.uint64(40)
        return (bits.astype(np.float32) / np.float32(1 << 24)).reshape(-1, *shape)


# ------------------------------------------------------------------------------ shapes
# Each maps figure coordinates (unit radius) to a signed distance, negative inside.


def _polygon(corners: int, x: Plane, y: Plane, inner: float = 1.0) -> Plane:
    """A regular polygon, or with ``inner`` < 1 a star whose notches lie at that radius."""
    sector = np.float32(np.pi / corners)
    angle = np.abs(np.mod(np.arctan2(x, y), 2 * sector) - sector)
    radius = np.hypot(x, y)
    px, py = radius * np.cos(sector - angle), radius * np.sin(sector - angle)
    # The edge runs from a corner (1, 0) to a notch at angle pi / corners.
    notch = np.array([np.cos(sector), np.sin(sector)]) * (np.cos(sector) if inner == 1.0 else inner)
    edge = notch - np.array([1.0, 0.0])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return (px - 1) * np.float32(normal[0]) + py * np.float32(normal[1])


def _box(x: Plane, y: Plane, half_x: float, half_y: float) -> Plane:
    return np.maximum(np.abs(x) - np.float32(half_x), np.abs(y) - np.float32(half_y))


def _disk(x: Plane, y: Plane, radius: float = 1.0) -> Plane:
    return np.hypot(x, y) - np.float32(radius)


def _ring(x: Plane, y: Plane) -> Plane:
    return np.abs(np.hypot(x, y) - np.float32(0.72)) - np.float32(0.28)


def _cross(x: Plane, y: Plane) -> Plane:
    return np.minimum(_box(x, y, 1.0, 0.36), _box(x, y, 0.36, 1.0))


def _crescent(x: Plane, y: Plane) -> Plane:
    return np.maximum(_disk(x, y), -_disk(x - np.float32(0.55), y, 0.75))


def _heart(x: Plane, y: Plane) -> Plane:
    x, y = np.abs(x), np.float32(0.35) - y
    lobes = np.hypot(x - np.float32(0.46), y - np.float32(0.3)) - np.float32(0.52)
    wedge = (x - y) * np.float32(0.7071) - np.float32(0.68)
    return np.minimum(lobes, np.maximum(np.maximum(wedge, y - np.float32(0.3)), -y - 1))


def _arrow(x: Plane, y: Plane) -> Plane:
    shaft = _box(x, y - np.float32(0.4), 0.24, 0.6)
    head = np.maximum((np.abs(x) - y) * np.float32(0.7071) - np.float32(0.65), y)
    return np.minimum(shaft, head)


# ------------------------------------------------------------------------------ textures
# Each maps figure coordinates, a frequency and a phase in [0, 1) to values in [-1, 1].


def _wave(phase: Plane) -> Plane:
    """A square wave of period 1 whose edges are about a pixel soft."""
    return np.clip(np.sin(np.float32(2 * np.pi) * phase) * 2.5, -1, 1)


def _stripes(x: Plane, y: Plane, f: Plane, p: Plane) -> Plane:
    return _wave(x * f + p)


def _fine(x: Plane, y: Plane, f: Plane, p: Plane) -> Plane:
    return _wave(x * f * np.float32(1.8) + p)


def _bands(x: Plane, y: Plane, f: Plane, p: Plane) -> Plane:
    return _wave(y * f + p)


def _hatching(x: Plane, y: Plane, f: Plane, p: Plane) -> Plane:
    return _wave((x + y) * f * np.float32(0.7) + p)


def _checker(x: Plane, y: Plane, f: Plane, p: Plane) -> Plane:
    return _wave(x * f * np.float32(0.7) + p) * _wave(y * f * np.float32(0.7) + p)


def _dots(x: Plane, y: Plane, f: Plane, p: Plane) -> Plane:
    u, v = np.mod(x * f + p, 1) - np.float32(0.5), np.mod(y * f + p, 1) - np.float32(0.5)
    return np.clip((np.float32(0.3) - np.hypot(u, v)) * 8, -1, 1)


def _rings(x: Plane, y: Plane, f: Plane, p: Plane) -> Plane:
    return _wave(np.hypot(x, y) * f + p)


def _spokes(x: Plane, y: Plane, f: Plane, p: Plane) -> Plane:
    return _wave(np.arctan2(y, x) * np.round(f * 2 + 1) / np.float32(2 * np.pi) + p)


def _bricks(x: Plane, y: Plane, f: Plane, p: Plane) -> Plane:
    row = y * f + p
    shifted = x * f * np.float32(0.5) + np.floor(row) * np.float32(0.5)
    joints = np.minimum(np.mod(row, 1), np.mod(shifted, 1) * 2)
    return np.clip((joints - np.float32(0.25)) * 8, -1, 1)


def _blotches(x: Plane, y: Plane, f: Plane, p: Plane) -> Plane:
    turn, f = np.float32(2 * np.pi), f * np.float32(0.7)
    first = np.sin(turn * (x * f + p)) + np.sin(turn * (y * f * np.float32(1.3) - p))
    second = np.sin(turn * (x * np.float32(0.8) - y * np.float32(0.9)) * f)
    return np.clip((first + second) * 2, -1, 1)


def _shaded(x: Plane, y: Plane, f: Plane, p: Plane) -> Plane:
    return np.clip(x, -1, 1)


KINDS: dict[str, tuple[Callable[[Plane, Plane], Plane], Callable[..., Plane]]] = {
    "striped disk": (_disk, _stripes),
    "banded square": (lambda x, y: _box(x, y, 0.8, 0.8), _bands),
    "dotted triangle": (lambda x, y: _polygon(3, x, y), _dots),
    "ringed hexagon": (lambda x, y: _polygon(6, x, y), _rings),
    "spoked heart": (_heart, _spokes),
    "hatched star": (lambda x, y: _polygon(5, x, y, inner=0.5), _hatching),
    "checkered cross": (_cross, _checker),
    "fine-striped crescent": (_crescent, _fine),
    "shaded ring": (_ring, _shaded),
    "brick half-disk": (lambda x, y: np.maximum(_disk(x, y + 0.4), -y - 0.4), _bricks),
    "blotched ellipse": (lambda x, y: _disk(x, y * 1.8) * 0.8, _blotches),
    "banded arrow": (_arrow, _bands),
}
CLASSES = list(KINDS)


# ------------------------------------------------------------------------------ images


def render(numbers: np.ndarray, split: str, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw images: uint8 [n, size, size, 3] and labels [n], which go round the classes."""
    draw, labels = _Draws(numbers, split, seed), numbers % len(CLASSES)
    mask, texture = _figures(draw("figure", 8, 1, 1), labels, size)
    # Light and dark of figure and ground differ in either direction, so that edges are visible
    # whatever the colors are.
    tone = draw("tone", 4, 1, 1, 1)
    sign = np.where(tone[:, 0] < 0.5, np.float32(-1), np.float32(1))
    ground = _colors(draw("ground", 3, 3, 3), size) - sign * (0.1 + 0.12 * tone[:, 1])
    ground = _strokes(ground, draw("strokes", CLUTTER, 6, 1, 1))
    contrast = np.float32(0.06) + (0.24 + 0.16 * tone[:, 2]) * texture[..., None]
    figure = _colors(draw("figure colours", 3, 3, 3), size) + sign * contrast
    image = ground + mask[..., None] * (figure - ground)
    noise = (draw("noise", size, size, 3) - np.float32(0.5)) * (0.02 + 0.05 * tone[:, 3])
    image = image * _light(draw("light", 2, 1, 1), size)[..., None] + noise
    image = np.clip(image, 0, 1) * 255 + np.float32(0.5)
    return np.ascontiguousarray(image, dtype=np.uint8), labels


def _pixels(size: int) -> np.ndarray:
    """Pixel centers from -1 to 1."""
    return ((np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1).astype(np.float32)


def _figures(u: np.ndarray, labels: np.ndarray, size: int) -> tuple[Plane, Plane]:
    """Coverage in [0, 1] and texture in [-1, 1] of every pixel; ``u`` [n, 8, 1, 1]."""
    scale = 0.52 + 0.3 * u[:, 0]
    room = 1.2 - scale
    dx = _pixels(size)[None, None, :] - (u[:, 1] * 2 - 1) * room
    dy = _pixels(size)[None, :, None] - (u[:, 2] * 2 - 1) * room
    angle = (u[:, 3] - np.float32(0.5)) * np.float32(np.pi / 4)
    cos, sin, squeeze = np.cos(angle), np.sin(angle), 0.85 + 0.3 * u[:, 4]
    x = (cos * dx + sin * dy) / (scale * squeeze)
    y = (cos * dy - sin * dx) / (scale / squeeze)
    frequency, phase = 1.6 + 1.2 * u[:, 5], u[:, 6]
    distance, texture = np.empty_like(x), np.empty_like(x)
    for label, (shape, fill) in enumerate(KINDS.values()):
        rows = np.flatnonzero(labels == label)
        distance[rows] = shape(x[rows], y[rows])
        texture[rows] = fill(x[rows], y[rows], frequency[rows], phase[rows])
    coverage = np.clip(0.5 - distance * scale * np.float32(size / 2), 0, 1)
    return coverage, texture


def _colors(corners: np.ndarray, size: int) -> np.ndarray:
    """A smooth color field [n, size, size, 3] through colors [n, k, k, 3]: several lamps.

    The lamps differ little: a field with much structure would identify images by itself, and
    that is what self-supervised training would then learn.
    """
    cells = corners.shape[1]
    corners = np.float32(0.75) * corners[:, :1, :1] + np.float32(0.25) * corners
    position = (_pixels(size) + 1) / 2 * (cells - 1)
    weight = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(cells, dtype=np.float32)))
    weight = (weight * weight * (3 - 2 * weight)).astype(np.float32)
    field = np.einsum("yi,nijc,xj->nyxc", weight, corners, weight, optimize=True)
    return np.float32(0.3) + np.float32(0.4) * field


def _strokes(ground: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Short strokes of random place, length, width and brightness; ``u`` [n, k, 6, 1, 1]."""
    size, pixel = ground.shape[1], _pixels(ground.shape[1])
    for stroke in np.moveaxis(u, 1, 0):
        x = pixel[None, None, :] - (stroke[:, 0] * 2 - 1)
        y = pixel[None, :, None] - (stroke[:, 1] * 2 - 1)
        angle = stroke[:, 2] * np.float32(np.pi)
        along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        half = 0.05 + 0.35 * stroke[:, 3]
        distance = (
            np.hypot(np.maximum(np.abs(along) - half, 0), across) - 0.02 - 0.06 * stroke[:, 4]
        )
        cover = np.clip(0.5 - distance * np.float32(size / 2), 0, 1)
        ground = ground + (cover * (stroke[:, 5] - np.float32(0.5)) * np.float32(0.7))[..., None]
    return ground


def _light(u: np.ndarray, size: int) -> Plane:
    """Brightness that rises in a random direction, [n, size, size]; ``u`` [n, 2, 1, 1]."""
    angle, pixel = u[:, 0] * np.float32(2 * np.pi), _pixels(size)
    slope = np.cos(angle) * pixel[None, None, :] + np.sin(angle) * pixel[None, :, None]
    return 1 + np.float32(0.28) * u[:, 1] * slope
