"""The DINO step written plainly, in the official order, and its label propagation: the reference
for tests and benchmarks.

Slow and obvious on purpose: eager, one loss term per pair of views, a loop over parameters for
clipping and for the moving average, ``loss.item()`` every step. Semantics: dino
``main_dino.py:train_one_epoch`` and
``DINOLoss``; the network is timm's XCiT. Shares no code with ``ssl/`` but the crops it is given.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn


class PlainHead(nn.Module):
    """Projection head of dino ``vision_transformer.py:DINOHead``, weight-norm written out."""

    def __init__(self, in_dim: int, out_dim: int, hidden: int, bottleneck: int, norm_last: bool):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden), nn.GELU(),
            nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )  # fmt: skip
        self.last_layer = PlainPrototypes(bottleneck, out_dim, norm_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, p=2))


class PlainPrototypes(nn.Module):
    """Weight-normalized linear layer; its length is fixed at 1 with ``norm_last``."""

    def __init__(self, bottleneck: int, out_dim: int, norm_last: bool):
        super().__init__()
        self.weight_v = nn.Parameter(torch.randn(out_dim, bottleneck) * 0.02)
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not norm_last)

    def forward(self, x: Tensor) -> Tensor:
        v = self.weight_v
        return F.linear(x, self.weight_g * v / v.norm(dim=1, keepdim=True))


class PlainNet(nn.Module):
    """Backbone over crops grouped by size, then one pass of the head (MultiCropWrapper)."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, views: list[Tensor]) -> Tensor:
        features, start = torch.empty(0, device=views[0].device), 0
        while start < len(views):
            end = start
            while end < len(views) and views[end].shape[-1] == views[start].shape[-1]:
                end += 1
            output = self.backbone(torch.cat(views[start:end]))
            features = torch.cat((features, output))
            start = end
        return self.head(features)


class PlainLoss(nn.Module):
    """DINOLoss: one term a (teacher view, other student view) pair; official code has 2 global
    crops."""

    def __init__(
        self,
        out_dim: int,
        num_crops: int,
        student_temp: float,
        center_momentum: float,
        num_global: int = 2,
    ):
        super().__init__()
        self.num_crops = num_crops
        self.num_global = num_global
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(self, student_output: Tensor, teacher_output: Tensor, temperature: float) -> Tensor:
        student = (student_output / self.student_temp).chunk(self.num_crops)
        teacher = F.softmax((teacher_output - self.center) / temperature, dim=-1)
        teacher = teacher.detach().chunk(self.num_global)
        total, terms = student_output.new_zeros(()), 0
        for iq, q in enumerate(teacher):
            for v in range(len(student)):
                if v == iq:
                    continue
                total = total + torch.sum(-q * F.log_softmax(student[v], dim=-1), dim=-1).mean()
                terms += 1
        self.update_center(teacher_output)
        return total / terms

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        batch_center = torch.sum(teacher_output, dim=0, keepdim=True)
        world = 1
        if dist.is_initialized():
            dist.all_reduce(batch_center)
            world = dist.get_world_size()
        batch_center = batch_center / (len(teacher_output) * world)
        self.center = self.center * self.center_momentum + batch_center * (1 - self.center_momentum)


