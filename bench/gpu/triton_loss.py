"""The pointwise work of ssl/fused_loss.py as two Triton kernels, to be measured: ``make gpu``.

After the product of features and prototypes, ``ssl/fused_loss.py`` passes over the scores some ten
times in the backward pass (scale, shift, exponential, targets, scale, rounding) and some five times
in the forward pass. Here each is one kernel that reads the products once. The part ``kernels`` of
bench/gpu/run.py measures whether that is worth it; until then the training does not use it.

    TRITON_INTERPRET=1 python -m bench.gpu.triton_loss    # values and gradients on a CPU
    python -m bench.gpu.triton_loss                       # compiles for sm_90, which needs no GPU

Shapes as in ssl/fused_loss.py: R = V B rows, Z bottleneck, K prototypes, G global views.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton has no types for its kernels' arguments)

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xcit_dino.ssl.fused_loss import dino_cross_entropy

BLOCK = 1024  # prototypes at a time


@triton.jit
def forward_kernel(
    products, factor, targets, normalizer, agreement, B,
    K: tl.constexpr, G: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a row's scores, and their sum weighted by its targets."""
    row = tl.program_id(0)
    view, image = row // B, row % B
    lanes = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    agrees = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        columns = start + lanes
        inside = columns < K
        place = row.to(tl.int64) * K + columns
        score = tl.load(products + place, mask=inside, other=0.0).to(tl.float32)
        score = score * tl.load(factor + columns, mask=inside, other=0.0)
        higher = tl.maximum(largest, tl.where(inside, score, largest))
        grown = tl.where(inside, tl.exp(score - higher), 0.0)
        shrunk = tl.where(largest == higher, 1.0, tl.exp(largest - higher))
        total = total * shrunk + grown
        largest = higher
        for g in tl.static_range(G):
            place = (g * B + image).to(tl.int64) * K + columns
            target = tl.load(targets + place, mask=inside, other=0.0)
            agrees += tl.where((view == g) & (view < OWN), 0.0, target) * score
    top = tl.max(largest, 0)
    summed = tl.sum(tl.where(total > 0, total * tl.exp(largest - top), 0.0), 0)
    tl.store(normalizer + row, top + tl.log(summed))
    tl.store(agreement + row, tl.sum(agrees, 0))


