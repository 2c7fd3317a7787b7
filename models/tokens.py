"""A backbone's two outputs in one pass: its pooled features and its grid of patch tokens."""

from __future__ import annotations

from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xcit_dino.errors import InputError
from xcit_dino.models.xcit import XCiT


class Tokens(NamedTuple):
    """What a backbone gives for B images."""

    pooled: Tensor
    """(B, D): its features; XCiT and most ViTs: the class token, a convolutional network: the mean
    over its grid."""
    patches: Tensor | None
    """(B, H, W, P): patch tokens, or the last feature map; None where they were not asked for."""


def tokens_of(backbone: nn.Module, images: Tensor, patches: bool = True) -> Tokens:
    """Images (B, C, S, S) -> :class:`Tokens`; pooled is ``backbone(images)``, value for value.

    backbone: without a classifier (num_classes 0), XCiT or timm's.

    Raises:
        InputError: patch tokens of a backbone in which none can be found.
    """
    if not patches:
        return Tokens(backbone(images), None)
    if isinstance(backbone, XCiT):
        tokens = backbone.forward_features(images)
        side = images.shape[-1] // backbone.patch_size
        return Tokens(tokens[:, 0], tokens[:, 1:].unflatten(1, (-1, side)))
    if not (hasattr(backbone, "forward_features") and hasattr(backbone, "forward_head")):
        raise InputError(f"{type(backbone).__name__} gives no patch tokens")
    found = backbone.forward_features(images)  # type: ignore[operator]
    return Tokens(backbone.forward_head(found), _grid(backbone, found))  # type: ignore[operator]


def _grid(backbone: nn.Module, found: object) -> Tensor:
    """timm's features before pooling as (B, H, W, P)."""
    if isinstance(found, Tensor) and found.ndim == 4:
        channels_last = found.shape[-1] == backbone.num_features != found.shape[1]
        return found if channels_last else found.permute(0, 2, 3, 1)
    if isinstance(found, Tensor) and found.ndim == 3:
        tokens = found[:, int(getattr(backbone, "num_prefix_tokens", 0)) :]  # class, registers
        side = isqrt(tokens.shape[1])
        if side * side == tokens.shape[1]:
            return tokens.unflatten(1, (side, side))
    shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    raise InputError(f"{type(backbone).__name__} gives no grid of patch tokens ({shape})")


def first_layer(backbone: nn.Module) -> str | None:
    """Name of the layer that takes the images, as timm has it; None where it is not known."""
    if isinstance(backbone, XCiT):
        return "patch_embed.proj.0.0"
    name = getattr(backbone, "default_cfg", {}).get("first_conv")
    return name if isinstance(name, str) else None


def channels_of(backbone: nn.Module) -> int:
    """Channels of the images that a backbone takes; 3 where its first layer is not known."""
    name = first_layer(backbone)
    weight = None if name is None else dict(backbone.named_parameters()).get(f"{name}.weight")
    return 3 if weight is None or weight.ndim != 4 else weight.shape[1]


def stride_of(backbone: nn.Module) -> int:
    """Pixels by which a crop's side is best divisible: the patch size, else that of one cell of a
    convolutional network's last feature map; 1 where neither is known."""
    patch = getattr(backbone, "patch_size", None)
    patch = patch or getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    if patch is not None:
        return int(max(patch) if isinstance(patch, tuple | list) else patch)
    info = getattr(backbone, "feature_info", None) or [{}]
    return int(info[-1].get("reduction", 1)) if isinstance(info, list) else 1


@torch.no_grad()
def widths_of(backbone: nn.Module, size: int, patches: bool = True) -> tuple[int, int]:
    """(D, P) of :class:`Tokens`, found with a black image of ``size`` pixels; without ``patches`` P
    is 0. The backbone is left as it is."""
    weight, modes = next(backbone.parameters()), [(m, m.training) for m in backbone.modules()]
    image = weight.new_zeros(1, channels_of(backbone), size, size)
    tokens = tokens_of(backbone.eval(), image, patches)
    for module, training in modes:
        module.training = training
    return tokens.pooled.shape[-1], 0 if tokens.patches is None else tokens.patches.shape[-1]
