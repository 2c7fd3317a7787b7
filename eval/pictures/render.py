"""Pictures of a run's inputs: augmented crops, and attention maps over images.

For the report (tiles) and for TensorBoard (mosaics). Pixels are uint8 [H, W, 3].
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from xcit_dino.data.augment import Augment
from xcit_dino.data.config import AugmentConfig, CropsConfig, LoaderConfig
from xcit_dino.data.io.storage import open_source
from xcit_dino.data.loader import Batch, slot_shapes
from xcit_dino.data.ring import Ring
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.data.workers import CropWork, Task
from xcit_dino.errors import InputError
from xcit_dino.eval.context import Context
from xcit_dino.eval.pictures.attention import overlay
from xcit_dino.eval.pictures.false_color import colors_of, is_plain, picture
from xcit_dino.eval.pictures.media import Pixels
from xcit_dino.models.xcit import XCiT

SMALL = 64  # pictures up to this side keep their size, so that a browser shows their pixels
SIDE = 128  # larger ones are downsized to it, small photos upsampled before maps are overlaid
WIDE = 320  # frames of videos
GAP = 4  # pixels between the tiles of a mosaic
GOOD, BAD = (0, 112, 79), (198, 82, 0)  # frame colors, distinguishable for color-blind readers


def photos(index: ShardIndex, samples: Sequence[int], context: Context) -> dict[int, Pixels]:
    """Sample number -> picture of the center crop as in evaluations; unreadable ones are
    missing."""
    found = views(index, samples, context)
    return {number: picture(values, context) for number, values in found.items()}


def views(
    index: ShardIndex, samples: Sequence[int], context: Context
) -> dict[int, NDArray[np.generic]]:
    """Sample number -> center crop [H, W, C] in the set's own units; unreadable ones are
    missing."""
    wanted = np.unique(np.asarray(samples, np.int64))
    found = {}
    for batch, _, numbers in context.images(index, wanted, batch_size=64, labeled=False):
        pixels = batch.permute(0, 2, 3, 1).numpy()
        found |= {int(number): pixels[i].copy() for i, number in enumerate(numbers)}
    return found


@dataclass(frozen=True)
class TrainingCrops:
    """Crop and augmentation settings of a training."""

    stages: Sequence[tuple[int, CropsConfig]]
    """(first epoch, geometry) of each stage."""
    augment: AugmentConfig
    loader: LoaderConfig
    seed: int

    def at(self, epoch: int) -> CropsConfig:
        """The crops of an epoch, counted from 0."""
        return [crops for first, crops in self.stages if first <= epoch][-1]


def training_crops(
    config: TrainingCrops,
    index: ShardIndex,
    samples: Sequence[int],
    epoch: int,
    context: Context | None = None,
) -> list[list[Pixels]]:
    """The crops of some samples in an epoch as seen by the network, global crops first; colors are
    restored from the normalized values.

    context: of the pictures, for images that are not RGB.
    """
    count = len(samples)
    crops = [
        crop
        for group in network_crops(config, index, samples, epoch)
        for crop in np.split(
            denormalize(group, config.augment, context), max(1, len(group) // count)
        )
        if len(crop)
    ]
    return [[crop[i] for crop in crops] for i in range(count)]


def network_crops(
    config: TrainingCrops, index: ShardIndex, samples: Sequence[int], epoch: int
) -> list[Tensor]:
    """The global and the local crops of N samples in an epoch, augmented and normalized: float32
    [crops x N, C, H, W] each, the first crop of every sample, then the second ...
    """
    numbers, bands = np.asarray(samples, np.int64), config.loader.bands
    form, geometry = index.pixels.select(bands), config.at(epoch)
    ring = Ring(1, slot_shapes(geometry, len(numbers), form.channels), form)
    work = CropWork(
        index, open_source(index, config.loader), ring, geometry, config.seed, bands=bands
    )
    done = work[Task(0, numbers, epoch=epoch)]
    global_crops, local_crops = ring.views(0)
    labels = torch.zeros(len(numbers), dtype=torch.int64)
    batch = Batch(0, 0, epoch, numbers, done.sources, labels, global_crops, local_crops)
    return list(Augment(config.augment, seed=config.seed)(batch))


def denormalize(images: Tensor, config: AugmentConfig, context: Context | None = None) -> Pixels:
    """Network input [N, C, H, W] -> uint8 [N, H, W, 3]."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in config.normalization)
    unit = (images.float() * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    if context is None or is_plain(context):
        return unit.mul(255).round().to(torch.uint8).numpy()
    return colors_of(context)(unit.numpy())


@torch.no_grad()
def attention_rows(
    model: nn.Module, images: Sequence[NDArray[np.generic]], context: Context
) -> list[list[Pixels]]:
    """For each image [H, W, C] in the set's own units: its picture, the overlaid map of every head
    of the last class-attention layer, and the overlaid mean; all images have one size.

    Raises:
        InputError: the network has no class attention.
    """
    if not isinstance(model, XCiT):
        raise InputError("only XCiT has class attention to show")
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    maps = model.get_attention(context.normalize(batch))[-1].float().cpu().numpy()
    rows = []
    for image, heads in zip(images, maps, strict=True):
        photo = resize_square(picture(image, context), SIDE)
        rows.append([photo, *(overlay(photo, heat) for heat in (*heads, heads.mean(0)))])
    return rows


def resize_square(pixels: Pixels, side: int) -> Pixels:
    """Resize to a square of this side, bicubic."""
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


def framed(pixels: Pixels, right: bool) -> Pixels:
    """Add a frame whose color shows whether the class is correct."""
    framed = pixels.copy()
    width = max(1, len(pixels) // 24)
    inner = (slice(width, -width), slice(width, -width))
    framed[:] = GOOD if right else BAD
    framed[inner] = pixels[inner]
    return framed


def mosaic(rows: Sequence[Sequence[Pixels]], side: int = SIDE) -> Pixels:
    """Rows of tiles of one size on white; tiles smaller than ``side`` are enlarged with
    nearest-neighbor interpolation."""
    columns = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (side + GAP), columns * (side + GAP), 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, pixels in enumerate(row):
            method = Image.Resampling.NEAREST if len(pixels) < side else Image.Resampling.BICUBIC
            tile = np.asarray(Image.fromarray(pixels).resize((side, side), method))
            canvas[y * (side + GAP) :, x * (side + GAP) :][:side, :side] = tile
    return canvas


def data_uri(pixels: Pixels, side: int = SIDE) -> str:
    """Encode a picture as a data URI: small ones as PNG, others as JPEG of at most ``side`` px."""
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    kind = "png" if max(image.size) <= SMALL else "jpeg"
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
    image.save(file, kind, **({"quality": 88} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
