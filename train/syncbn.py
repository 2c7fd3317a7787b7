"""Batch-norm over the images of all ranks, on GPUs and on CPUs.

torch's own ``SyncBatchNorm`` runs on GPUs only and needs an all-gather forward and an all-reduce
backward. This one needs one all-reduce of 2C + 1 numbers each way.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(_BatchNorm):
    """``BatchNorm1d`` or ``2d`` whose training statistics are those of the global batch.

    Input and output: (B, C) or (B, C, H, W). Equal to torch's batch-norm on the concatenated batch,
    gradients included.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.ndim in (2, 4), input.shape

    def forward(self, input: Tensor) -> Tensor:
        x = input
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        mean, var, count = _GlobalMoments.apply(x)
        if self.track_running_stats and self.running_mean is not None:
            self._update_running(mean, var, count)
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        shape = channel_shape(x)
        return x * scale.to(x.dtype).view(shape) + shift.to(x.dtype).view(shape)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        assert self.num_batches_tracked is not None and self.running_mean is not None
        self.num_batches_tracked += 1
        momentum = 0.1 if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var * (count / (count - 1)), momentum)  # type: ignore[union-attr]


class _GlobalMoments(torch.autograd.Function):
    """(B, C, ...) -> mean (C,), biased variance (C,), count () over the batch of all ranks.

    Ranks are merged in float64 from their own mean and variance, so that nothing cancels.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        local_var, local_mean = torch.var_mean(wide, others(x), correction=0)
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
        shape = channel_shape(x)
        grad_mean, grad_var = (g.view(shape) for g in (grads / ctx.total).to(x.dtype).chunk(2))
        return grad_mean + 2.0 * grad_var * (x - mean.to(x.dtype).view(shape))


def others(x: Tensor) -> tuple[int, ...]:
    """All dimensions but the channels'."""
    return (0, *range(2, x.ndim))


def channel_shape(x: Tensor) -> tuple[int, ...]:
    """(1, C, 1, ...): how a vector of channels lines up with ``x``."""
    return (1, -1, *[1] * (x.ndim - 2))


def convert(model: nn.Module) -> nn.Module:
    """Make every batch-norm of a model synchronised, in place; weights and key names stay."""
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = SyncBatchNorm
    return model
