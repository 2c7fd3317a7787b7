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


def pooled_and_patches(backbone: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) of any sides that the backbone accepts -> its features (B, D) and its
    patch tokens (B, N, P), or the cells of its last feature map, without their grid.

    Raises:
        InputError: a backbone in which none can be found.
    """
    if isinstance(backbone, XCiT):
        tokens = backbone.forward_features(images)
        return tokens[:, 0], tokens[:, 1:]
    if not (hasattr(backbone, "forward_features") and hasattr(backbone, "forward_head")):
        raise InputError(f"{type(backbone).__name__} gives no patch tokens")
    found = backbone.forward_features(images)  # type: ignore[operator]
    patches = _patches(backbone, found)
    return backbone.forward_head(found), patches.flatten(1, -2)  # type: ignore[operator]


def _grid(backbone: nn.Module, found: object) -> Tensor:
    """timm's features before pooling as (B, H, W, P)."""
    patches = _patches(backbone, found)
    if patches.ndim == 4:
        return patches
    side = isqrt(patches.shape[1])
    if side * side == patches.shape[1]:
        return patches.unflatten(1, (side, side))
    raise _no_patches(backbone, found)


def _patches(backbone: nn.Module, found: object) -> Tensor:
    """timm's features before pooling as (B, H, W, P), or (B, N, P) without class token and
    registers."""
    if isinstance(found, Tensor) and found.ndim == 4:
        channels_last = found.shape[-1] == backbone.num_features != found.shape[1]
        return found if channels_last else found.permute(0, 2, 3, 1)
    if isinstance(found, Tensor) and found.ndim == 3:
        return found[:, int(getattr(backbone, "num_prefix_tokens", 0)) :]
    raise _no_patches(backbone, found)


def _no_patches(backbone: nn.Module, found: object) -> InputError:
    shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    return InputError(f"{type(backbone).__name__} gives no grid of patch tokens ({shape})")


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
