"""Check that a network's outputs are finite and differ between images."""

from __future__ import annotations

import torch
from torch import Tensor

from xcit_dino.errors import InputError, warn
from xcit_dino.train.distributed import dist

SAME = 1e-6  # range, relative to the largest value, below which rows differ by rounding only


class OutputRange:
    """Smallest and largest value of every output over the images of all ranks.

    width: number of outputs per image; device: of the outputs.
    """

    def __init__(self, width: int, device: torch.device):
        self.low = torch.full((width,), torch.inf, device=device)
        self.high = torch.full((width,), -torch.inf, device=device)
        self.nonfinite = torch.zeros((), device=device)
        self.rows = 0

    def add(self, rows: Tensor) -> None:
        """rows: float32 [B, width]."""
        if len(rows):
            self.nonfinite += rows.isfinite().logical_not().sum()
            self.low = torch.minimum(self.low, rows.amin(0))
            self.high = torch.maximum(self.high, rows.amax(0))
            self.rows += len(rows)

    def constant(self) -> bool:
        """Whether all images have the same outputs. To be called once on all ranks.

        Raises:
            InputError: non-finite outputs.
        """
        count = torch.stack((self.nonfinite, torch.full_like(self.nonfinite, self.rows)))
        low, high = self.low.nan_to_num(), self.high.nan_to_num()
        if dist.world_size() > 1:
            torch.distributed.all_reduce(count)
            torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN)
            torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX)
        nonfinite, rows = count.tolist()
        refuse_nonfinite(nonfinite)
        largest = torch.maximum(low.abs(), high.abs()).max()
        return rows > 1 and bool((high - low).max() <= SAME * largest)


def refuse_nonfinite(count: float) -> None:
    """Raise InputError if there are non-finite outputs."""
    if count:
        raise InputError(
            f"{count:.0f} outputs of the network are NaN or infinite: its weights are "
            "damaged, or training diverged; name an earlier checkpoint with "
            "--pretrained_weights (or, under fp16, add --precision fp32)"
        )


def warn_constant(what: str) -> None:
    """Warn that all images have the same outputs."""
    warn(
        f"{what} are the same for all images: the weights are degenerate, or training collapsed; "
        "accuracies are meaningless"
    )
