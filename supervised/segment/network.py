"""Backbone and head in one network: images -> logits at the head's resolution."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xcit_dino.errors import InputError
from xcit_dino.models.dense import OUTPUT, Pyramid, feature_maps, map_sizes, pyramid_taps
from xcit_dino.supervised.segment.config import SegmentConfig
from xcit_dino.supervised.segment.heads import LinearHead, SemanticFPN, UperNet

HEADS = {"fpn": SemanticFPN, "upernet": UperNet}


class Segmenter(nn.Module):
    """Backbone, pyramid and head.

    Args:
        frozen: the backbone is not trained; its batch-norms keep their statistics and drop-path is
            off.
        pyramid: whether the maps are rescaled to strides 4, 8, 16, 32.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        taps: Sequence[int],
        frozen: bool,
        pyramid: nn.Module,
    ) -> None:
        super().__init__()
        self.backbone, self.pyramid, self.head = backbone, pyramid, head
        self.taps, self.frozen = tuple(taps), frozen
        if frozen:
            backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> Segmenter:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> logits (B, classes, h, w) of every head; see ``heads.py``."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = feature_maps(self.backbone, images, self.taps)
        return self.head(self.pyramid(maps))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more dimensions exempt from weight decay."""
        spared = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in spared}


def build_segmenter(config: SegmentConfig, backbone: nn.Module, classes: int) -> Segmenter:
    """A network with a new head.

    Raises:
        InputError: the backbone has no such layers, or its maps do not fit the head.
    """
    task, channels = config.segmentation, config.segmentation.channels
    linear = task.head == "linear"
    taps = task.taps or ((OUTPUT,) if linear else pyramid_taps(backbone))
    sizes = map_sizes(backbone, taps, task.crop_size, channels)
    dims, strides = [dim for dim, _ in sizes], [stride for _, stride in sizes]
    pyramid: nn.Module = nn.Identity()
    if linear:
        head: nn.Module = LinearHead(dims, classes, len(config.optim.lrs))
    else:
        if len(taps) != 4:
            raise InputError(f"--taps: --head {task.head} takes four layers, not {len(taps)}")
        if len(set(strides)) == 1 and len(set(dims)) == 1:
            pyramid = Pyramid(dims[0], strides[0])
        elif strides != sorted(strides):
            raise InputError(f"--taps: strides {strides} do not go from fine to coarse")
        head = HEADS[task.head](dims, classes)
    network = Segmenter(backbone, head, taps, not task.finetune, pyramid)
    if task.finetune:
        freeze_unused(network, task.crop_size, channels)
    return network


def freeze_unused(network: Segmenter, size: int, channels: int) -> None:
    """Exclude parameters from training that the head's maps do not depend on, such as those of the
    class token and of the last norm: processes would wait for their gradients."""
    trial = copy.deepcopy(network).train()  # whose batch-norm statistics it changes
    weight = next(trial.parameters())
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        logits = trial(weight.new_zeros(2, channels, size, size))
        torch.stack([x.sum() for x in logits]).sum().backward()
    used = {name for name, p in trial.named_parameters() if p.grad is not None}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in used)
