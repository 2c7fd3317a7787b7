"""Is the run healthy? Signs of collapse, measured on the device."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def health(loss: Tensor, targets_GBK: Tensor) -> dict[str, Tensor]:
    """The loss and cheap signs beside it, as device scalars.

    ``teacher_entropy``: mean entropy of the teacher's probabilities, nats; ln K is uniform
    collapse, 0 is certainty. ``kl``: loss minus entropy, what the student still has to learn; 0 on
    collapse.
    ``prototypes_used``: share of prototypes that are some image's first choice in this batch.
    """
    entropy = torch.special.entr(targets_GBK).sum(-1).mean()
    chosen = targets_GBK.argmax(-1).flatten()
    used = torch.zeros(targets_GBK.shape[-1], device=chosen.device).index_fill_(0, chosen, 1.0)
    possible = min(chosen.numel(), used.numel())
    return {
        "loss": loss.detach(),
        "teacher_entropy": entropy,
        "kl": loss.detach() - entropy,
        "prototypes_used": used.sum() / possible,
    }
