"""Crops and center views of images that are not 8-bit RGB, in the set's own dtype.

Resizes are antialiased, in float32, channel by channel; integers are rounded, and clipped to the
range of their dtype, as bicubic filters overshoot. 8-bit RGB: ``data/crops.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcit_dino.data.crops import RESIZES, center_geometry
from xcit_dino.data.decode.native import NativeHeader, Values, decode_native, read_native_header
from xcit_dino.data.pixels import PixelFormat


class NativeImages:
    """Headers, crops and center views of a set's images.

    Args:
        form: of the set.
        bands: channels to read, numbered from 1; all where there are none.
    """

    def __init__(self, form: PixelFormat, bands: Sequence[int] = ()) -> None:
        self.form = form
        self.channels = [band - 1 for band in bands]

    def header(self, raw: bytes) -> NativeHeader:
        """Raises BadImage: damaged, or not of the set's kind."""
        return read_native_header(raw, self.form)

    def pixels(self, raw: bytes, header: NativeHeader) -> Values:
        """[H, W, C] in the set's own type.

        Raises:
            BadImage: damaged.
        """
        pixels = decode_native(raw, header, self.form)
        return pixels[..., self.channels] if self.channels else pixels

    def values(self, raw: bytes, header: NativeHeader) -> Tensor:
        """float32 [1, C, H, W], in the data's own units.

        Raises:
            BadImage: damaged.
        """
        return as_tensor(self.pixels(raw, header))

    def cut_crops(
        self, raw: bytes, header: NativeHeader, boxes: NDArray[np.int64], outputs: list[Tensor]
    ) -> None:
        """Resize boxes [V, 4] into ``outputs``: V times [1, C, S, S] in the set's dtype.

        Raises:
            BadImage: damaged.
        """
        image = self.values(raw, header)
        for (top, left, height, width), out in zip(boxes.tolist(), outputs, strict=True):
            resize_values(image[:, :, top : top + height, left : left + width], out)

    def center_view(
        self,
        raw: bytes,
        header: NativeHeader,
        resize: int | None,
        crop: int,
        out: Tensor,
        interpolation: str = "bicubic",
    ) -> None:
        """See :func:`center_view`."""
        center_view(self.values(raw, header), resize, crop, out, interpolation)


def center_view(
    image: Tensor, resize: int | None, crop: int, out: Tensor, interpolation: str = "bicubic"
) -> None:
    """As :func:`xcit_dino.data.crops.center_view`, of float32 [1, C, H, W]."""
    height, width = image.shape[-2:]
    sides, (top, left) = center_geometry(height, width, resize, crop)
    resized = resized_values(image, sides, interpolation)
    store(resized[:, :, top : top + crop, left : left + crop], out)


def as_tensor(pixels: Values) -> Tensor:
    """[H, W, C] -> float32 [1, C, H, W]."""
    wide = pixels.astype(np.float32)  # torch transposes float32 faster than uint16
    return torch.from_numpy(wide).permute(2, 0, 1)[None].contiguous()


def resize_values(values: Tensor, out: Tensor) -> None:
    """Antialiased bicubic resize of float32 [1, C, H, W] into ``out`` [1, C, h, w]."""
    size = [out.shape[-2], out.shape[-1]]
    if out.dtype == torch.float32 and list(values.shape[-2:]) != size:
        RESIZES["bicubic"](values, size, False, None, None, out=out)
    else:
        store(resized_values(values, size), out)


def resized_values(values: Tensor, size: list[int], interpolation: str = "bicubic") -> Tensor:
    """Antialiased resize of float32 [1, C, H, W]; the values themselves where they have the
    size."""
    if list(values.shape[-2:]) == size:
        return values
    return RESIZES[interpolation](values, size, False, None, None)


def store(values: Tensor, out: Tensor) -> None:
    """Copy float32 values into a tensor of any dtype: rounded and clipped where it holds
    integers."""
    if not out.dtype.is_floating_point:
        limits = torch.iinfo(out.dtype)
        values = values.round().clamp_(limits.min, limits.max)
    out.copy_(values)
