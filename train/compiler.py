"""``torch.compile`` and activation checkpointing, block by block.

All blocks of a network share their code, so one compiled graph serves them all: there is
one for each crop size and network, not one for each layer. Sizes are static. Graphs
are cached on disk between runs (torch's own cache; TORCHINDUCTOR_CACHE_DIR moves it).
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn

from xcit_dino.errors import InputError


def compile_blocks(backbone: nn.Module, choice: str, device: torch.device) -> None:
    """Compile the blocks of ``backbone``, in place; parameters keep their names.

    choice: ``on``; ``off``; ``auto``: on GPUs, and if the compiler fails there, torch warns and
    continues without it.

    Raises:
        InputError: ``on`` for a backbone that is not made of blocks.
    """
    blocks = getattr(backbone, "blocks", None)
    if choice == "on" and blocks is None:
        raise InputError("--compile on: this backbone has no blocks to compile; leave it at auto")
    if choice == "off" or blocks is None or (choice == "auto" and device.type != "cuda"):
        return
    torch._dynamo.config.suppress_errors = choice == "auto"
    for block in blocks:
        block.compile(dynamic=False)


def eager() -> AbstractContextManager[object]:
    """Disable compiled graphs inside the block: an evaluation's sizes would each need a graph."""
    return torch.compiler.set_stance("force_eager")


def checkpoint_blocks(backbone: nn.Module) -> None:
    """Let ``backbone`` recompute its blocks' activations in the backward pass.

    Raises:
        InputError: a backbone that cannot.
    """
    if hasattr(backbone, "grad_checkpointing"):
        backbone.grad_checkpointing = True  # type: ignore[assignment]
    elif hasattr(backbone, "set_grad_checkpointing"):  # timm's
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    else:
        raise InputError("--grad_checkpointing: this backbone does not support it")
