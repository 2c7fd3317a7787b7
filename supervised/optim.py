"""AdamW of supervised training, with layer-wise learning rates."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import group_parameters  # pyright: ignore
from torch import nn

from xcit_dino.train.schedules import Hyperparameters

XCIT_LAYERS = {  # as timm's XCiT has them, in official names
    "stem": r"^cls_token|pos_embeder|patch_embed",
    "blocks": r"^blocks\.(\d+)",
    "cls_attn_blocks": [(r"^cls_attn_blocks\.(\d+)", None), (r"^norm", (99999,))],
}


def adamw(model: nn.Module, layer_decay: float) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`; the rest is set before every step."""
    groups = parameter_groups(model, layer_decay)
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)


def parameter_groups(model: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
    """One group a layer and kind of parameter: ``lr_scale`` is ``layer_decay`` to the power of the
    layers above it; ``decays`` says whether weight decay applies (not to 1-D tensors and what the
    model names in ``no_weight_decay``)."""
    spared = getattr(model, "no_weight_decay", set)()
    layers = layer_numbers(model)
    top = max(layers.values())
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = layer_decay ** (top - layers[name])
            decays = parameter.ndim > 1 and name not in spared
            new = {"params": [], "lr_scale": scale, "decays": decays}
            groups.setdefault((scale, decays), new)["params"].append(parameter)
    return list(groups.values())


def layer_numbers(model: nn.Module) -> dict[str, int]:
    """Parameter name -> its layer, 0 for the stem, the head last."""
    matcher = getattr(model, "group_matcher", lambda: XCIT_LAYERS)()
    return group_parameters(model, matcher, reverse=True)


def set_hyperparameters(optimizer: torch.optim.Optimizer, now: Hyperparameters) -> None:
    """Each group its share of the learning rate, and weight decay where it applies."""
    for group in optimizer.param_groups:
        group["lr"] = now.lr * group["lr_scale"]
        group["weight_decay"] = now.weight_decay if group["decays"] else 0.0
