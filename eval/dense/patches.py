"""``xcit-dino embed --patches true``: the features of every patch, and pictures of them.

Whole images of any size, a few at a time; the files are those of ``eval/dense/grids.py``. Pictures:
``patches.png``, a few images, their patches and their foreground, each in the colors of its own
first three principal components; of tiles also their scenes (``eval/dense/scenes.py``), in the same
colors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from xcit_dino.data.pack.image_file import Place as TilePlace
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.data.targets.loader import Key, Pixels, one_pass
from xcit_dino.errors import InputError, warn
from xcit_dino.eval.config import EmbedConfig
from xcit_dino.eval.context import Context
from xcit_dino.eval.dense.components import SAMPLE_IMAGES, fit_colors
from xcit_dino.eval.dense.grids import GridFile, Grids, Place, write_table
from xcit_dino.eval.dense.scenes import write_scenes
from xcit_dino.eval.pictures import false_color
from xcit_dino.eval.pictures.patches import GridFeatures
from xcit_dino.eval.ranges import refuse_nonfinite
from xcit_dino.eval.target import Network
from xcit_dino.models.dense import probe_grid
from xcit_dino.models.tokens import stride_of
from xcit_dino.progress import progress
from xcit_dino.train.amp import autocast, resolve_precision
from xcit_dino.train.distributed import dist

HEIGHT = 192  # pixels of the images in the picture
GAP = 4


def grid_features_of(
    network: Network, config: EmbedConfig, context: Context
) -> GridFeatures | None:
    """The patch features of whole images by the options; None without ``--patches``, and of raw
    pixels.

    Raises:
        InputError: no such layer, or a network that does not accept such images.
    """
    if not config.patches or network.name == "pixels":
        return None
    side = context.resize if config.image_size == -1 else config.image_size
    model = network.model.to(context.device).eval()
    stride = stride_of(model)
    square = max(1, (side or context.crop) // stride) * stride
    shape = (1, context.inputs.channels, square, square)
    arch = str(network.facts.get("arch"))
    probe_grid(model, config.tap, arch, torch.zeros(shape, device=context.device))
    return GridFeatures(model, config.tap, side, context)


@dataclass(frozen=True)
class WholeImage:
    """Loader transform: an image as the network takes it, and nothing beside it."""

    features: GridFeatures

    def __call__(self, pixels: Pixels, target: None, key: Key) -> Pixels:
        return np.ascontiguousarray(self.features.resized(pixels))


def write_patches(
    features: GridFeatures, index: ShardIndex, samples: np.ndarray, folder: Path
) -> None:
    """Write the grids of some samples; each process writes those of its part of them.

    samples: sample numbers in ascending order; row n of the features is ``samples[n]``.

    Raises:
        InputError: outputs that are not finite, or no space on the disk.
    """
    context = features.context
    world = context.world
    if world.is_main:
        folder.mkdir()
    dist.barrier()
    first, last = (len(samples) * (world.rank + i) // world.size for i in (0, 1))
    with dist.together():
        places = _write_part(features, index, samples, range(first, last), folder)
        (folder / f"places-{world.rank}.json").write_text(json.dumps(places))
    if world.is_main:
        parts = sorted(folder.glob("places-*.json"))
        lines = [line for part in parts for line in json.loads(part.read_text())]
        write_table(folder, [Place(*line) for line in lines])
        for part in parts:
            part.unlink()
    dist.barrier()


def _write_part(
    features: GridFeatures, index: ShardIndex, samples: np.ndarray, rows: range, folder: Path
) -> list[Place]:
    """Write the grids of some rows to this process's file; where they are."""
    context = features.context
    file: GridFile | None = None
    dtype = resolve_precision(context.precision, context.device)
    chosen = samples[rows.start : rows.stop]
    every = one_pass(index, context.loader, WholeImage(features), chosen, targets=False)
    with progress("patches", len(rows), "images") as bar:
        for numbers, images in same_size(every, context.batch_size * context.crop**2):
            with autocast(context.device, dtype):
                grids = features.of(images)
            refuse_nonfinite(float((~np.isfinite(grids)).sum()))
            if file is None:
                check_space(folder, 2 * grids[0].size * len(rows))
                file = GridFile(folder / f"{context.world.rank:05d}.npy", grids.shape[-1])
            file.write(np.searchsorted(samples, numbers).tolist(), grids)
            bar.advance(len(images))
    if file is None:
        return []
    file.close()
    if file.clipped:
        warn(f"{file.clipped:,} values of patches are larger than float16 holds: clipped")
    return file.places


