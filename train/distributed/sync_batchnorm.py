"""Batch-norm over the images of all ranks, on GPUs and on CPUs.

torch's own ``SyncBatchNorm`` runs on GPUs only and needs an all-gather forward and an all-reduce
backward. This one needs one all-reduce of 2C + 1 numbers forward and one of 2C backward.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from xcit_dino.errors import InputError


class SyncBatchNorm(_BatchNorm):
    """Batch-norm whose training statistics are those of the global batch.

    Input and output: (B, C) or (B, C, ...). Equal to torch's batch-norm on the concatenated batch,
    gradients included, in at least float32 and rounded once to the input's type, as torch does.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.ndim >= 2, input.shape

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        normal, mean, var, count = _Normalize.apply(input, self.weight, self.bias, self.eps)
        if self.track_running_stats and self.running_mean is not None:
            self._update_running(mean, var, count)
        return normal

    @torch.no_grad()
    def _update_running(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        assert self.num_batches_tracked is not None and self.running_mean is not None
        self.num_batches_tracked += 1
        momentum = self.momentum
        if momentum is None:  # the mean over all batches, as torch has it
            momentum = 1.0 / self.num_batches_tracked.to(mean.dtype)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var * (count / (count - 1)), momentum)  # type: ignore[union-attr]


class SyncBatchNormAct(SyncBatchNorm):
    """The same with the dropout and activation of timm's ``BatchNormAct2d``."""

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))  # type: ignore[operator]


class _Normalize(torch.autograd.Function):
    """(B, C, ...), weight (C,), bias (C,), eps -> normalized, mean (C,), biased variance (C,),
    count (): of the batch of all ranks. Gradients flow through the first alone.

    Ranks are merged in float64 from their own mean and variance, so that nothing cancels.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = widened(x)
        mean, var, total = _global_moments(wide)
        inverse_std = torch.rsqrt(var + eps)
        shape = channel_shape(x)
        scale = inverse_std if weight is None else inverse_std * weight
        normal = (wide - mean.view(shape)) * scale.view(shape)
        if bias is not None:
            normal = normal + bias.view(shape)
        ctx.save_for_backward(x, weight, mean, inverse_std, total)
        count = total.to(mean.dtype)
        ctx.mark_non_differentiable(mean, var, count)
        return normal.to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, inverse_std, total = ctx.saved_tensors
        grad, shape = widened(grad), channel_shape(x)
        away = widened(x) - mean.view(shape)
        dims = others(x)
        sums = torch.cat([grad.sum(dims), (grad * away).sum(dims)])
        grad_bias, along = sums.clone().chunk(2)  # this rank's share; DDP averages those
        dist.all_reduce(sums)
        mean_grad, mean_along = (sums / total).to(mean.dtype).chunk(2)
        away *= (mean_along * inverse_std.square()).view(shape)
        scale = inverse_std if weight is None else inverse_std * weight
        grad_x = (grad - mean_grad.view(shape) - away) * scale.view(shape)
        if weight is None:
            return grad_x.to(x.dtype), None, None, None
        grad_weight = (along * inverse_std).to(weight.dtype)
        return grad_x.to(x.dtype), grad_weight, grad_bias.to(weight.dtype), None


def _global_moments(wide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, C, ...) -> mean (C,), biased variance (C,), count () in float64, of all ranks."""
    local_var, local_mean = torch.var_mean(wide, others(wide), correction=0)
    count = wide.numel() // wide.shape[1]
    mean64, var64 = local_mean.double(), local_var.double()
    sums = torch.cat([mean64, var64 + mean64.square(), mean64.new_ones(1)]) * count
    dist.all_reduce(sums)
    total = sums[-1]
    mean64, square = (sums[:-1] / total).chunk(2)
    return mean64.to(wide.dtype), (square - mean64.square()).to(wide.dtype), total


def widened(x: Tensor) -> Tensor:
    """In at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def others(x: Tensor) -> tuple[int, ...]:
    """All dimensions but the channels'."""
    return (0, *range(2, x.ndim))


def channel_shape(x: Tensor) -> tuple[int, ...]:
    """(1, C, 1, ...): how a vector of channels lines up with ``x``."""
    return (1, -1, *[1] * (x.ndim - 2))


def convert(model: nn.Module) -> nn.Module:
    """Make every batch-norm of a model synchronized, in place; weights and key names stay.

    Raises:
        InputError: a layer with its own kind of batch statistics.
    """
    for name, module in model.named_modules():
        kind = type(module)
        if _is_timms(kind):
            module.__class__ = SyncBatchNormAct
        elif isinstance(module, _BatchNorm) and kind.forward in (
            _BatchNorm.forward,
            nn.SyncBatchNorm.forward,
        ):
            module.__class__ = SyncBatchNorm
        elif _gathers_statistics(module):
            raise InputError(
                f"--arch: the layer {name} is a {kind.__name__}, whose statistics cannot be shared "
                "among processes, so that their networks would drift apart; train on one process, "
                "or take another --arch"
            )
    return model


def _is_timms(kind: type) -> bool:
    """Whether a layer computes as timm's BatchNormAct2d; by name, as timm is slow to import."""
    known = [
        base for base in kind.__mro__ if base.__name__ in ("BatchNormAct2d", "SyncBatchNormAct")
    ]
    return bool(known) and kind.forward is known[-1].forward and issubclass(kind, _BatchNorm)


def _gathers_statistics(module: nn.Module) -> bool:
    """Whether a layer updates running statistics of its batches (a frozen one does
    not)."""
    if isinstance(module, SyncBatchNorm) or type(module).__name__.startswith("Frozen"):
        return False
    tracked = module._buffers.get("running_var", module._buffers.get("running_mean"))
    return isinstance(module, _BatchNorm) or tracked is not None