@triton.jit
def backward_kernel(
    products, factor, shift, targets, scale, gradient, B, K,
    G: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of products: ``(exp(score - shift) - targets) * factor * scale``."""
    row = tl.program_id(0)
    view, image = row // B, row % B
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    place = row.to(tl.int64) * K + columns
    factors = tl.load(factor + columns, mask=inside, other=0.0)
    score = tl.load(products + place, mask=inside, other=0.0).to(tl.float32) * factors
    found = tl.exp(score - tl.load(shift + row))
    for g in tl.static_range(G):
        other = (g * B + image).to(tl.int64) * K + columns
        target = tl.load(targets + other, mask=inside, other=0.0)
        found -= tl.where((view == g) & (view < OWN), 0.0, target)
    found = found * factors * tl.load(scale)
    tl.store(gradient + place, found.to(gradient.dtype.element_ty), mask=inside)


class _CrossEntropy(torch.autograd.Function):
    """``ssl/fused_loss.py`` with all prototypes at once, in 16-bit products."""

    @staticmethod
    def forward(
        ctx: Any, z_RZ: Tensor, v_KZ: Tensor, g_K1: Tensor, targets_GBK: Tensor,
        temperature: float, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        num_global, batch, prototypes = targets_GBK.shape
        rows = len(z_RZ)
        length_K1 = torch.linalg.vector_norm(v_KZ, dim=1, keepdim=True)
        factor_K = (g_K1 / length_K1).flatten() / temperature
        z, v, targets = z_RZ.to(dtype), v_KZ.to(dtype), targets_GBK.contiguous()
        with torch.autocast(z.device.type, enabled=False):
            products = z @ v.T
        normalizer, agreement = (z_RZ.new_empty(rows, dtype=torch.float32) for _ in "na")
        forward_kernel[(rows,)](
            products, factor_K, targets, normalizer, agreement, batch, K=prototypes,
            G=num_global, OWN=num_global, BLOCK=BLOCK,
        )  # fmt: skip
        teachers = torch.full_like(normalizer, num_global)
        teachers[: num_global * batch] -= 1
        terms = num_global * batch * (rows // batch - 1)
        ctx.save_for_backward(
            z, v, v_KZ, g_K1, targets, products, factor_K, length_K1, normalizer - teachers.log()
        )
        ctx.terms = terms
        return ((teachers * normalizer).sum() - agreement.sum()) / terms

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, v, v_KZ, g_K1, targets, products, factor_K, length_K1, shift = ctx.saved_tensors
        num_global, batch, prototypes = targets.shape
        gradient = torch.empty_like(products)
        backward_kernel[(len(z), triton.cdiv(prototypes, BLOCK))](
            products, factor_K, shift, targets, grad_loss / ctx.terms, gradient, batch, prototypes,
            G=num_global, OWN=num_global, BLOCK=BLOCK,
        )  # fmt: skip
        grad_z = (gradient @ v).float()
        pull_KZ = (gradient.T @ z).to(v_KZ.dtype)
        along_K1 = (v_KZ * pull_KZ).sum(1, keepdim=True)
        grad_v = pull_KZ.addcmul_(v_KZ, along_K1 / length_K1.square(), value=-1)
        return grad_z, grad_v, along_K1 / g_K1, None, None, None


def cross_entropy(
    z_RZ: Tensor, weight_v_KZ: Tensor, weight_g_K1: Tensor, targets_GBK: Tensor, temperature: float,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """As :func:`dino_cross_entropy` of all views; ``dtype``: of the products."""
    loss = _CrossEntropy.apply(z_RZ, weight_v_KZ, weight_g_K1, targets_GBK, temperature, dtype)
    assert isinstance(loss, Tensor)
    return loss


def example(
    device: str, batch: int = 3, views: int = 5, prototypes: int = 2500, width: int = 16
) -> tuple[Tensor, ...]:
    """Bottleneck, prototypes, their lengths and the targets of two global views."""
    torch.manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(views * batch, width, device=device), dim=1)
    v, g = (torch.randn(prototypes, n, device=device) for n in (width, 1))
    targets = (4 * torch.randn(2, batch, prototypes, device=device)).softmax(-1)
    return z.requires_grad_(), v.requires_grad_(), g.requires_grad_(), targets


def difference(device: str, dtype: torch.dtype = torch.float32) -> float:
    """Largest difference of loss and gradients from ``ssl/fused_loss.py``, relative to their
    norm."""
    found = []
    for function in (cross_entropy, dino_cross_entropy):
        *inputs, targets = example(device)
        more = {"dtype": dtype} if function is cross_entropy else {}
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = function(*inputs, targets, 0.1, **more)
        loss.backward()
        found.append([loss.detach(), *(x.grad for x in inputs)])
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(*found, strict=True))


def compiled_for(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int
) -> str:
    """PTX of a kernel for a GPU of this compute capability, assembled as well; needs no GPU."""
    types = types | dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert done.asm["cubin"], kernel
    return done.asm["ptx"]


def compiled(capability: int = 90) -> dict[str, str]:
    """PTX of both kernels for 16-bit products."""
    names = "factor targets shift scale normalizer agreement"
    types = dict.fromkeys(names.split(), "*fp32") | {"B": "i32", "K": "i32"}
    types |= {"products": "*bf16", "gradient": "*bf16"}
    constants = {"G": 2, "OWN": 2, "BLOCK": BLOCK}
    kernels = {forward_kernel: constants | {"K": 65_536}, backward_kernel: constants}
    return {
        kernel.__name__: compiled_for(kernel, types, own, capability)
        for kernel, own in kernels.items()
    }


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET"):
        print(f"{difference('cpu'):.1e}")
    else:
        print("\n".join(f"{name}: {len(ptx):,} bytes of PTX" for name, ptx in compiled().items()))
