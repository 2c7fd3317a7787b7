"""Cross-entropy with a teacher's targets over many prototypes, a few prototypes at a time.

All that couples the scores of a student's row is their log-normalizer; once it is known, the
gradient of each score is ``exp(score - normalizer) - target``. So the forward pass goes over the
prototypes once for the normalizers, and the backward pass once more for the gradients. No tensor of
size (V*B, K) exists in float32 (200 MB at 64 images, 12 crops and 65,536 prototypes; softmax,
gradients and copies would be several times that). Between the passes the products of features and
prototypes are kept if autocast made them 16-bit, and recomputed otherwise.

Shape suffixes: V views (G global ones first), B images, R = V B rows, Z bottleneck, K prototypes,
C prototypes of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

SCORES_AT_ONCE = {"cpu": 2**20, "cuda": 2**24}  # float32: what fits in a cache; 64 MB


def dino_cross_entropy(
    z_RZ: Tensor,
    weight_v_KZ: Tensor,
    weight_g_K1: Tensor,
    targets_GBK: Tensor,
    temperature: float,
    chunk: int | None = None,
    *,
    local: bool = False,
    num_views: int | None = None,
) -> Tensor:
    """Mean of ``H(target g of an image, softmax(student's view v / temperature))`` over all images
    and all pairs (g, v) except of a view with itself (dino ``main_dino.py:DINOLoss``).

    z_RZ: the student's bottleneck, views-major; weight_v_KZ, weight_g_K1: the weight-normalized
    last layer; targets_GBK: probabilities; chunk: prototypes at a time, by default as many as fit
    in a cache or in 64 MB. Matrix products are in autocast's dtype, everything else in float32 (or
    float64); nothing waits for the device.

    The rows may be only some of an image's ``num_views`` (the global ones first, or with ``local``
    none of them); the result is then their contribution to the mean over all pairs.
    """
    kind = z_RZ.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else z_RZ.dtype
    if chunk is None:
        chunk = max(256, SCORES_AT_ONCE.get(kind, 2**24) // len(z_RZ))
    num_global, batch, _ = targets_GBK.shape
    own = 0 if local else num_global
    terms = num_global * batch * ((num_views or len(z_RZ) // batch) - 1)
    loss = _CrossEntropy.apply(
        z_RZ, weight_v_KZ, weight_g_K1, targets_GBK, temperature, chunk, dtype, own, terms
    )
    assert isinstance(loss, Tensor)
    return loss


class _CrossEntropy(torch.autograd.Function):
    """The pairs of a student's row share its normalizer, and their targets add up:
    ``sum_g H(q_g, p_v) = n_v * logsumexp(s_v) - <sum_g q_g, s_v>`` with n_v targets for view v.

    own: how many of the first views are global, each with a target from the same view that it is
    not compared with; terms: the divisor of the sum.
    """

    @staticmethod
    def forward(
        ctx: Any, z_RZ: Tensor, v_KZ: Tensor, g_K1: Tensor, targets_GBK: Tensor,
        temperature: float, chunk: int, dtype: torch.dtype, own: int, terms: int,
    ) -> Tensor:  # fmt: skip
        num_global, batch, _ = targets_GBK.shape
        scores = _Scores(z_RZ, v_KZ, g_K1, temperature, dtype)
        normalizer_R = z_RZ.new_full((len(z_RZ),), -torch.inf)
        agreement = z_RZ.new_zeros(())
        kept: list[Tensor] = []
        for part in _chunks(len(v_KZ), chunk):
            products_RC = scores.products(part)
            if dtype.itemsize == 2:
                kept.append(products_RC)
            scores_VBC = scores(products_RC, part).unflatten(0, (-1, batch))
            targets_GBC = targets_GBK[:, :, part]
            total_BC = targets_GBC.sum(0)
            normalizer_R = torch.logaddexp(normalizer_R, scores_VBC.logsumexp(-1).flatten())
            agreement += (total_BC * scores_VBC.sum(0)).sum()
            agreement -= (targets_GBC[:own] * scores_VBC[:own]).sum()
        teachers_R = torch.full_like(normalizer_R, num_global)  # how many targets a row has
        teachers_R[: own * batch] -= 1
        ctx.save_for_backward(z_RZ, v_KZ, g_K1, targets_GBK, normalizer_R - teachers_R.log())
        ctx.arguments = temperature, chunk, dtype, own, terms, kept
        return ((teachers_R * normalizer_R).sum() - agreement) / terms

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z_RZ, v_KZ, g_K1, targets_GBK, shift_R = ctx.saved_tensors
        temperature, chunk, dtype, own, terms, kept = ctx.arguments
        batch = targets_GBK.shape[1]
        scores = _Scores(z_RZ, v_KZ, g_K1, temperature, dtype)
        grad_z_RZ, grad_v_KZ = torch.zeros_like(z_RZ), torch.empty_like(v_KZ)
        grad_g_K1 = torch.empty_like(g_K1)
        for number, part in enumerate(_chunks(len(v_KZ), chunk)):
            products_RC = kept[number] if kept else scores.products(part)
            grad_RC = scores(products_RC, part).sub_(shift_R[:, None])
            grad_RC.exp_()  # n_v times the softmax
            grad_VBC = grad_RC.unflatten(0, (-1, batch))
            targets_GBC = targets_GBK[:, :, part]
            grad_VBC -= targets_GBC.sum(0)
            grad_VBC[:own] += targets_GBC[:own]
            # here, not at the end: fp16 needs the scaler's factor before rounding
            grad_RC *= scores.factor_K[part] * (grad_loss / terms)
            grad = grad_RC.to(dtype)
            grad_z_RZ += grad @ v_KZ[part].to(dtype)
            # the length of v is irrelevant: a gradient along v only changes g
            pull_CZ, v_CZ = (grad.T @ scores.z_RZ).to(v_KZ.dtype), v_KZ[part]
            along_C1 = (v_CZ * pull_CZ).sum(1, keepdim=True)
            away_C1 = along_C1 / scores.length_K1[part].square()
            torch.addcmul(pull_CZ, v_CZ, away_C1, value=-1, out=grad_v_KZ[part])
            torch.div(along_C1, g_K1[part], out=grad_g_K1[part])
        return grad_z_RZ, grad_v_KZ, grad_g_K1, *[None] * 6


class _Scores:
    """``z . (g v / |v|) / temperature`` for a chunk of prototypes; length and temperature scale the
    scores, which are few, so that no normalized copy of the prototypes is made."""

    def __init__(
        self, z_RZ: Tensor, v_KZ: Tensor, g_K1: Tensor, temperature: float, dtype: torch.dtype
    ) -> None:
        self.z_RZ, self.v_KZ, self.wide = z_RZ.to(dtype), v_KZ, z_RZ.dtype
        self.length_K1 = torch.linalg.vector_norm(v_KZ, dim=1, keepdim=True)
        self.factor_K = (g_K1 / self.length_K1).flatten() / temperature

    def products(self, part: slice) -> Tensor:
        """``z . v``, (R, C), in the dtype of matrix products."""
        with torch.autocast(self.z_RZ.device.type, enabled=False):
            return self.z_RZ @ self.v_KZ[part].to(self.z_RZ.dtype).T

    def __call__(self, products_RC: Tensor, part: slice) -> Tensor:
        """(R, C), a tensor of its own, at least float32."""
        return products_RC.to(self.wide) * self.factor_K[part]


def _chunks(count: int, size: int) -> Iterator[slice]:
    """``0:size``, ``size:2 size`` ... up to ``count``."""
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))
