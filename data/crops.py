"""Encoded image -> uint8 crops: decode once, cut and resize every crop, nothing else.

Operations on pixel values (flip, color, blur ...) run on the device (augment.py). Every crop is
resized directly into the memory from which it is copied to the device, by
torch's antialiased bicubic on uint8 (Pillow's filter to within one level). Other images than 8-bit
RGB are resized in float32, and stored in their own dtype (``data/native/crops.py``).

Large JPEGs are decoded at 1/2, 1/4 or 1/8 (inside the DCT, in effect a box reduction) when every
crop of the sample still shrinks by at least ``KEEP`` afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcit_dino.data.config import CropsConfig
from xcit_dino.data.decode.rgb import Header, Pixels, Scratch, decode
from xcit_dino.data.rng import random_uniforms

KEEP = 1.5  # a reduced JPEG keeps this many pixels a side for each pixel of every crop
ATTEMPTS = 10  # torchvision's RandomResizedCrop.get_params
BOX_STREAM = 11
RESIZES = {
    "bicubic": torch._C._nn._upsample_bicubic2d_aa,  # pyright: ignore[reportAttributeAccessIssue]
    "bilinear": torch._C._nn._upsample_bilinear2d_aa,  # pyright: ignore[reportAttributeAccessIssue]
}


def crop_boxes(
    config: CropsConfig,
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    samples: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Boxes (top, left, height, width) of every crop: [B, num_crops, 4], globals first.

    torchvision's RandomResizedCrop.get_params for all images and attempts at once: area uniform,
    log-ratio uniform, the first of ten attempts that fits, else the largest central box.
    """
    crops = np.arange(config.num_crops)
    is_global = crops < config.global_crops_number
    scale = np.where(is_global[:, None], config.global_crops_scale, config.local_crops_scale)
    keys = (samples[:, None, None, None], crops[:, None, None], np.arange(ATTEMPTS)[:, None])
    u = random_uniforms(seed, BOX_STREAM, epoch, *keys, np.arange(4))  # [B, V, ATTEMPTS, 4]
    H, W = heights[:, None, None], widths[:, None, None]
    area = H * W * (scale[:, :1] + u[..., 0] * (scale[:, 1:] - scale[:, :1]))
    low, high = np.log(config.crops_ratio)
    ratio = np.exp(low + u[..., 1] * (high - low))
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (0 < w) & (w <= W) & (0 < h) & (h <= H)
    top = np.floor(u[..., 2] * (H - h + 1)).astype(np.int64)
    left = np.floor(u[..., 3] * (W - w + 1)).astype(np.int64)
    boxes = np.stack([top, left, h, w], -1)  # [B, V, ATTEMPTS, 4]
    first = fits.argmax(-1)[..., None, None]
    chosen = np.take_along_axis(boxes, first, 2)[:, :, 0]
    central = _central_boxes(heights, widths, config.crops_ratio)[:, None]
    return np.where(fits.any(-1)[..., None], chosen, central)


def cut_crops(
    raw: bytes,
    header: Header,
    boxes: NDArray[np.int64],
    outputs: list[Tensor],
    scratch: Scratch,
    cutter: Cutter,
) -> None:
    """Decode one image and resize its boxes [V, 4] into ``outputs``: V times [1, 3, S, S] uint8.

    Raises:
        BadImage: see :func:`decode`.
    """
    sizes = np.array([out.shape[-1] for out in outputs])
    reduce = 1 if header.pillow is not None else reduction(boxes, sizes)
    pixels = decode(raw, header, scratch, reduce)
    if pixels.shape[:2] != (header.height, header.width):
        boxes = _scaled(boxes, header, pixels.shape[:2])
    for box, out in zip(boxes.tolist(), outputs, strict=True):
        resize_into(cutter.cut(pixels, box), out)


