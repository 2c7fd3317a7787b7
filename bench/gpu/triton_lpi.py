"""Local patch interaction (models/xcit.py) as Triton kernels, to be measured: ``make gpu``.

Two depthwise 3x3 convolutions with GELU and batch-norm between them. The first kernel convolves and
adds up the GELU's statistics, the second applies GELU and batch-norm to what it reads: two reads
and two writes of the tokens instead of some eight passes. Backward, what the compiler would write
between the convolutions is one kernel, and sums over all tokens are taken while they are read.
The part ``kernels`` of run.py measures whether that is worth it; until then the training does
not use it.

    TRITON_INTERPRET=1 python -m bench.gpu.triton_lpi     # values and gradients on a CPU
    python -m bench.gpu.triton_lpi                        # compiles for sm_90, which needs no GPU

Shapes: x (B, H, W, D) contiguous, P = B H W tokens; weights (D, 9), row by row.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton has no types for its kernels' arguments)

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from bench.gpu.triton_loss import compiled_for
from xcit_dino.models.xcit import LocalPatchInteraction

TOKENS, CHANNELS = 32, 64  # of a program


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def conv_kernel(
    x, weight, bias, scale, shift, other, mean, inverse, out, sums, P, H, W, D,
    NORMALIZED: tl.constexpr, FLIPPED: tl.constexpr, SUMS: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A depthwise 3x3 convolution, zeros beyond the edges.

    NORMALIZED: of ``gelu(x) * scale + shift``. FLIPPED: its transpose, the gradient of its input.
    SUMS: per program, 1: of the GELU of the result and of its square; 2: of the result and of its
    product with the normalized GELU of ``other``; 0: none.
    """
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row, column = (tokens // W) % H, tokens % W
    real = (tokens < P)[:, None] & (channels < D)[None, :]
    place = tokens.to(tl.int64)[:, None] * D + channels[None, :]
    found = tl.zeros((TOKENS, CHANNELS), tl.float32)
    if not FLIPPED:
        found += tl.load(bias + channels, mask=channels < D, other=0.0)[None, :]
    if NORMALIZED:
        scales = tl.load(scale + channels, mask=channels < D, other=0.0)[None, :]
        shifts = tl.load(shift + channels, mask=channels < D, other=0.0)[None, :]
    for tap in tl.static_range(9):
        down, right = tap // 3 - 1, tap % 3 - 1
        inside = (row + down >= 0) & (row + down < H) & (column + right >= 0) & (column + right < W)
        inside = real & inside[:, None]
        value = tl.load(x + place + (down * W + right) * D, mask=inside, other=0.0).to(tl.float32)
        if NORMALIZED:
            value = tl.where(inside, gelu(value) * scales + shifts, 0.0)
        number = 8 - tap if FLIPPED else tap
        taps = tl.load(weight + channels * 9 + number, mask=channels < D, other=0.0)
        found += value * taps[None, :]
    tl.store(out + place, found.to(out.dtype.element_ty), mask=real)
    if SUMS > 0:
        found = tl.where(real, found, 0.0)
        if SUMS == 1:
            first = gelu(found)
            second = first * first
        else:
            beside = gelu(tl.load(other + place, mask=real, other=0.0).to(tl.float32))
            beside -= tl.load(mean + channels, mask=channels < D, other=0.0)[None, :]
            beside *= tl.load(inverse + channels, mask=channels < D, other=0.0)[None, :]
            first = found
            second = found * beside
        into = sums + tl.program_id(0) * 2 * D + channels
        tl.store(into, tl.sum(first, 0), mask=channels < D)
        tl.store(into + D, tl.sum(second, 0), mask=channels < D)


@triton.jit
def weight_kernel(
    x, scale, shift, grad, sums, P, H, W, D,
    NORMALIZED: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Per program, gradients of the nine weights of a channel and of its bias: sums [10, D]."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row, column = (tokens // W) % H, tokens % W
    real = (tokens < P)[:, None] & (channels < D)[None, :]
    place = tokens.to(tl.int64)[:, None] * D + channels[None, :]
    gradient = tl.load(grad + place, mask=real, other=0.0).to(tl.float32)
    into = sums + tl.program_id(0) * 10 * D + channels
    if NORMALIZED:
        scales = tl.load(scale + channels, mask=channels < D, other=0.0)[None, :]
        shifts = tl.load(shift + channels, mask=channels < D, other=0.0)[None, :]
    for tap in tl.static_range(9):
        down, right = tap // 3 - 1, tap % 3 - 1
        inside = (row + down >= 0) & (row + down < H) & (column + right >= 0) & (column + right < W)
        inside = real & inside[:, None]
        value = tl.load(x + place + (down * W + right) * D, mask=inside, other=0.0).to(tl.float32)
        if NORMALIZED:
            value = tl.where(inside, gelu(value) * scales + shifts, 0.0)
        tl.store(into + tap * D, tl.sum(value * gradient, 0), mask=channels < D)
    tl.store(into + 9 * D, tl.sum(gradient, 0), mask=channels < D)


@triton.jit
def between_kernel(
    grad, inner, scale, mean, inverse, away, along, out, P, D,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradient of batch-norm and GELU: from that of the normalized to that of ``inner``."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real = (tokens < P)[:, None] & (channels < D)[None, :]
    place = tokens.to(tl.int64)[:, None] * D + channels[None, :]
    x = tl.load(inner + place, mask=real, other=0.0).to(tl.float32)
    found = tl.load(grad + place, mask=real, other=0.0).to(tl.float32)
    share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    normal = x * share - tl.load(mean + channels, mask=channels < D, other=0.0)[None, :]
    normal *= tl.load(inverse + channels, mask=channels < D, other=0.0)[None, :]
    found -= tl.load(away + channels, mask=channels < D, other=0.0)[None, :]
    found -= normal * tl.load(along + channels, mask=channels < D, other=0.0)[None, :]
    found *= tl.load(scale + channels, mask=channels < D, other=0.0)[None, :]
    found *= share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    tl.store(out + place, found.to(out.dtype.element_ty), mask=real)


def grid_of(x: Tensor) -> tuple[int, int]:
    tokens, channels = x.numel() // x.shape[-1], x.shape[-1]
    return -(-tokens // TOKENS), -(-channels // CHANNELS)


BLOCKS = {"TOKENS": TOKENS, "CHANNELS": CHANNELS}


class _LocalPatchInteraction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, gamma: Tensor, beta: Tensor,
        weight2: Tensor, bias2: Tensor, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        (height, width, dim), grid = x.shape[1:], grid_of(x)
        tokens = x.numel() // dim
        sizes = (tokens, height, width, dim)
        inner, y, nothing = torch.empty_like(x), torch.empty_like(x), x.new_empty(0)
        sums = x.new_empty(grid[0], 2, dim, dtype=torch.float32)
        conv_kernel[grid](
            x, weight1, bias1, nothing, nothing, nothing, nothing, nothing, inner, sums, *sizes,
            NORMALIZED=False, FLIPPED=False, SUMS=1, **BLOCKS,
        )  # fmt: skip
        mean64, square64 = sums.double().sum(0) / tokens
        var = (square64 - mean64.square()).clamp_min(0).float()
        mean, inverse = mean64.float(), (var + eps).rsqrt()
        scale = gamma * inverse
        shift = beta - mean * scale
        conv_kernel[grid](
            inner, weight2, bias2, scale, shift, nothing, nothing, nothing, y, nothing, *sizes,
            NORMALIZED=True, FLIPPED=False, SUMS=0, **BLOCKS,
        )  # fmt: skip
        ctx.save_for_backward(x, inner, weight1, weight2, scale, shift, mean, inverse)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, inner, weight1, weight2, scale, shift, mean, inverse = ctx.saved_tensors
        (height, width, dim), grid = x.shape[1:], grid_of(x)
        tokens = x.numel() // dim
        sizes = (tokens, height, width, dim)
        grad, nothing = grad.contiguous(), x.new_empty(0)
        between, grad_x = torch.empty_like(x), torch.empty_like(x)
        sums = x.new_empty(grid[0], 2, dim, dtype=torch.float32)
        conv_kernel[grid](
            grad, weight2, nothing, nothing, nothing, inner, mean, inverse, between, sums, *sizes,
            NORMALIZED=False, FLIPPED=True, SUMS=2, **BLOCKS,
        )  # fmt: skip
        grad_beta, grad_gamma = sums.sum(0)
        of_second = x.new_empty(grid[0], 10, dim, dtype=torch.float32)
        weight_kernel[grid](inner, scale, shift, grad, of_second, *sizes, NORMALIZED=True, **BLOCKS)
        away, along = grad_beta / tokens, grad_gamma / tokens
        between_kernel[grid](
            between, inner, scale, mean, inverse, away, along, between, tokens, dim, **BLOCKS
        )
        conv_kernel[grid](
            between, weight1, nothing, nothing, nothing, nothing, nothing, nothing, grad_x, nothing,
            *sizes, NORMALIZED=False, FLIPPED=True, SUMS=0, **BLOCKS,
        )  # fmt: skip
        of_first = torch.empty_like(of_second)
        weight_kernel[grid](
            x, nothing, nothing, between, of_first, *sizes, NORMALIZED=False, **BLOCKS
        )
        first, second = of_first.sum(0), of_second.sum(0)
        return (
            grad_x, first[:9].T.view_as(weight1), first[9], grad_gamma, grad_beta,
            second[:9].T.view_as(weight2), second[9], None,
        )  # fmt: skip


def interaction(layer: LocalPatchInteraction, x_BHWD: Tensor) -> Tensor:
    """``layer(x)`` in training, batch statistics included."""
    bn = layer.bn
    y, mean, var = _LocalPatchInteraction.apply(
        x_BHWD.contiguous(), layer.conv1.weight, layer.conv1.bias, bn.weight, bn.bias,
        layer.conv2.weight, layer.conv2.bias, bn.eps,
    )  # fmt: skip
    count = x_BHWD.numel() // x_BHWD.shape[-1]
    with torch.no_grad():
        assert bn.num_batches_tracked is not None and bn.momentum is not None
        bn.num_batches_tracked += 1
        bn.running_mean.lerp_(mean, bn.momentum)  # type: ignore[union-attr]
        bn.running_var.lerp_(var * count / (count - 1), bn.momentum)  # type: ignore[union-attr]
    return y


def difference(device: str, sizes: tuple[int, ...] = (2, 5, 7, 70)) -> float:
    """Largest relative difference of outputs, gradients and statistics from the network's layer, in
    float32."""
    torch.manual_seed(0)
    layer = LocalPatchInteraction(sizes[-1]).to(device).train()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    start = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(sizes, device=device)
    weight, found = torch.randn(sizes, device=device), []
    for function in (layer, lambda images: interaction(layer, images)):
        layer.load_state_dict(start)
        layer.zero_grad()
        images = x.clone().requires_grad_()
        y = function(images)
        (y * weight).sum().backward()
        buffers = [value.float().clone() for value in layer.buffers()]
        gradients = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        found.append([y.detach(), images.grad, *gradients, *buffers])
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(*found, strict=True))


def compiled(capability: int = 90) -> dict[str, str]:
    """PTX of the kernels for bf16 tokens; needs no GPU."""
    names = "weight bias scale shift mean inverse sums away along"
    types = dict.fromkeys(names.split(), "*fp32") | dict.fromkeys("PHWD", "i32")
    types |= dict.fromkeys(("x", "other", "out", "grad", "inner"), "*bf16")
    modes = {
        conv_kernel: ({"NORMALIZED": False, "FLIPPED": False, "SUMS": 1},
                      {"NORMALIZED": True, "FLIPPED": False, "SUMS": 0},
                      {"NORMALIZED": False, "FLIPPED": True, "SUMS": 2}),
        weight_kernel: ({"NORMALIZED": False}, {"NORMALIZED": True}),
        between_kernel: ({},),
    }  # fmt: skip
    return {
        f"{kernel.__name__} {' '.join(map(str, mode.values()))}".strip(): compiled_for(
            kernel, types, mode | BLOCKS, capability
        )
        for kernel, each in modes.items()
        for mode in each
    }


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET"):
        print(f"{difference('cpu'):.1e}")
    else:
        print("\n".join(f"{name}: {len(ptx):,} bytes of PTX" for name, ptx in compiled().items()))
