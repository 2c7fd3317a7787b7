"""Precision of the forward pass on a device."""

from __future__ import annotations

import torch

from xcit_dino.errors import InputError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """``auto | bf16 | fp16 | fp32`` -> dtype of the forward pass.

    ``auto``: bf16 if the hardware has bf16 instructions, GPU or CPU; else fp32, and on a Mac's GPU,
    of which the first have none.

    Raises:
        InputError: fp16 without CUDA.
    """
    cuda = device.type == "cuda"
    if name == "auto" and device.type == "mps":
        return torch.float32
    if name == "auto":
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else cpu_has_bf16()
        return torch.bfloat16 if fast else torch.float32
    if name == "fp16" and not cuda:
        where = "a Mac" if device.type == "mps" else "a CPU"
        raise InputError(f"--precision fp16 needs a GPU with CUDA; on {where} use bf16 or fp32")
    return DTYPES[name]


def cpu_has_bf16() -> bool:
    """Whether this processor has bf16 instructions; without them bf16 is slower than fp32."""
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16") or known.get("bf16"))


def widest(device: torch.device) -> torch.dtype:
    """float64 for sums; float32 on MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to ``dtype``; off for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
