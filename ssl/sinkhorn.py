"""Sinkhorn-Knopp in place of DINO's center (SwAV, arXiv 2006.09882; DINOv2
``dinov2/loss/dino_clstoken_loss.py:sinkhorn_knopp_teacher``)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from xcit_dino.train.distributed.dist import all_reduce_sum

ITERATIONS = 3


@torch.no_grad()
def sinkhorn_knopp(scores_BK: Tensor, temperature: float, iterations: int = ITERATIONS) -> Tensor:
    """Scores of this rank's views (B, K) -> probabilities (B, K), in at least float32, in which
    the views of all ranks use all prototypes equally, as far as ``iterations`` go.

    Unlike the center, which is an average over many steps, this looks at the present micro-batch
    alone, so that it depends on how a global batch is divided into micro-batches. The largest score
    of each prototype is subtracted first: the first normalization cancels it, and the exponential
    does not overflow.
    """
    scaled = scores_BK.to(torch.promote_types(scores_BK.dtype, torch.float32)) / temperature
    largest = scaled.amax(0)
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    Q = (scaled - largest).exp_()
    K = Q.shape[1]
    for _ in range(iterations):
        Q /= all_reduce_sum(Q.sum(0)).clamp_min(torch.finfo(Q.dtype).tiny) * K
        Q /= Q.sum(1, keepdim=True).clamp_min(torch.finfo(Q.dtype).tiny)
    return Q
