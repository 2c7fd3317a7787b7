"""Features of image files for retrieval, with the sizes, scales and pooling of DINO's scripts
(``eval_image_retrieval.py``, ``eval_copy_detection.py``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from xcit_dino.data.decode.rgb import BadImage
from xcit_dino.errors import InputError, one_line
from xcit_dino.eval.context import Context
from xcit_dino.eval.pictures.false_color import is_plain
from xcit_dino.eval.pictures.media import read_frames, read_values, resized
from xcit_dino.eval.ranges import OutputRange, warn_constant
from xcit_dino.eval.retrieval.parts import PART, Part, Parts
from xcit_dino.eval.target import PIXELS, Network
from xcit_dino.models.dense import padded_to
from xcit_dino.models.tokens import pooled_and_patches, stride_of
from xcit_dino.progress import progress
from xcit_dino.train.amp import autocast, resolve_precision
from xcit_dino.train.distributed import dist

SCALES = (1.0, 2**-0.5, 0.5)
GEM, LEAST = 4, 1e-6  # exponent of GeM, lower bound of the values that it pools
BATCH = 16  # images of one size at a time
Resize = Literal["longer", "square"]
Values = NDArray[Any]


@dataclass(frozen=True)
class Extractor:
    """How an image becomes a feature vector."""

    network: Network
    context: Context
    image_size: int
    resize: Resize
    multiscale: bool
    gem: bool
    parts: Parts

    def check(self, arch: str) -> int:
        """Number of features, found with black images.

        Raises:
            InputError: the network does not accept images of these sizes.
        """
        height = self.image_size if self.resize == "square" else self.image_size * 3 // 4
        shape = 1, self.context.inputs.channels, height, self.image_size
        try:
            return self(torch.zeros(shape)).shape[1]
        except InputError:
            raise
        except Exception as error:  # networks raise different types
            raise InputError(
                f"--arch {arch}: does not accept images of {self.image_size} x {height} pixels"
                f"{' and smaller' * self.multiscale} ({one_line(error, 120)}); add --resize square "
                "with the network's own --image_size, or take another --arch"
            ) from error

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in the set's own units -> float32 (B, D), on the device."""
        model = self.network.model.to(self.context.device)
        one_scale = partial(pixels if self.network.name == "pixels" else outputs, model, self.gem)
        dtype = resolve_precision(self.context.precision, self.context.device)
        with autocast(self.context.device, dtype):
            normalized = self.context.normalize(images)
            found = multi_scale(one_scale, normalized) if self.multiscale else one_scale(normalized)
        return found.float()

    def read(self, path: Path) -> Tensor:
        """An image (C, H, W) in its own units, resized.

        Raises:
            BadImage, OSError: it cannot be read.
        """
        read = read_frames(path) if is_plain(self.context) else read_values(path, self.context)
        values, _ = next(iter(read))
        if self.resize == "square":
            values = resized(values, self.image_size, self.image_size)
        return torch.tensor(values if self.resize == "square" else reduced(values, self.image_size)
                            ).permute(2, 0, 1)  # fmt: skip

    def all_of(self, files: Sequence[Path], label: str) -> tuple[np.ndarray, dict[Path, str]]:
        """Features float32 [N, D] of files, shared by the ranks and returned on each, NaN where a
        file cannot be read; and of these files the reasons. Parts that an earlier try has finished
        are not computed again.

        Raises:
            InputError: the network's outputs are not finite.
        """
        world = self.context.world
        own = range(world.rank * PART, len(files), world.size * PART)
        parts: dict[int, Part] = {}
        count = sum(len(files[start : start + PART]) for start in own)
        with progress(f"{label}, {self.network.name}", count, "images") as bar:
            for start in own:
                parts[start] = self._part(files[start : start + PART], bar.advance)
        every: list[Any] = [parts]
        if world.size > 1:
            every = [None] * world.size
            torch.distributed.all_gather_object(every, parts)
        return self._joined(files, {k: v for some in every for k, v in some.items()}, label)

    def _part(self, files: Sequence[Path], advance: Callable[[int], object]) -> Part:
        key = self.parts.key(self._settings(), files)
        if part := self.parts.load(key):
            advance(len(files))
            return part
        features, reasons = np.zeros((len(files), 0), np.float32), dict[int, str]()
        for rows, images in self._batches(files, reasons):
            found = self(images).cpu().numpy()
            if not features.size:
                features = np.full((len(files), found.shape[1]), np.nan, np.float32)
            features[rows] = found
            advance(len(rows))
        advance(len(reasons))
        self.parts.save(key, part := Part(features, reasons))
        return part

    def _settings(self) -> str:
        """All that the features of an image depend on."""
        dtype = resolve_precision(self.context.precision, self.context.device)
        how = self.image_size, self.resize, self.multiscale, self.gem
        inputs, device = self.context.inputs, self.context.device.type
        return repr((sorted(self.network.facts.items()), how, inputs, dtype, device))

    def _joined(
        self, files: Sequence[Path], parts: dict[int, Part], label: str
    ) -> tuple[np.ndarray, dict[Path, str]]:
        reasons = {
            files[start + row]: reason
            for start, part in parts.items()
            for row, reason in part.reasons.items()
        }
        width = max(part.features.shape[1] for part in parts.values())
        if not width:
            path, reason = next(iter(reasons.items()))
            raise InputError(f"{path}: {reason}; none of the {label} images can be read")
        table = np.full((len(files), width), np.nan, np.float32)
        seen = OutputRange(width, torch.device("cpu"))
        for start, (features, bad) in parts.items():
            if features.size:
                table[start : start + len(features)] = features
                seen.add(torch.from_numpy(np.delete(features, list(bad), axis=0)))
        if seen.constant() and dist.is_main():
            warn_constant(f"features of the {label} images ({self.network.name})")
        return table, dict(sorted(reasons.items()))

    def _batches(
        self, files: Sequence[Path], reasons: dict[int, str]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """(rows, images) of at most BATCH consecutive images of one size."""
        numbers: list[int] = []
        images: list[Tensor] = []
        for row, file in enumerate(files):
            try:
                image = self.read(file)
            except (BadImage, OSError) as reason:
                reasons[row] = one_line(reason, 120)
                continue
            if images and (len(images) == BATCH or image.shape != images[0].shape):
                yield numbers, torch.stack(images)
                numbers, images = [], []
            numbers.append(row)
            images.append(image)
        if images:
            yield numbers, torch.stack(images)


def outputs(model: nn.Module, gem: bool, images: Tensor) -> Tensor:
    """(B, C, H, W), normalized, padded to whole patches -> (B, D), with GeM (B, D + P)."""
    if hasattr(model, "patch_embed"):
        images = padded_to(images, stride_of(model))
    if not gem:
        return model(images)
    pooled, patches = pooled_and_patches(model, images)
    return torch.cat((pooled.float(), generalized_mean(patches.float())), 1)


def generalized_mean(patches: Tensor) -> Tensor:
    """(B, N, P) -> (B, P): the fourth root of the mean fourth power, of positive values."""
    return patches.clamp_min(LEAST).pow(GEM).mean(1).pow(1 / GEM)


def pixels(model: nn.Module, gem: bool, images: Tensor) -> Tensor:
    """The normalized image itself, averaged or repeated to 32 x 32: (B, C, H, W) -> (B, 1024 C)."""
    return F.adaptive_avg_pool2d(images, PIXELS).flatten(1)


def multi_scale(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The mean of a function of images (B, C, H, W) at three scales, of length 1 (DINO
    ``utils.py:multi_scale``)."""
    views = (
        images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="bilinear")
        for scale in SCALES
    )  # fmt: skip
    total = sum((function(view) for view in views), torch.zeros(()).to(images.device))
    return F.normalize(total / len(SCALES), dim=1)


def reduced(values: Values, longer: int) -> Values:
    """An image [H, W, C], reduced so that its longer side is ``longer`` pixels; smaller ones are
    left as they are (Pillow's ``thumbnail`` with Lanczos, as in DINO)."""
    height, width = values.shape[:2]
    if max(height, width) <= longer:
        return values
    if values.dtype == np.uint8 and values.shape[2] == 3:
        photo = Image.fromarray(values)
        photo.thumbnail((longer, longer), Image.Resampling.LANCZOS)
        return np.asarray(photo)
    scale = longer / max(height, width)
    return resized(values, max(1, round(height * scale)), max(1, round(width * scale)))
