"""Distillation without labels: the student reproduces a frozen teacher's features of every crop.

The teacher sees the student's augmented crops, in its own normalization and resolution. Its class
token (or pooled features) and its patch tokens, resampled to the student's grid, are standardized
channel by channel over the batch, and linear projections of the student's tokens are trained to
match them with a smooth L1 loss (feature distillation, arXiv 2205.14141, which standardizes token
by token). Nothing can collapse, because the targets do not depend on the student.

Shapes: V views of B images, D and P the widths of the teacher's class and patch tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit_dino.data.config import CropsConfig
from xcit_dino.eval.teacher import Loaded, Teacher, load_teacher
from xcit_dino.inputs import InputSettings
from xcit_dino.models.probe import check_sizes
from xcit_dino.models.tokens import Tokens, stride_of, tokens_of, widths_of
from xcit_dino.ssl.config import ObjectiveConfig
from xcit_dino.train.amp import autocast, widest
from xcit_dino.train.distributed import dist

BETA = 2.0  # of smooth L1, as in feature distillation
STD_FLOOR = 0.01  # of the mean std: channels that hardly vary are not amplified to noise


class FrozenTeacher(Teacher):
    """The frozen teacher of a pretraining run: :class:`Tokens` of the student's crops as targets.

    Args:
        loaded: its network and input settings.
        ours: how the student's crops are prepared.
        global_size: side of the student's global crops in pixels.
        patches: whether patch tokens are wanted.
        dtype: of its forward pass.
    """

    def __init__(
        self,
        loaded: Loaded,
        ours: InputSettings,
        global_size: int,
        *,
        patches: bool = True,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(loaded.network, ours, loaded.settings)
        self.global_size, self.patches, self.dtype = global_size, patches, dtype
        self.stride = stride_of(loaded.network)

    @property
    def widths(self) -> tuple[int, int]:
        """D and P; P is 0 without patch tokens."""
        return widths_of(self.network, self.size_for(self.global_size), self.patches)

    def size_for(self, side: int) -> int:
        """Side of a crop of ``side`` pixels as the teacher sees it: in proportion, rounded to its
        stride."""
        wanted = (self.size or self.global_size) * side / self.global_size
        if side == self.global_size:
            return round(wanted)
        return max(self.stride, round(wanted / self.stride) * self.stride)

    @torch.no_grad()
    def targets(self, crops: Tensor) -> Tokens:
        """Crops (V*B, C, S, S) in the student's normalization -> standardized tokens, float32:
        (V*B, D) and (V*B, H, W, P) on the teacher's own grid."""
        with torch.autocast(crops.device.type, enabled=False):
            images = self.prepare(crops, self.size_for(crops.shape[-1]))
        with autocast(crops.device, self.dtype):
            pooled, patches = tokens_of(self.network, images, self.patches)
        return Tokens(standardize(pooled), None if patches is None else standardize(patches))


def standardize(tokens: Tensor) -> Tensor:
    """Standardize every channel (the last dimension) to mean 0 and variance 1 over the tokens of
    all ranks, each of which has as many; in at least float32.

    Features after a ReLU, as in convolutional networks, share a large mean: standardized token by
    token, the targets of all images would be nearly the same.
    """
    rows = widened(tokens).flatten(0, -2)
    moments = torch.stack([rows.mean(0), rows.square().mean(0)]).to(widest(rows.device))
    mean, square = dist.all_reduce_mean(moments)
    std = (square - mean.square()).clamp_min(0).sqrt()
    floor = STD_FLOOR * std.mean() + torch.finfo(rows.dtype).tiny
    scaled = (rows - mean.to(rows.dtype)) / torch.maximum(std, floor).to(rows.dtype)
    return scaled.view(tokens.shape)


def widened(tokens: Tensor) -> Tensor:
    """In at least float32."""
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


class Projector(nn.Module):
    """Project the student's tokens to the width of the teacher's; only used in training.

    Args:
        width: of the student's tokens: pooled, patches.
        teacher: widths of the teacher's; 0 without patch tokens.
    """

    def __init__(self, width: tuple[int, int], teacher: tuple[int, int]):
        super().__init__()
        self.cls = nn.Linear(width[0], teacher[0])
        self.patch = nn.Linear(width[1], teacher[1]) if teacher[1] else None
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tokens) -> Tokens:
        patches = None if self.patch is None else self.patch(tokens.patches)
        return Tokens(self.cls(tokens.pooled), patches)


def distillation_loss(
    predicted: list[Tokens], targets: list[Tokens], patch_weight: float, num_rows: int
) -> Tensor:
    """Smooth L1 distance to the targets, averaged over channels, tokens and views of images: class
    token plus ``patch_weight`` times the patch tokens.

    predicted, targets: one item per group of crops of the same size; num_rows: V*B over all groups,
    if these are not all of them.
    """
    total = torch.zeros((), device=targets[0].pooled.device, dtype=targets[0].pooled.dtype)
    for ours, theirs in zip(predicted, targets, strict=True):
        distance = F.smooth_l1_loss(widened(ours.pooled), theirs.pooled, beta=BETA)
        if ours.patches is not None and theirs.patches is not None:
            patches = widened(ours.patches)
            same_grid = resample(theirs.patches, patches.shape[1:3])
            distance = distance + patch_weight * F.smooth_l1_loss(patches, same_grid, beta=BETA)
        total = total + distance * (len(ours.pooled) / num_rows)
    return total


def resample(tokens_BHWP: Tensor, grid: torch.Size) -> Tensor:
    """Resample a grid of tokens to another size, bilinear and antialiased."""
    if tokens_BHWP.shape[1:3] == grid:
        return tokens_BHWP
    image = tokens_BHWP.permute(0, 3, 1, 2)
    resized = F.interpolate(image, list(grid), mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1)


def frozen_teacher(
    config: ObjectiveConfig,
    crops: CropsConfig,
    stages: Sequence[CropsConfig],
    ours: InputSettings,
    dtype: torch.dtype,
) -> tuple[FrozenTeacher, dict[str, Any]]:
    """The teacher that the options name, on the CPU, and facts about it.

    crops: whose size --teacher_size refers to; stages: all that it will see; ours: how the
    student's crops are prepared; dtype: of the teacher's forward pass.

    Raises:
        InputError: no such network or weights, or crops of a size that it does not accept.
    """
    config.check_teacher()
    assert config.teacher_model is not None
    loaded = load_teacher(config.teacher_model, config, num_classes=0, ours=ours)
    patches = config.distill_patch_weight > 0
    teacher = FrozenTeacher(loaded, ours, crops.global_crops_size, patches=patches, dtype=dtype)
    sides = {each.global_crops_size for each in stages}
    sides |= {each.local_crops_size for each in stages if each.local_crops_number}
    for side in sorted(sides, reverse=True):
        size = {"teacher_size": teacher.size_for(side)}
        check_sizes(
            teacher.network, config.teacher_model, size, features=False,
            model_option="--teacher_model",
        )  # fmt: skip
    return teacher, loaded.facts | {"teacher_checksum": tensors_checksum(loaded.network)}


def tensors_checksum(network: nn.Module) -> str:
    """The first 16 hex digits of the SHA-256 of a network's weights and buffers, whichever file
    they came from."""
    found = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]
