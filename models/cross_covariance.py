"""Cross-covariance attention with its gradient written out (El-Nouby et al., 2021, equation 1).

With ``S = Q^T K / (|q_i| |k_j|)``, ``A = softmax(t S)`` and ``Y = V A^T`` the gradients are
``dV = dY A``, ``dA = dY^T V`` and, with ``M = t dS / (|q_i| |k_j|)``,

``dQ = K M^T - Q diag(t sum_j dS S / |q_i|^2)``, ``dK = Q M - K diag(t sum_i dS S / |k_j|^2)``.

Autograd would make a tensor of all tokens for every norm, quotient and view on the way, and on a
CPU each of them costs as much as a product.

Shape suffixes: B images, N patches, h heads, d channels per head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cross_covariance_attention(qkv_BNE: Tensor, temperature_h11: Tensor) -> Tensor:
    """Queries, keys and values (B, N, 3 h d) -> (B, N, h d).

    Products are in the input's dtype; lengths, cosines and softmax in at least float32.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # which fuses the passes
        attended = _CrossCovarianceAttention.apply(qkv_BNE, temperature_h11)
        assert isinstance(attended, Tensor)
        return attended
    return _attend(qkv_BNE, temperature_h11)[0]


def _attend(qkv_BNE: Tensor, temperature_h11: Tensor) -> tuple[Tensor, ...]:
    """The output, and what its gradient needs."""
    qkv_BN3hd = qkv_BNE.unflatten(-1, (3, len(temperature_h11), -1))
    qkv_3BhNd = qkv_BN3hd.permute(2, 0, 3, 1, 4).contiguous()
    if qkv_3BhNd.dtype == torch.float16:
        # a sum over N tokens can exceed 65504; cosines do not depend on scale
        qkv_3BhNd = torch.cat((qkv_3BhNd[:2] * _shrink(qkv_3BhNd), qkv_3BhNd[2:]))
    q, k, v = qkv_3BhNd.unbind(0)
    wide = torch.promote_types(v.dtype, torch.float32)
    squares_2Bhd = qkv_3BhNd[:2].to(wide, copy=True).square_().sum(-2).clamp_min_(1e-24)
    lengths_q, lengths_k = squares_2Bhd.sqrt()
    lengths_Bhdd = lengths_q.unsqueeze(-1) * lengths_k.unsqueeze(-2)
    cosine_Bhdd = (q.transpose(-2, -1) @ k).to(wide) / lengths_Bhdd
    attention_Bhdd = (cosine_Bhdd * temperature_h11).softmax(-1)
    y_BhNd = v @ attention_Bhdd.to(v.dtype).transpose(-2, -1)
    y_BNE = y_BhNd.transpose(1, 2).flatten(2)
    return y_BNE, qkv_3BhNd, squares_2Bhd, lengths_Bhdd, cosine_Bhdd, attention_Bhdd


class _CrossCovarianceAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_BNE: Tensor, temperature_h11: Tensor) -> Tensor:
        y_BNE, *kept = _attend(qkv_BNE, temperature_h11)
        ctx.save_for_backward(temperature_h11, *kept)
        return y_BNE

    @staticmethod
    def backward(ctx: Any, grad_BNE: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        temperature, qkv_3BhNd, squares_2Bhd, lengths, cosine, attention = ctx.saved_tensors
        (q, k, v), wide = qkv_3BhNd, attention.dtype
        grad_y = grad_BNE.unflatten(-1, (len(temperature), -1)).transpose(1, 2).contiguous()
        grad_v = grad_y @ attention.to(v.dtype)
        grad_attention = (grad_y.transpose(-2, -1) @ v).to(wide)
        grad_scores = torch._softmax_backward_data(grad_attention, attention, -1, wide)
        along, pull = grad_scores * cosine, (grad_scores * temperature / lengths).to(v.dtype)
        turn = torch.stack(((along * temperature).sum(-1), (along * temperature).sum(-2)))
        turn_q, turn_k = (turn / squares_2Bhd).to(v.dtype).unsqueeze(-2)
        grad_q = (k @ pull.transpose(-2, -1)).addcmul_(q, turn_q, value=-1)
        grad_k = (q @ pull).addcmul_(k, turn_k, value=-1)
        if v.dtype == torch.float16:
            grad_q, grad_k = grad_q * _shrink(qkv_3BhNd), grad_k * _shrink(qkv_3BhNd)
        grads = [grad.transpose(1, 2) for grad in (grad_q, grad_k, grad_v)]
        return torch.stack(grads, dim=2).flatten(2), along.sum((0, 2, 3)).view_as(temperature)


def _shrink(x_3BhNd: Tensor) -> float:
    return x_3BhNd.shape[-2] ** -0.5
