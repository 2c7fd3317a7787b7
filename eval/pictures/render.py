"""Pictures of what a run sees: its crops after augmentation, where its class token looks.

For the report (tiles) and for TensorBoard (mosaics). Pixels are uint8 [H, W, 3].
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
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
from xcit_dino.eval.pictures.attention import Pixels, overlay
from xcit_dino.models.xcit import XCiT

SMALL = 64  # pictures up to this side stay as they are, so that a browser shows their pixels
SIDE = 128  # larger ones are shrunk to it, and small photos enlarged before maps are laid on them
GAP = 4  # pixels between the tiles of a mosaic
GOOD, BAD = (0, 112, 79), (198, 82, 0)  # frames; told apart by colour-blind readers too


def photos(index: ShardIndex, samples: Sequence[int], context: Context) -> dict[int, Pixels]:
    """Sample number -> the centre view that evaluations see; unreadable ones are not in it."""
    wanted = np.unique(np.asarray(samples, np.int64))
    found = {}
    for batch, _, numbers in context.images(index, wanted, batch_size=64, labelled=False):
        pixels = batch.permute(0, 2, 3, 1).numpy()
        found |= {int(number): pixels[i].copy() for i, number in enumerate(numbers)}
    return found


@dataclass(frozen=True)
class TrainingCrops:
    """How a training cuts and augments its crops."""

    crops: CropsConfig
    augment: AugmentConfig
    loader: LoaderConfig
    seed: int


def crops_of(
    config: TrainingCrops, index: ShardIndex, samples: Sequence[int], epoch: int
) -> list[list[Pixels]]:
    """The crops of some samples in an epoch as the network gets them, globals first; colours are
    brought back from the normalised values."""
    numbers = np.asarray(samples, np.int64)
    ring = Ring(1, slot_shapes(config.crops, len(numbers)))
    work = CropWork(index, open_source(index, config.loader), ring, config.crops, config.seed)
    done = work[Task(0, numbers, epoch=epoch)]
    global_crops, local_crops = ring.views(0)
    labels = torch.zeros(len(numbers), dtype=torch.int64)
    batch = Batch(0, 0, epoch, numbers, done.sources, labels, global_crops, local_crops)
    groups = Augment(config.augment, seed=config.seed)(batch)
    crops = [
        crop
        for group in groups
        for crop in denormalised(group, config.augment).unflatten(0, (-1, len(numbers)))
    ]
    return [[crop[i].numpy() for crop in crops] for i in range(len(numbers))]


def denormalised(images: Tensor, config: AugmentConfig) -> Tensor:
    """Network input [N, 3, H, W] -> uint8 [N, H, W, 3]."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in config.normalization)
    pixels = (images.float() * std + mean).clamp(0, 1).mul(255).round()
    return pixels.to(torch.uint8).permute(0, 2, 3, 1)


@torch.no_grad()
def attention_of(
    model: nn.Module, images: Sequence[Pixels], context: Context
) -> list[list[Pixels]]:
    """For each image of one size: itself, the map of every head of the last class-attention layer
    laid over it, and their mean.

    Raises:
        InputError: the network has no class attention.
    """
    if not isinstance(model, XCiT):
        raise InputError("only XCiT has class attention to show")
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    maps = model.get_attention(context.normalize(batch))[-1].float().cpu().numpy()
    rows = []
    for image, heads in zip(images, maps, strict=True):
        photo = resized(image, SIDE)
        rows.append([photo, *(overlay(photo, heat) for heat in (*heads, heads.mean(0)))])
    return rows


def resized(pixels: Pixels, side: int) -> Pixels:
    """A square of that side, bicubic."""
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


def framed(pixels: Pixels, right: bool) -> Pixels:
    """With a frame that says whether the class is right."""
    framed = pixels.copy()
    width = max(1, len(pixels) // 24)
    inner = (slice(width, -width), slice(width, -width))
    framed[:] = GOOD if right else BAD
    framed[inner] = pixels[inner]
    return framed


def mosaic(rows: Sequence[Sequence[Pixels]], side: int = SIDE) -> Pixels:
    """Rows of tiles of one size on white; tiles smaller than ``side`` are enlarged by whole
    pixels."""
    columns = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (side + GAP), columns * (side + GAP), 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, pixels in enumerate(row):
            method = Image.Resampling.NEAREST if len(pixels) < side else Image.Resampling.BICUBIC
            tile = np.asarray(Image.fromarray(pixels).resize((side, side), method))
            canvas[y * (side + GAP) :, x * (side + GAP) :][:side, :side] = tile
    return canvas


def data_uri(pixels: Pixels) -> str:
    """A picture as text for a page: small ones as PNG, others as JPEG of side 128 at most."""
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    kind = "png" if max(image.size) <= SMALL else "jpeg"
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    image.save(file, kind, **({"quality": 88} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
