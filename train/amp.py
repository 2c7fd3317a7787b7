"""Precision of the forward pass on a device."""

from __future__ import annotations

import torch

from xcit_dino.errors import InputError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """``auto | bf16 | fp16 | fp32`` -> dtype of the forward pass.

    ``auto``: bf16 if the hardware has bf16 instructions, GPU or CPU; else fp32.

    Raises:
        InputError: fp16 on a CPU.
    """
    cuda = device.type == "cuda"
    if name == "auto":
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else cpu_has_bf16()
        return torch.bfloat16 if fast else torch.float32
    if name == "fp16" and not cuda:
        raise InputError("--precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    return DTYPES[name]


def cpu_has_bf16() -> bool:
    """Whether this processor has bf16 instructions; without them bf16 is slower than fp32."""
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16") or known.get("bf16"))


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to ``dtype``; off for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
