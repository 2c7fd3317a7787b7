"""Heads of semantic segmentation: maps of a backbone -> logits at the maps' resolution.

The layers are those of mmsegmentation's heads as XCiT configures them
(``semantic_segmentation/configs``); a test compares shapes and numbers of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FPN_CHANNELS, UPERNET_CHANNELS, AUXILIARY_CHANNELS = 128, 512, 256
POOL_SCALES = (1, 2, 3, 6)
DROPOUT = 0.1


def conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """mmcv's ConvModule: convolution without bias, batch-norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def resized(x: Tensor, size: Sequence[int] | torch.Size) -> Tensor:
    """Bilinear, corners not aligned."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def classifier(channels: int, classes: int) -> nn.Sequential:
    """Dropout of whole channels and a 1x1 convolution, initialized as in mmsegmentation."""
    last = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    return nn.Sequential(nn.Dropout2d(DROPOUT), last)


class LinearHead(nn.Module):
    """Batch-norm and 1x1 convolutions, one for each learning rate of a grid (DINOv2
    ``eval/segmentation``: BNHead). Maps of several taps are concatenated at the first's resolution.

    The convolutions share the normalized features, since batch-norm has no parameters here that
    are trained: scale and shift would be absorbed by the convolution.
    """

    def __init__(self, dims: Sequence[int], classes: int, heads: int = 1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(sum(dims), affine=False)
        first = torch.empty(classes, sum(dims), 1, 1).normal_(std=0.01)  # all begin alike
        self.heads = nn.ModuleList(nn.Conv2d(sum(dims), classes, 1) for _ in range(heads))
        for head in self.heads:
            head.weight.data.copy_(first)  # type: ignore[union-attr]
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Logits (B, C, h, w) of every head of the grid."""
        size = maps[0].shape[-2:]
        x = self.norm(torch.cat([resized(x, size) for x in maps], 1))
        return [head(x) for head in self.heads]


class FPN(nn.Module):
    """Feature pyramid network (mmseg ``necks/fpn.py``): lateral 1x1 convolutions, nearest
    upsampling from coarse to fine, 3x3 convolutions; no norms."""

    def __init__(self, dims: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(dim, channels, 1) for dim in dims)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in dims)
        for layer in (*self.lateral, *self.output):
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps from fine to coarse -> as many of ``channels`` channels."""
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], levels[i - 1].shape[-2:])
        return [output(x) for output, x in zip(self.output, levels, strict=True)]


class SemanticFPN(nn.Module):
    """Semantic FPN (Panoptic FPN, arXiv:1901.02446; mmseg ``fpn_head.py``) with its neck.

    Each level is convolved and enlarged by 2 until it has the finest one's resolution; the levels
    are added.
    """

    def __init__(self, dims: Sequence[int], classes: int) -> None:
        super().__init__()
        width = dims[-1]
        self.neck = FPN(dims, width)
        self.scales = nn.ModuleList()
        for level in range(len(dims)):
            convs = [
                conv(width if step == 0 else FPN_CHANNELS, FPN_CHANNELS, 3)
                for step in range(max(1, level))
            ]
            self.scales.append(nn.ModuleList(convs))
        self.classify = classifier(FPN_CHANNELS, classes)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps from fine to coarse -> [logits (B, C, h, w)] of the finest one's size."""
        levels = self.neck(maps)
        size, total = levels[0].shape[-2:], None
        for level, (x, convs) in enumerate(zip(levels, self.scales, strict=True)):
            for layer in convs:  # type: ignore[attr-defined]
                x = layer(x)
                if level:
                    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = resized(x, size)
            total = x if total is None else total + x
        assert total is not None
        return [self.classify(total)]


class UperNet(nn.Module):
    """UperNet (arXiv:1807.10221; mmseg ``uper_head.py``) with its auxiliary head (``fcn_head.py``)
    on the third map, which is used in training alone."""

    def __init__(self, dims: Sequence[int], classes: int) -> None:
        super().__init__()
        width, channels = dims[-1], UPERNET_CHANNELS
        self.pools = nn.ModuleList(conv(width, channels, 1) for _ in POOL_SCALES)
        self.bottleneck = conv(width + len(POOL_SCALES) * channels, channels, 3)
        self.lateral = nn.ModuleList(conv(dim, channels, 1) for dim in dims[:-1])
        self.output = nn.ModuleList(conv(channels, channels, 3) for _ in dims[:-1])
        self.fuse = conv(len(dims) * channels, channels, 3)
        self.classify = classifier(channels, classes)
        self.auxiliary = nn.Sequential(
            conv(dims[2], AUXILIARY_CHANNELS, 3), classifier(AUXILIARY_CHANNELS, classes)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps from fine to coarse -> [logits (B, C, h, w) of the finest one's size, in
        training also those of the auxiliary head]."""
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=False)]
        levels.append(self._pooled(maps[-1]))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resized(levels[i], levels[i - 1].shape[-2:])
        outputs = [output(x) for output, x in zip(self.output, levels, strict=False)]
        size = outputs[0].shape[-2:]
        fused = torch.cat([resized(x, size) for x in (*outputs, levels[-1])], 1)
        logits = [self.classify(self.fuse(fused))]
        return [*logits, self.auxiliary(maps[2])] if self.training else logits

    def _pooled(self, x: Tensor) -> Tensor:
        """Pyramid pooling: the map beside its means over 1, 4, 9 and 36 fields."""
        parts = [x]
        for scale, layer in zip(POOL_SCALES, self.pools, strict=True):
            parts.append(resized(layer(F.adaptive_avg_pool2d(x, scale)), x.shape[-2:]))
        return self.bottleneck(torch.cat(parts, 1))
