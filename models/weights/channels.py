"""Weights of 3 channels for images of C, and back: what becomes of a network's first layer.

From 3 channels to C timm's rule (``adapt_input_conv``): to one, the sum over the three; to more,
the three in turn (r g b r g ...), times 3 / C. A gray image, repeated over the channels, then gives
the outputs that it gave, where C is 1 or a multiple of 3; other C keep the order of magnitude.

From C to 3 the inverse: each of the three is the mean over its copies (channels 1, 4, 7 ... for the
first), times C / 3; from one channel, a third of it each. There and back again the weights are the
same for C from 3 on, and for 1 those that a gray image sees.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from xcit_dino.errors import InputError
from xcit_dino.models.tokens import first_layer
from xcit_dino.models.weights.layouts import State


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """A first layer's weight [O, 3, h, w] for ``channels`` channels, or [O, C, h, w] for 3.

    Raises:
        ValueError: neither number is 3.
    """
    present = weight.shape[1]
    if present == channels:
        return weight
    if present == 3:
        from timm.models import adapt_input_conv

        return adapt_input_conv(channels, weight)
    if channels != 3:
        raise ValueError(f"{present} channels into {channels}")
    if present < 3:
        rest = weight.mean(1, keepdim=True).expand(-1, 3 - present, -1, -1)
        return torch.cat([weight, rest], 1) * (present / 3)
    copies = [weight[:, first::3].double().mean(1) for first in range(3)]
    return (torch.stack(copies, 1) * (present / 3)).to(weight.dtype)


def fit_channels(
    path: Path, state: State, expected: State, model: nn.Module, adapt: bool
) -> tuple[State, str]:
    """A network's tensors with a first layer for the channels of ``model``, and what was done to it
    ("": nothing).

    path: for messages; state: named as in ``expected``, the tensors of the model; adapt: convert
    instead of refusing.

    Raises:
        InputError: another number of channels, and not to be converted, or not from or to 3.
    """
    name = f"{first_layer(model)}.weight"
    ours, theirs = expected.get(name), state.get(name)
    if ours is None or theirs is None or ours.ndim != 4 or theirs.ndim != 4:
        return state, ""
    has, wanted = theirs.shape[1], ours.shape[1]
    if has == wanted:
        return state, ""
    if not adapt:
        raise InputError(
            f"{path}: takes images of {has} channels, and these have {wanted}; name weights for "
            f"{wanted} channels"
        )
    if 3 not in (has, wanted):
        raise InputError(
            f"{path}: takes images of {has} channels, and these have {wanted}; only weights of 3 "
            "channels can be converted: name others, or start without"
        )
    changed = {name: adapt_channels(theirs, wanted)}
    return state | changed, f"first layer converted from {has} channels to {wanted}"
