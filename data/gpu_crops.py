"""``--decoder cuda``: JPEGs are decoded and cropped on the GPU (torchvision's nvJPEG).

For machines with few cores a GPU. Workers only read bytes and draw boxes; what nvJPEG does not take
(PNG, CMYK, EXIF-rotated ...) they decode. Crops are cut and resized as matrix products with
resampling matrices, the filter of crops.py in float32. nvJPEG upsamples chroma more coarsely than
libjpeg, so pixels differ by a few levels from the host's.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcit_dino.data.decode.rgb import Header, Pixels, decode
from xcit_dino.data.packed import to_device
from xcit_dino.data.workers import AnyHeader, CropWork, Done, Task

CUBIC_A = -0.5  # Keys' bicubic, as Pillow and torch's antialiased one


class EncodedWork(CropWork):
    """A micro-batch's encoded images and boxes instead of its crops."""

    def __getitem__(self, task: Task) -> Done:
        size = len(task.samples)
        self._images: list[bytes | Pixels] = [b""] * size
        self._chosen = np.zeros((size, self.crops.num_crops, 4), np.int64)
        done = super().__getitem__(task)
        return replace(done, images=self._images, boxes=self._chosen)

    def _fill(
        self, slot: int, place: int, image: bytes, header: AnyHeader, boxes: NDArray[np.int64]
    ) -> None:
        assert isinstance(header, Header)  # other kinds of images are refused
        simple = header.pillow is None and header.orientation == 1
        self._images[place] = image if simple else decode(image, header, self.scratch).copy()
        self._chosen[place] = boxes


class DeviceCropper:
    """Turns the results of :class:`EncodedWork` into crops on ``device``.

    Args:
        host: repeats a micro-batch when the device fails on one of its images (torchvision does not
            report which), and replaces the damaged ones.
        device: with CUDA; a CPU does the same, slowly.
    """

    def __init__(self, host: CropWork, device: torch.device) -> None:
        self.host, self.device = host, device

    def __call__(self, done: Done) -> tuple[Done, Tensor, Tensor]:
        """The final result and its crops: uint8 [G, B, 3, S, S] and [L, B, 3, s, s]."""
        try:
            return done, *self._crops(done)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            done = self.host[done.task]
            global_crops, local_crops = self.host.ring.views(done.task.slot)
            return done, global_crops.to(self.device), local_crops.to(self.device)

    def _crops(self, done: Done) -> tuple[Tensor, Tensor]:
        assert done.images is not None and done.boxes is not None
        crops, G = self.host.crops, self.host.crops.global_crops_number
        boxes = to_device(torch.from_numpy(done.boxes), self.device)  # all in one copy
        pairs = list(zip(self._decoded(done.images), boxes, strict=True))
        global_crops = [resampled(x, boxes[:G], crops.global_crops_size) for x, boxes in pairs]
        local_crops = [resampled(x, boxes[G:], crops.local_crops_size) for x, boxes in pairs]
        return torch.stack(global_crops, 1), torch.stack(local_crops, 1)

    def _decoded(self, images: list[bytes | Pixels]) -> list[Tensor]:
        """Decode into uint8 [3, H, W] each, on the device."""
        from torchvision.io import (
            ImageReadMode,
            decode_jpeg,
        )  # two seconds that other commands save

        encoded = [
            torch.frombuffer(bytearray(image), dtype=torch.uint8)
            for image in images
            if isinstance(image, bytes)
        ]
        decoded = iter(
            decode_jpeg(encoded, mode=ImageReadMode.RGB, device=self.device) if encoded else []
        )
        return [
            next(decoded)
            if isinstance(image, bytes)
            else to_device(torch.from_numpy(image), self.device).permute(2, 0, 1)
            for image in images
        ]


def resampled(image: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Boxes [V, 4] of uint8 [3, H, W] as uint8 [V, 3, size, size]: antialiased bicubic."""
    _, height, width = image.shape
    top, left, h, w = boxes.to(image.device, torch.float32).unbind(1)
    rows, columns = resampling(top, h, size, height), resampling(left, w, size, width)
    x = image.float().transpose(0, 1).reshape(height, 3 * width)
    x = (rows.flatten(0, 1) @ x).view(-1, size * 3, width) @ columns.mT
    return x.view(-1, size, 3, size).add_(0.5).clamp_(0, 255).to(torch.uint8).transpose(1, 2)


def resampling(start: Tensor, length: Tensor, size: int, of: int) -> Tensor:
    """Matrices [V, size, of]: row i holds what output i takes from each input of ``start`` [V] to
    ``start + length`` (as Pillow's ImagingResample: the filter widens when shrinking, and is cut
    off and renormalized at the box's edges)."""
    at = torch.arange(of, device=start.device) + 0.5
    scale = (length / size)[:, None, None]
    begin = start[:, None, None]
    center = begin + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    weights = cubic((at - center) / scale.clamp(min=1))
    weights = weights * ((at > begin) & (at < begin + length[:, None, None]))
    return weights / weights.sum(-1, keepdim=True)


def cubic(x: Tensor) -> Tensor:
    """Keys, "Cubic convolution interpolation for digital image processing" (1981), eq. 15."""
    x = x.abs()
    near = ((CUBIC_A + 2) * x - (CUBIC_A + 3)) * x * x + 1
    far = CUBIC_A * (((x - 5) * x + 8) * x - 4)
    return near * (x < 1) + far * ((x >= 1) & (x < 2))