def same_size(
    images: Iterable[tuple[int, Pixels]], most: int
) -> Iterator[tuple[list[int], list[Pixels]]]:
    """Consecutive images of one size, with at most ``most`` pixels together, or one image."""
    numbers: list[int] = []
    batch: list[Pixels] = []
    for number, image in images:
        area = image.shape[0] * image.shape[1]
        if batch and (image.shape != batch[0].shape or (len(batch) + 1) * area > most):
            yield numbers, batch
            numbers, batch = [], []
        numbers.append(number)
        batch.append(image)
    if batch:
        yield numbers, batch


def check_space(folder: Path, needed: int) -> None:
    """Raise InputError where the disk has not the space for all grids, by the size of the first."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"--patches true: about {needed / 1e9:,.1f} GB, and {folder.parent.parent} has "
            f"{free / 1e9:,.1f} GB free; choose a smaller --image_size, or another DST"
        )


# -- pictures


def draw_patches(
    features: GridFeatures,
    index: ShardIndex,
    shown: Mapping[int, int],
    folder: Path,
    places: list[TilePlace | None],
) -> None:
    """Draw what :func:`write_patches` wrote in a folder: ``patches.png`` beside it, and scenes.

    Args:
        shown: row of the features -> sample number of the images in the picture; may be empty.
        places: of each row, None where it is no tile.
    """
    grids = Grids(folder)
    sizes = sum(place.rows * place.columns for place in grids.places.values())
    print(f"patches: {sizes:,} of {len(grids):,} images, {grids.width} features each")
    lines = picture_lines(features, index, shown, grids)
    if lines:
        Image.fromarray(_stacked(lines)).save(folder.with_name(f"{folder.name}.png"))
    tiles = [row for row, place in enumerate(places) if place is not None and row in grids]
    if tiles:
        chosen = np.unique(np.linspace(0, len(tiles) - 1, SAMPLE_IMAGES).astype(int))
        colors = fit_colors(grids[tiles[number]] for number in chosen)
        maps = folder.with_name(folder.name.replace("patches", "maps"))
        if colors is not None:
            write_scenes(grids, colors, places, maps)


def picture_lines(
    features: GridFeatures, index: ShardIndex, shown: Mapping[int, int], grids: Grids
) -> list[list[np.ndarray]]:
    """Of each image the photo, its patches and its foreground, uint8 [HEIGHT, W, 3]; of those that
    have a single patch nothing.

    shown: row of the features -> sample number.
    """
    rows = {sample: row for row, sample in shown.items() if row in grids}
    loader = features.context.loader
    lines = []
    for sample, image in one_pass(index, loader, WholeImage(features), list(rows), targets=False):
        colors = fit_colors([grid := grids[rows[sample]]])
        if colors is None:
            continue
        photo = false_color.picture(image, features.context)
        width = max(1, round(HEIGHT * photo.shape[1] / photo.shape[0]))
        small = Image.fromarray(photo).resize((width, HEIGHT), Image.Resampling.BICUBIC)
        lines.append([np.asarray(small), *colors(grid).enlarged(HEIGHT, width)])
    return lines


def _stacked(lines: list[list[np.ndarray]]) -> np.ndarray:
    """Pictures of one height side by side, line under line, on white."""
    widths = [sum(picture.shape[1] + GAP for picture in line) for line in lines]
    canvas = np.full((len(lines) * (HEIGHT + GAP), max(widths), 3), 255, np.uint8)
    for number, line in enumerate(lines):
        left, top = 0, number * (HEIGHT + GAP)
        for picture in line:
            canvas[top : top + HEIGHT, left : left + picture.shape[1]] = picture
            left += picture.shape[1] + GAP
    return canvas
