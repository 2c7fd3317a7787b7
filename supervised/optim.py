"""AdamW of supervised training, with layer-wise learning rates."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from xcit_dino.train.optim import grouped, layer_numbers


def adamw(model: nn.Module, layer_decay: float) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`; learning rate and decay are set before every step."""
    groups = parameter_groups(model, layer_decay)
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)


def parameter_groups(model: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
    """One group per layer and kind of parameter: ``lr_scale`` is ``layer_decay`` to the power of
    the number of layers above; ``decays`` is whether weight decay applies (not to 1-D tensors and
    those that the model lists in ``no_weight_decay``)."""
    spared = getattr(model, "no_weight_decay", set)()
    layers = layer_numbers(model) if layer_decay < 1 else {}
    top = max(layers.values(), default=0)
    scales = {name: layer_decay ** (top - number) for name, number in layers.items()}
    return grouped(model, lambda name, p: p.ndim > 1 and name not in spared, scales)
