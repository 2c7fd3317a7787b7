"""One image of any kind -> what a network takes, exactly as the commands prepare it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from xcit_dino.data.augment import normalize
from xcit_dino.data.crops import center_view
from xcit_dino.data.decode.rgb import (
    BadImage,
    Deep,
    Scratch,
    decode,
    read_header,
    say_deep,
    to_rgb,
)
from xcit_dino.data.native import crops
from xcit_dino.data.native.single import values_of_array, values_of_file
from xcit_dino.data.pixels import PixelFormat
from xcit_dino.errors import InputError
from xcit_dino.inputs import BYTES, InputSettings
from xcit_dino.options import brief

Image = str | os.PathLike[str] | bytes | PIL.Image.Image | np.ndarray | Tensor
"""A path, an encoded file, a PIL image, an array [H, W, C] or [H, W], or a tensor [C, H, W]: of
uint8 in 1, 3 or 4 channels (alpha is dropped), or of what the network was trained on."""
KINDS = (str, os.PathLike, bytes, PIL.Image.Image, np.ndarray, Tensor)


@dataclass(frozen=True)
class Preprocess:
    """Resize, center crop and normalization of a network; call it with an image.

    It can be pickled, so it serves as the transform of a torchvision data set too.
    """

    inputs: InputSettings
    resize: int
    """Shorter side after resizing, in pixels."""
    crop: int
    """Side of the center crop, in pixels."""
    form: PixelFormat | None = None
    """Of the set that the network was trained on; None: not known. It names the page that is read
    of each file, and no-data values that files do not name."""

    @staticmethod
    def of(inputs: InputSettings, form: PixelFormat | None = None) -> Preprocess:
        """The network's own geometry, else the published protocol's."""
        return Preprocess(inputs, inputs.resize, inputs.crop, form)

    def __repr__(self) -> str:
        """One line, however many channels there are: means and statistics are in the fields."""
        inputs = self.inputs
        picked = f" picked from {self.form.channels}" if self.form and inputs.bands else ""
        taken = "8-bit RGB" if self.is_rgb8 else f"{inputs.channels} channels{picked}"
        sizes = f"resize={self.resize}, crop={self.crop}, {inputs.interpolation}"
        return f"Preprocess({sizes}, of {taken})"

    @property
    def is_rgb8(self) -> bool:
        """Whether the network takes 8-bit RGB, which any picture is turned into."""
        known = self.form is None or self.form.is_rgb8
        plain = (self.inputs.channels, self.inputs.window, self.inputs.bands) == (3, BYTES, ())
        return plain and known

    def __call__(self, image: Image) -> Tensor:
        """float32 [C, crop, crop].

        Raises:
            InputError: not an image, or not one that the network takes; says what it is.
        """
        if not isinstance(image, KINDS):
            raise InputError(
                f"{brief(image)} is no image; give a path, the bytes of a file, a PIL image, an "
                "array or a tensor"
            )
        inputs = self.inputs
        if self.is_rgb8:
            view = torch.empty(1, self.crop, self.crop, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
            center_view(pixels_of(image), self.resize, self.crop, view, inputs.interpolation)
        else:
            values = values_of(image, inputs, self.form)
            wide = crops.as_tensor(values)
            view = torch.empty(
                1, inputs.channels, self.crop, self.crop,
                dtype=getattr(torch, values.dtype.name),
            )  # fmt: skip
            crops.center_view(wide, self.resize, self.crop, view, inputs.interpolation)
        return normalize(view, inputs.mean, inputs.std, *inputs.window)[0]


def values_of(image: Image, inputs: InputSettings, form: PixelFormat | None) -> np.ndarray:
    """[H, W, C] in the image's own type, for a network of other than 8-bit RGB images.

    Raises:
        InputError: not an image, or not one that the network takes; says what it is.
    """
    name = str(image) if isinstance(image, str | os.PathLike) else "the image"
    try:
        if isinstance(image, str | os.PathLike):
            image = Path(image).read_bytes()
        if isinstance(image, bytes):
            return values_of_file(image, inputs, form)
        return values_of_array(array_of(image, inputs.channels), inputs, form)
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}") from None
    except BadImage as error:
        raise InputError(f"{name}: {error}") from None


def array_of(image: PIL.Image.Image | np.ndarray | Tensor, channels: int) -> np.ndarray:
    """[H, W, C] or [H, W] in the image's own type; pictures as gray where one channel is wanted."""
    if isinstance(image, PIL.Image.Image):
        upright = PIL.ImageOps.exif_transpose(image)
        deep = upright.mode.startswith(("I", "F"))
        return np.asarray(upright if deep else upright.convert("L" if channels == 1 else "RGB"))
    if isinstance(image, Tensor):
        array = image.detach().cpu().numpy()
        return array.transpose(1, 2, 0) if array.ndim == 3 else array
    return np.asarray(image)


def pixels_of(image: Image) -> np.ndarray:
    """uint8 [H, W, 3], upright; see :data:`Image`.

    Raises:
        InputError: not an image; says what it is.
    """
    if isinstance(image, str | os.PathLike | bytes):
        return decoded(image)
    if isinstance(image, PIL.Image.Image):
        return from_pil(image)
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
        image = image.transpose(1, 2, 0) if image.ndim == 3 else image
    return from_array(np.asarray(image))


def decoded(image: Any) -> np.ndarray:
    """Decode a file, given by its path or its bytes, as the loader does."""
    name = "the image" if isinstance(image, bytes) else str(image)
    try:
        raw = image if isinstance(image, bytes) else Path(image).read_bytes()
        pixels = decode(raw, read_header(raw), scratch := Scratch()).copy()
        say_deep(scratch.deep, name)
        return pixels
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}") from None
    except BadImage as error:
        raise InputError(f"{name}: {error}") from None


def from_pil(image: PIL.Image.Image) -> np.ndarray:
    """As a file of it would be decoded."""
    try:
        upright = to_rgb(PIL.ImageOps.exif_transpose(image))
    except BadImage as error:
        raise InputError(f"the image: {error}") from None
    if image.mode.startswith("I"):
        bits = int(np.asarray(image).max(initial=0)).bit_length()
        say_deep(Deep(1, min(bits, 16)), "the image")
    return np.asarray(upright)


def from_array(array: np.ndarray) -> np.ndarray:
    """[H, W] or [H, W, C] of uint8 with 1, 3 or 4 channels as RGB; alpha is dropped."""
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise InputError(
            f"an array of {array.dtype} {list(array.shape)} is no image; give uint8 [H, W, 3] "
            "(values from 0 to 255) or, as a tensor, [3, H, W]"
        )
    if array.ndim == 2:
        array = array[:, :, None]
    if array.shape[2] not in (1, 3, 4):
        raise InputError(
            f"an array of {list(array.shape)} has {array.shape[2]} channels; give [H, W, 3], or "
            "[3, H, W] as a tensor"
        )
    return np.repeat(array, 3, 2) if array.shape[2] == 1 else np.ascontiguousarray(array[:, :, :3])
