"""Pictures of patch features: photo, patches and foreground side by side, in the colors of the
first three principal components (``eval/dense/components.py``).

Each photo has its own components: of unlike photos together the first ones separate the photos, and
not their foreground. An animation or a video has the same in all frames, and with
``--shared_colors true`` all files have.

For ``photo.jpg``: ``DST/photo/patches.png``, ``foreground.png`` and ``all.png``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from xcit_dino.data import video
from xcit_dino.data.decode.rgb import BadImage
from xcit_dino.eval.context import Context
from xcit_dino.eval.dense.components import SAMPLE_IMAGES, PatchColors, fit_colors
from xcit_dino.eval.pictures import false_color
from xcit_dino.eval.pictures.media import (
    ANIMATED,
    Drawing,
    Pixels,
    Values,
    read_image,
    resize_to_patches,
)
from xcit_dino.models.dense import grid_features
from xcit_dino.models.tokens import stride_of


@dataclass(frozen=True)
class GridFeatures:
    """A network's patch features of whole images of any size."""

    model: nn.Module
    tap: int
    """Layer: a block or stage counted from 0, -1 the output."""
    image_size: int
    """Shorter side that images are resized to; 0: they keep their size."""
    context: Context

    def resized(self, pixels: Values) -> Values:
        """[H, W, C] in the set's own units, with sides of whole patches."""
        return resize_to_patches(pixels, self.image_size, stride_of(self.model))

    @torch.no_grad()
    def of(self, images: Sequence[Values]) -> NDArray[np.float32]:
        """Resized images of one size -> [B, h, w, D]."""
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return (
            grid_features(self.model, self.context.normalize(batch), self.tap).float().cpu().numpy()
        )


def shared_colors(features: GridFeatures, files: Sequence[Path]) -> PatchColors | None:
    """Colors found in evenly spaced files and frames."""
    frames = some_frames(files, features.context)
    return fit_colors(features.of([features.resized(frame)])[0] for frame in frames)


def patch_drawing(features: GridFeatures, path: Path) -> Drawing:
    """Draws the patches of a file in colors of its own."""
    moves = path.suffix.lower() in ANIMATED + video.SUFFIXES
    return partial(pictures_of, features, shared_colors(features, [path]) if moves else None)


def some_frames(files: Sequence[Path], context: Context) -> Iterator[Values]:
    """At most SAMPLE_IMAGES evenly spaced images or frames of them; unreadable ones are skipped."""
    chosen = np.unique(np.linspace(0, len(files) - 1, SAMPLE_IMAGES).astype(int)).tolist()
    each = max(1, SAMPLE_IMAGES // len(chosen))
    for number in chosen:
        path = files[number]
        with suppress(BadImage):
            if path.suffix.lower() in video.SUFFIXES:
                with video.reading(path) as frames:
                    step = max(1, frames.count // each)
                    yield from islice(frames, 0, step * each, step)
            else:
                every = [frame for frame, _ in read_image(path, context)]
                yield from every[:: max(1, len(every) // each)][:each]


def pictures_of(
    features: GridFeatures, colors: PatchColors | None, pixels: Values
) -> dict[str, Pixels]:
    """``patches``, ``foreground`` and ``all`` of one image, [H, W, 3] each but the last.

    colors: None: the image's own.

    Raises:
        BadImage: it has a single patch.
    """
    image = features.resized(pixels)
    photo = false_color.picture(image, features.context)
    (grid,) = features.of([image])
    colors = colors or fit_colors([grid])
    if colors is None:
        raise BadImage("has a single patch; take a larger --image_size")
    found = colors(grid).enlarged(*photo.shape[:2])
    return found._asdict() | {"all": np.concatenate([photo, *found], 1)}