def plain_sinkhorn(scores: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """DINOv2's ``sinkhorn_knopp_teacher`` on one process: (B, K) -> probabilities (B, K)."""
    Q = torch.exp(scores / temperature).T
    K, B = Q.shape
    Q = Q / Q.sum()
    for _ in range(iterations):
        Q = Q / Q.sum(1, keepdim=True) / K
        Q = Q / Q.sum(0, keepdim=True) / B
    return (Q * B).T


def plain_koleo(views: list[Tensor], eps: float = 1e-8) -> Tensor:
    """DINOv2's KoLeo loss: features (B, D) of each view; a loop over images and their others."""
    total = views[0].new_zeros(())
    for view in views:
        unit = [row / row.norm() for row in view]
        logs = []
        for i, row in enumerate(unit):
            others = [other for j, other in enumerate(unit) if j != i]
            nearest = max(others, key=lambda other: (row @ other).item())
            logs.append(torch.log((row - nearest + eps).norm() + eps))
        total = total - torch.stack(logs).mean()
    return total


def plain_cross_covariance_attention(qkv: Tensor, temperature: Tensor) -> Tensor:
    """Queries, keys and values (B, N, 3 h d) and (h, 1, 1) -> (B, N, h d), one head of one image
    at a time."""
    images = []
    for image in qkv:
        queries, keys, values = (x.chunk(len(temperature), dim=-1) for x in image.chunk(3, dim=-1))
        heads = []
        for q, k, v, scale in zip(queries, keys, values, temperature, strict=True):
            cosine = F.normalize(q, dim=0).T @ F.normalize(k, dim=0)
            heads.append(v @ F.softmax(cosine * scale, dim=-1).T)
        images.append(torch.cat(heads, dim=-1))
    return torch.stack(images)


def parameter_groups(model: nn.Module) -> list[dict]:
    """No weight decay on biases, 1-D tensors, ``temperature`` and ``cls_token``."""
    decayed, plain = [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if name.endswith((".bias", "temperature", "cls_token")) or len(p.shape) == 1:
            plain.append(p)
        else:
            decayed.append(p)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


def plain_step(
    student: PlainNet,
    teacher: PlainNet,
    loss_fn: PlainLoss,
    optimizer: torch.optim.Optimizer,
    views: Sequence[Tensor],
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    teacher_temp: float,
    clip: float,
    freeze_last_layer: bool,
    autocast: torch.autocast | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> float:
    """One step over float views (B, C, H, W), the global ones first; returns the loss."""
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = lr
        if i == 0:
            group["weight_decay"] = weight_decay
    with autocast or torch.autocast(views[0].device.type, enabled=False):
        with torch.no_grad():
            teacher_output = teacher(list(views[: loss_fn.num_global]))
        student_output = student(list(views))
        loss = loss_fn(student_output, teacher_output, teacher_temp)
    if not math.isfinite(loss.item()):
        print(f"Loss is {loss.item()}, stopping training")
        sys.exit(1)
    optimizer.zero_grad()
    (scaler.scale(loss) if scaler else loss).backward()
    if scaler:
        scaler.unscale_(optimizer)
    if clip:
        for p in student.parameters():
            if p.grad is not None:
                coefficient = clip / (p.grad.data.norm(2) + 1e-6)
                if coefficient < 1:
                    p.grad.data.mul_(coefficient)
    if freeze_last_layer:
        for name, p in student.named_parameters():
            if "last_layer" in name:
                p.grad = None
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    with torch.no_grad():
        for q, k in zip(student.parameters(), teacher.parameters(), strict=True):
            k.data.mul_(momentum).add_((1 - momentum) * q.detach().data)
    return loss.item()


def plain_distillation_loss(
    predicted: Sequence[tuple[Tensor, Tensor]],
    targets: Sequence[tuple[Tensor, Tensor]],
    patch_weight: float,
) -> Tensor:
    """Distillation from features, one view of one image at a time.

    predicted, targets: for each size of crops (V*B, D) class tokens and (V*B, H, W, P) patch
    tokens, the targets as the teacher outputs them; the two grids may differ.
    """
    losses = []
    for (cls, patches), teacher in zip(predicted, targets, strict=True):
        teacher_cls, teacher_patches = (plain_standardized(tokens) for tokens in teacher)
        for image in range(len(cls)):
            loss = plain_smooth_l1(cls[image], teacher_cls[image]).mean()
            wanted = teacher_patches[image].permute(2, 0, 1)[None]
            size = patches.shape[1:3]
            if wanted.shape[2:] != size:
                wanted = F.interpolate(wanted, size, mode="bilinear", antialias=True)
            wanted = wanted[0].permute(1, 2, 0)
            losses.append(loss + patch_weight * plain_smooth_l1(patches[image], wanted).mean())
    return torch.stack(losses).mean()


def plain_standardized(tokens: Tensor) -> Tensor:
    """Each channel with mean 0 and variance 1 over all tokens; a channel that varies less than a
    hundredth of the others is divided by that."""
    result = torch.empty_like(tokens)
    deviations = [tokens[..., c].std(correction=0) for c in range(tokens.shape[-1])]
    floor = 0.01 * sum(deviations) / len(deviations)
    for c, deviation in enumerate(deviations):
        result[..., c] = (tokens[..., c] - tokens[..., c].mean()) / max(deviation, floor)
    return result


def plain_smooth_l1(x: Tensor, y: Tensor, beta: float = 2.0) -> Tensor:
    """Quadratic up to ``beta``, linear beyond it."""
    d = (x - y).abs()
    return torch.where(d < beta, 0.5 * d.square() / beta, d - 0.5 * beta)


def plain_more(
    crop: np.ndarray,
    *,
    turns: int,
    factors: np.ndarray,
    noise: float,
    seed: int,
    dropped: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
) -> np.ndarray:
    """Quarter turns, jitter of single channels, noise and dropped channels of one square crop
    [C, H, W] with values in [0, 1], normalized; a channel and a pixel at a time.

    turns: to the left; factors: [C, 2], brightness and contrast; noise: standard deviation; seed:
    of the noise, 32 bits; dropped: bool [C].
    """
    result = np.empty_like(crop, dtype=np.float64)
    place = 0
    for c, channel in enumerate(crop.astype(np.float64)):
        plane = np.rot90(channel, turns)
        plane = np.clip(plane * factors[c, 0], 0, 1)
        plane = np.clip(plane.mean() + factors[c, 1] * (plane - plane.mean()), 0, 1)
        for at in np.ndindex(plane.shape):
            value = plane[at]
            if noise:
                first = plain_hash(plain_hash(place) ^ seed)
                second = plain_hash(first ^ 0xFFFFFFFF)
                radius = math.sqrt(-2 * math.log(((first >> 8) + 1) / 2**24))
                normal = radius * math.cos(2 * math.pi * (second >> 8) / 2**24)
                value = min(max(value + noise * normal, 0), 1)
            result[(c, *at)] = 0 if dropped[c] else (value - mean[c]) / std[c]
            place += 1
    return result


def plain_label_propagation(
    features: Sequence[Tensor],
    first: Tensor,
    frames: int,
    window: int,
    topk: int,
    temperature: float = 0.1,
) -> list[Tensor]:
    """Labels [C, H, W] of every frame after the first, from features [H, W, D]: dino
    ``eval_video_segmentation.py``, the whole matrix of affinities, patch by patch."""
    C, H, W = first.shape
    flat = [F.normalize(f.reshape(H * W, -1), dim=1) for f in features]
    found = [first]
    for now in range(1, len(features)):
        context = [0, *range(max(1, now - frames), now)]
        result = torch.zeros(C, H * W)
        for y in range(H):
            for x in range(W):
                affinities, values = [], []
                for source in context:
                    for p in range(H):
                        for q in range(W):
                            near = abs(p - y) <= window and abs(q - x) <= window
                            if near or not window:
                                cosine = flat[now][y * W + x] @ flat[source][p * W + q]
                                affinities.append(torch.exp(cosine / temperature))
                                values.append(found[source][:, p, q])
                affinity = torch.stack(affinities)
                least = affinity.topk(min(topk, len(affinity))).values.min()
                affinity[affinity < least] = 0
                weight = affinity / affinity.sum()
                result[:, y * W + x] = torch.stack(values, 1) @ weight
        found.append(result.reshape(C, H, W))
    return found[1:]


def plain_mask(labels: Tensor, patch: int, height: int, width: int) -> np.ndarray:
    """uint8 [height, width] from labels [C, H, W]: ``norm_mask`` and what follows, as in dino."""
    large = F.interpolate(
        labels[None], scale_factor=patch, mode="bilinear", align_corners=False,
        recompute_scale_factor=False,
    )[0]  # fmt: skip
    for channel in large:
        if channel.max() > 0:
            channel -= channel.min().clone()
            channel /= channel.max().clone()
    mask = torch.max(large, dim=0)[1].numpy().astype(np.uint8)
    return np.array(Image.fromarray(mask).resize((width, height), 0))


def plain_hash(x: int) -> int:
    """https://stackoverflow.com/a/12996028 on 32 bits."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B % 2**32
    return (x >> 16) ^ x
