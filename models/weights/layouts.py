"""Names of XCiT's tensors in the layouts that exist; pure functions on state dicts.

Official (facebookresearch/xcit, and ours): queries, keys and values of the class attention are one
matrix, the positions are ``pos_embeder``. timm: three matrices and ``pos_embed``. PASSL (Paddle):
official names, but linear weights are transposed and batch-norm statistics renamed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xcit_dino.models.zoo import list_models, model_spec

State = dict[str, Tensor]
# Components that wrappers put into names: DistributedDataParallel, torch.compile, activation
# checkpointing, FSDP.
WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
COUNTER = "num_batches_tracked"  # torch's batch-norms count batches; Paddle's do not
PADDLE_STATISTICS = {"running_mean": "_mean", "running_var": "_variance"}


class Shape(NamedTuple):
    """What a state dict says about its XCiT."""

    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int

    def __str__(self) -> str:
        """The zoo's name, or the sizes where the zoo has no such model."""
        for name in list_models():
            spec = model_spec(name)
            if self == (spec.patch_size, spec.embed_dim, spec.depth, spec.num_heads):
                return name
        return (
            f"an XCiT of patch {self.patch_size}, embed_dim {self.embed_dim}, depth {self.depth}, "
            f"{self.num_heads} heads"
        )


def shape_of(state: State) -> Shape | None:
    """The sizes of the XCiT in an official state dict; None where it is something else."""
    if "cls_token" not in state or "blocks.0.attn.temperature" not in state:
        return None
    convs = sum(name.startswith("patch_embed.proj.") and value.ndim == 4
                for name, value in state.items())  # fmt: skip
    depth = sum(name.endswith(".attn.temperature") for name in state)
    heads = len(state["blocks.0.attn.temperature"])
    return Shape(2**convs, state["cls_token"].shape[-1], depth, heads)


def flatten(tree: dict[Any, Any], prefix: str = "") -> State:
    """Nested dicts to ``{"teacher.module.backbone.cls_token": tensor}``; the rest is left out."""
    flat: State = {}
    for key, value in tree.items():
        if isinstance(value, Tensor):
            flat[f"{prefix}{key}"] = value
        elif isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
    return flat


def unwrap(state: State) -> State:
    """Names without what wrappers put into them."""
    return {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): value
        for name, value in state.items()
    }


def under(state: State, prefix: str) -> State:
    """The tensors whose names begin with prefix, without it."""
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def layout_of(state: State) -> str:
    """``"paddle"``, ``"timm"`` or ``"official"``."""
    if any(name.endswith("._variance") for name in state):
        return "paddle"
    if "pos_embed.token_projection.weight" in state or "cls_attn_blocks.0.attn.q.weight" in state:
        return "timm"
    return "official"


def to_official(state: State) -> State:
    """Any layout to the official one; a network that is no XCiT passes unchanged."""
    converters: dict[str, Callable[[State], State]] = {"paddle": _from_paddle, "timm": _from_timm}
    return converters.get(layout_of(state), dict)(state)


def to_timm(state: State) -> State:
    """Official to timm: split class attention, ``pos_embed``."""
    out: State = {}
    for name, value in state.items():
        if name.startswith("cls_attn_blocks.") and ".attn.qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                out[name.replace(".qkv.", f".{letter}.")] = part
        else:
            out[name.replace("pos_embeder.", "pos_embed.")] = value
    return out


def _from_timm(state: State) -> State:
    """timm to official, from split or joined class attention."""
    out: State = {}
    for name, value in state.items():
        if name.startswith("cls_attn_blocks.") and (".attn.k." in name or ".attn.v." in name):
            continue  # joined where q comes by
        if name.startswith("cls_attn_blocks.") and ".attn.q." in name:
            parts = [state[name.replace(".q.", f".{letter}.")] for letter in "qkv"]
            out[name.replace(".q.", ".qkv.")] = torch.cat(parts)
        else:
            out[name.replace("pos_embed.", "pos_embeder.")] = value
    return out


def to_paddle(state: State) -> State:
    """Official to PASSL. Its batch-norms count no batches, so the counters stay behind."""
    out: State = {}
    for name, value in state.items():
        parent, _, leaf = name.rpartition(".")
        if leaf == COUNTER:
            continue
        name = f"{parent}.{PADDLE_STATISTICS[leaf]}" if leaf in PADDLE_STATISTICS else name
        out[name] = value.t() if value.ndim == 2 else value
    return out


def _from_paddle(state: State) -> State:
    """PASSL to official, the counters of the batch-norms at 0."""
    torch_leaf = {theirs: ours for ours, theirs in PADDLE_STATISTICS.items()}
    out: State = {}
    for name, value in state.items():
        parent, _, leaf = name.rpartition(".")
        name = f"{parent}.{torch_leaf[leaf]}" if leaf in torch_leaf else name
        out[name] = value.t().contiguous() if value.ndim == 2 else value
        if leaf == "_variance":
            out[f"{parent}.{COUNTER}"] = torch.tensor(0)
    return out
