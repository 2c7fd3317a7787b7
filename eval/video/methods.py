"""What makes the masks of a video: features of a network or of raw pixels, or the first mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit_dino.eval.context import Context
from xcit_dino.eval.target import EvalTarget, pretrained, random_network
from xcit_dino.eval.video.config import PropagateConfig
from xcit_dino.models.dense import grid_features, probe_grid
from xcit_dino.models.tokens import stride_of

LONGER = 64  # the longer side of a frame becomes a multiple of it (DINO)
USUAL_FRAME = (480, 854)  # of DAVIS


@dataclass(frozen=True)
class Method:
    """One way to follow objects."""

    name: str
    """``pretrained``, ``random``, ``pixels`` or ``copy``."""
    facts: dict[str, Any]
    """Part of the protocol."""
    features: Callable[[Tensor], Tensor] | None
    """Normalized images (1, C, H, W) -> (1, h, w, D); None repeats the first mask."""
    width: int
    """D."""
    multiple: int
    """Of which the sides of images are multiples, in pixels."""

    @property
    def suffix(self) -> str:
        """Suffix of a result's name."""
        return "" if self.name == "pretrained" else f"/{self.name}"


def methods(config: PropagateConfig, target: EvalTarget, context: Context) -> Iterator[Method]:
    """Yield the pretrained network and, with ``--baselines``, a randomly initialized one, raw
    pixels, and the first mask repeated.

    Raises:
        InputError: no such layer, or the network does not accept frames.
    """
    network = pretrained(target)
    multiple = stride_of(network.model)
    height, width = network_size(USUAL_FRAME, config.image_size, multiple)
    frame = torch.zeros(1, context.inputs.channels, height, width, device=context.device)
    model = network.model.to(context.device)
    stride, width = probe_grid(model, config.tap, target.arch, frame)

    def of_network(name: str, model: nn.Module, facts: dict[str, Any]) -> Method:
        features = partial(grid_features, model.to(context.device), tap=config.tap)
        return Method(name, facts, features, width, multiple)

    yield of_network(network.name, network.model, network.facts)
    if config.baselines:
        other = random_network(target.arch, target.channels)
        yield of_network(other.name, other.model, other.facts)
        pixels = partial(pixels_of_patches, side=stride)
        facts = {"network": "pixels", "side": stride}
        yield Method("pixels", facts, pixels, target.channels * stride**2, multiple)
        yield Method("copy", {"network": "copy"}, None, 1, multiple)


def network_size(size: tuple[int, int], image_size: int, multiple: int) -> tuple[int, int]:
    """Height and width of a frame for the network: the shorter side becomes ``image_size``, the
    longer one is rounded down to a multiple of 64 (DINO), and both are to whole patches."""
    longer = image_size * max(size) / min(size)
    coarse = LONGER if LONGER % multiple == 0 else multiple
    pairs = (image_size, multiple), (longer, coarse)
    short, long = (max(1, int(side // step)) * step for side, step in pairs)
    return (short, long) if size[0] <= size[1] else (long, short)


def pixels_of_patches(images: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B, H / side, W / side, C x side x side): a patch's own pixels."""
    return F.pixel_unshuffle(images, side).permute(0, 2, 3, 1)
