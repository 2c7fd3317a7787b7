"""Batch-norm over the images of all ranks, on GPUs and on CPUs.

torch's own ``SyncBatchNorm`` runs on GPUs only and needs an all-gather forward and an all-reduce
backward. This one needs one all-reduce of 2C + 1 numbers each way.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``BatchNorm2d`` whose training statistics are those of the global batch.

    Input and output: (B, C, H, W). Equal to ``BatchNorm2d`` on the concatenated batch, gradients
    included.
    """

    def forward(self, input: Tensor) -> Tensor:
        x = input
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        mean, var, count = _GlobalMoments.apply(x)
        if self.track_running_stats and self.running_mean is not None:
            self._update_running(mean, var, count)
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        shape = (1, -1, 1, 1)
        return x * scale.to(x.dtype).view(shape) + shift.to(x.dtype).view(shape)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        assert self.num_batches_tracked is not None and self.running_mean is not None
        self.num_batches_tracked += 1
        momentum = 0.1 if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var * (count / (count - 1)), momentum)  # type: ignore[union-attr]


class _GlobalMoments(torch.autograd.Function):
    """(B, C, H, W) -> mean (C,), biased variance (C,), count () over the batch of all ranks.

    Ranks are merged in float64 from their own mean and variance, so that nothing cancels.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        local_var, local_mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        count = x.numel() // x.shape[1]
        mean64, var64 = local_mean.double(), local_var.double()
        sums = torch.cat([mean64, var64 + mean64.square(), mean64.new_ones(1)]) * count
        dist.all_reduce(sums)
        total = sums[-1]
        mean64, square = (sums[:-1] / total).chunk(2)
        mean, var = mean64.to(local_mean.dtype), (square - mean64.square()).to(local_mean.dtype)
        ctx.save_for_backward(x, mean)
        ctx.total = total
        ctx.mark_non_differentiable(total)
        return mean, var, total.to(local_mean.dtype)

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_var: Tensor, _: Tensor) -> Tensor:  # type: ignore[override]
        x, mean = ctx.saved_tensors
        grads = torch.cat([grad_mean, grad_var])
        dist.all_reduce(grads)
        grad_mean, grad_var = (grads / ctx.total).to(x.dtype).view(2, 1, -1, 1, 1)
        return grad_mean + 2.0 * grad_var * (x - mean.to(x.dtype).view(1, -1, 1, 1))


def convert(model: nn.Module) -> nn.Module:
    """Make every ``BatchNorm2d`` of a model synchronised, in place; weights and key names stay."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return model
