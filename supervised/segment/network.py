"""Backbone and head in one network: images -> logits at the head's resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xcit_dino.models.dense import (
    OUTPUT,
    TappedBackbone,
    freeze_unused,
    map_sizes,
    pyramid_of,
    pyramid_taps,
)
from xcit_dino.supervised.segment.config import SegmentConfig
from xcit_dino.supervised.segment.heads import LinearHead, SemanticFPN, UperNet

HEADS = {"fpn": SemanticFPN, "upernet": UperNet}


class Segmenter(TappedBackbone):
    """Backbone, pyramid and head; the other arguments are those of :class:`TappedBackbone`."""

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        taps: Sequence[int],
        frozen: bool,
        pyramid: nn.Module,
    ) -> None:
        super().__init__(backbone, taps, frozen, pyramid)
        self.head = head

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> logits (B, classes, h, w) of every head; see ``heads.py``."""
        return self.head(self.maps(images))


def build_segmenter(config: SegmentConfig, backbone: nn.Module, classes: int) -> Segmenter:
    """A network with a new head.

    Raises:
        InputError: the backbone has no such layers, or its maps do not fit the head.
    """
    task, channels = config.segmentation, config.segmentation.channels
    linear = task.head == "linear"
    taps = task.taps or ((OUTPUT,) if linear else pyramid_taps(backbone))
    sizes = map_sizes(backbone, taps, task.crop_size, channels)
    dims = [dim for dim, _ in sizes]
    if linear:
        pyramid: nn.Module = nn.Identity()
        head: nn.Module = LinearHead(dims, classes, len(config.optim.lrs))
    else:
        pyramid, head = pyramid_of(sizes), HEADS[task.head](dims, classes)
    network = Segmenter(backbone, head, taps, not task.finetune, pyramid)
    if task.finetune:
        images = next(network.parameters()).new_zeros(2, channels, task.crop_size, task.crop_size)
        freeze_unused(network, lambda trial: torch.stack([x.sum() for x in trial(images)]).sum())
    return network
