"""Naming layouts of XCiT's tensors; pure functions on state dicts.

Official (facebookresearch/xcit, and ours): query, key and value of the class attention are one
matrix, the positions are ``pos_embeder``. timm: three matrices, ``pos_embed``. PASSL (Paddle):
official names, but linear weights are transposed and batch-norm statistics renamed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xcit_dino.models.zoo import list_models, model_spec

State = dict[str, Tensor]
# Name components added by wrappers: DistributedDataParallel, torch.compile, activation
# checkpointing, FSDP.
WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
COUNTER = "num_batches_tracked"  # torch's batch-norms count batches; Paddle's do not
PADDLE_STATISTICS = {"running_mean": "_mean", "running_var": "_variance"}


class XCiTShape(NamedTuple):
    """Sizes of an XCiT, inferred from a state dict."""

    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int

    def __str__(self) -> str:
        """The built-in model's name, or the sizes if there is no such model."""
        for name in list_models():
            spec = model_spec(name)
            if self == (spec.patch_size, spec.embed_dim, spec.depth, spec.num_heads):
                return name
        return (
            f"an XCiT of patch {self.patch_size}, embed_dim {self.embed_dim}, depth {self.depth}, "
            f"{self.num_heads} heads"
        )


def infer_shape(state: State) -> XCiTShape | None:
    """Sizes of the XCiT in an official state dict; None if it is another network."""
    if "cls_token" not in state or "blocks.0.attn.temperature" not in state:
        return None
    convs = sum(name.startswith("patch_embed.proj.") and value.ndim == 4
                for name, value in state.items())  # fmt: skip
    depth = sum(name.endswith(".attn.temperature") for name in state)
    heads = len(state["blocks.0.attn.temperature"])
    return XCiTShape(2**convs, state["cls_token"].shape[-1], depth, heads)


def flatten(tree: dict[Any, Any], prefix: str = "") -> State:
    """Nested dicts to ``{"teacher.module.backbone.cls_token": tensor}``; drops other values."""
    flat: State = {}
    for key, value in tree.items():
        if isinstance(value, Tensor):
            flat[f"{prefix}{key}"] = value
        elif isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
    return flat


def unwrap(state: State) -> State:
    """Remove name components added by wrappers."""
    return {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): value
        for name, value in state.items()
    }


def select_prefix(state: State, prefix: str) -> State:
    """The tensors whose names start with prefix, with the prefix removed."""
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def detect_layout(state: State) -> str:
    """``"paddle"``, ``"timm"`` or ``"official"``."""
    if any(name.endswith("._variance") for name in state):
        return "paddle"
    if "pos_embed.token_projection.weight" in state or "cls_attn_blocks.0.attn.q.weight" in state:
        return "timm"
    return "official"


def to_official(state: State) -> State:
    """Convert any layout to the official one; networks other than XCiT are returned unchanged."""
    converters: dict[str, Callable[[State], State]] = {"paddle": _from_paddle, "timm": _from_timm}
    return converters.get(detect_layout(state), dict)(state)


def to_timm(state: State) -> State:
    """Convert official to timm: split class attention, ``pos_embed``."""
    out: State = {}
    for name, value in state.items():
        if name.startswith("cls_attn_blocks.") and ".attn.qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                out[name.replace(".qkv.", f".{letter}.")] = part
        else:
            out[name.replace("pos_embeder.", "pos_embed.")] = value
    return out


def _from_timm(state: State) -> State:
    """Convert timm to official, from split or joined class attention."""
    out: State = {}
    for name, value in state.items():
        if name.startswith("cls_attn_blocks.") and (".attn.k." in name or ".attn.v." in name):
            continue  # joined together with q
        if name.startswith("cls_attn_blocks.") and ".attn.q." in name:
            parts = [state[name.replace(".q.", f".{letter}.")] for letter in "qkv"]
            out[name.replace(".q.", ".qkv.")] = torch.cat(parts)
        else:
            out[name.replace("pos_embed.", "pos_embeder.")] = value
    return out


def to_paddle(state: State) -> State:
    """Convert official to PASSL, whose batch-norms have no batch counters: these are dropped."""
    out: State = {}
    for name, value in state.items():
        parent, _, leaf = name.rpartition(".")
        if leaf == COUNTER:
            continue
        name = f"{parent}.{PADDLE_STATISTICS[leaf]}" if leaf in PADDLE_STATISTICS else name
        out[name] = value.t() if value.ndim == 2 else value
    return out


def _from_paddle(state: State) -> State:
    """Convert PASSL to official, with batch counters of 0."""
    torch_leaf = {theirs: ours for ours, theirs in PADDLE_STATISTICS.items()}
    out: State = {}
    for name, value in state.items():
        parent, _, leaf = name.rpartition(".")
        name = f"{parent}.{torch_leaf[leaf]}" if leaf in torch_leaf else name
        out[name] = value.t().contiguous() if value.ndim == 2 else value
        if leaf == "_variance":
            out[f"{parent}.{COUNTER}"] = torch.tensor(0)
    return out
