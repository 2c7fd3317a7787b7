"""Seeds of torch's generator as a function of the step."""

from __future__ import annotations

import torch


def seed_drop_path(seed: int, step: int, rank: int) -> None:
    """Seed torch's generator, which only drop-path uses, so that its numbers depend on nothing
    else.

    torch accepts 64 bits, which seeds from some hundred millions on would overflow.
    """
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**64)