class Cutter:
    """Copies boxes of images into one reused buffer.

    The resize needs contiguous input, and torch would allocate that copy each time.
    """

    def __init__(self) -> None:
        self._reserve(0)

    def cut(self, pixels: Pixels, box: Sequence[int]) -> Tensor:
        """A box (top, left, height, width) of [H, W, 3] as [1, 3, height, width], channels last.

        Valid until the next cut.
        """
        top, left, height, width = box
        size = height * width * 3
        if size > self._array.size:
            self._reserve(size)
        target = self._array[:size].reshape(height, width, 3)
        np.copyto(target, pixels[top : top + height, left : left + width])
        return torch.as_strided(self._tensor, (1, 3, height, width), (size, 1, width * 3, 3))

    def _reserve(self, size: int) -> None:
        self._tensor = torch.empty(size, dtype=torch.uint8)
        self._array = self._tensor.numpy()


def resize_into(pixels: Tensor, out: Tensor, interpolation: str = "bicubic") -> None:
    """Antialiased resize of uint8 [1, 3, H, W] into ``out`` [1, 3, h, w].

    What ``F.interpolate(mode=interpolation, antialias=True)`` calls, with a destination; channels
    last on both sides is its fast case.
    """
    size = (out.shape[-2], out.shape[-1])
    if pixels.shape[-2:] == size:
        out.copy_(pixels)
    else:
        RESIZES[interpolation](pixels, size, False, None, None, out=out)


def reduction(boxes: NDArray[np.int64], sizes: NDArray[np.int64]) -> int:
    """The largest of 8, 4, 2, 1 by which the sides may be reduced while decoding; see ``KEEP``."""
    shrink = (boxes[:, 2:].min(1) / sizes).min()
    return next((factor for factor in (8, 4, 2) if shrink >= KEEP * factor), 1)


def center_view(
    pixels: Pixels, resize: int | None, crop: int, out: Tensor, interpolation: str = "bicubic"
) -> None:
    """Shorter side to ``resize``, then the central square of side ``crop`` into ``out``.

    torchvision's Resize (antialiased) and CenterCrop. ``resize=None`` keeps the image's
    own size, and enlarges it only where it is smaller than the crop.
    """
    height, width = pixels.shape[:2]
    sides, (top, left) = center_geometry(height, width, resize, crop)
    image = Cutter().cut(pixels, (0, 0, height, width))
    resized = torch.empty((1, *sides, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    resize_into(image, resized, interpolation)
    out.copy_(resized[:, :, top : top + crop, left : left + crop])


def center_geometry(
    height: int, width: int, resize: int | None, crop: int
) -> tuple[list[int], tuple[int, int]]:
    """Sides of an image once resized, and top and left of its central square; see
    :func:`center_view`."""
    short = min(height, width)
    target = resize if resize is not None else max(short, crop)
    sides = [target if side == short else int(target * side / short) for side in (height, width)]
    return sides, (round((sides[0] - crop) / 2), round((sides[1] - crop) / 2))


def _central_boxes(
    heights: NDArray[np.int64], widths: NDArray[np.int64], ratio: tuple[float, float]
) -> NDArray[np.int64]:
    """The fallback of RandomResizedCrop: the whole image, cut to the nearest allowed ratio."""
    low, high = ratio
    shape = widths / heights
    h = np.where(shape < low, np.rint(widths / low), heights).astype(np.int64)
    w = np.where(shape > high, np.rint(heights * high), widths).astype(np.int64)
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], -1)


def _scaled(
    boxes: NDArray[np.int64], header: Header, decoded: tuple[int, int]
) -> NDArray[np.int64]:
    """Boxes on the reduced image: edges to the nearest of its pixels."""
    factor = np.array(decoded) / (header.height, header.width)
    begin = np.rint(boxes[:, :2] * factor).astype(np.int64)
    end = np.rint((boxes[:, :2] + boxes[:, 2:]) * factor).astype(np.int64)
    return np.concatenate([begin, np.maximum(end - begin, 1)], 1)
