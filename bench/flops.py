"""Floating-point operations of a DINO step with XCiT, counted from the sizes.

A multiplication and an addition are two operations. Only matrix products and convolutions count, as
is usual for utilization: norms, activations and softmaxes do not, nor does anything recomputed to
save memory. The official class attention has about 2 % more, keys and values of all tokens; ours
asks the tokens themselves.
"""

from __future__ import annotations

import argparse

from xcit_dino.models.zoo import ModelSpec, model_spec

HIDDEN, BOTTLENECK = 2048, 256


def forward_flops(spec: ModelSpec, side: int) -> int:
    """One image of ``side`` pixels through the backbone, without classifier."""
    dim, tokens = spec.embed_dim, (side // spec.patch_size) ** 2
    block = 12 * dim * dim  # qkv 3, proj 1, MLP 8
    block += 2 * dim * (dim // spec.num_heads)  # K^T Q and the product with V
    block += 2 * 9 * dim  # two depthwise 3x3
    class_attention = 12 * dim * dim + dim  # query, its key, value, proj; MLP on the class token
    class_attention += 2 * (tokens + 1) * dim * spec.num_heads  # the attention to all tokens
    position = 2 * (side // spec.patch_size) * 32 * dim
    products = tokens * spec.depth * block + 2 * class_attention + position + _stem(spec, side)
    return 2 * products


def _stem(spec: ModelSpec, side: int) -> int:
    """Strided 3x3 convolutions, each doubling the width."""
    products, width_in, convs = 0, 3, spec.patch_size.bit_length() - 1
    for i in range(convs):
        side //= 2
        width_out = spec.embed_dim >> (convs - 1 - i)
        products += 9 * width_in * width_out * side * side
        width_in = width_out
    return products


def head_flops(dim: int, prototypes: int) -> int:
    """One crop through the projection head and its prototypes."""
    return 2 * (dim * HIDDEN + HIDDEN * HIDDEN + HIDDEN * BOTTLENECK + BOTTLENECK * prototypes)


def step_flops(args: argparse.Namespace) -> int:
    """One image's share of a step: the student forward and backward (three forwards' worth) over
    all crops, the teacher forward over the two global ones."""
    spec = model_spec(args.arch)
    head = head_flops(spec.embed_dim, args.prototypes)
    large = forward_flops(spec, args.global_size) + head
    small = forward_flops(spec, args.local_size) + head
    return 3 * (2 * large + args.local_crops * small) + 2 * large
