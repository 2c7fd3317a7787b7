"""Tokens stay channels last from the images to the class attention: no convolution and no norm is
given another layout, and the copies that remain are counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from xcit_dino.models.zoo import create_model

SPATIAL = ("convolution", "convolution_backward", "native_batch_norm", "native_batch_norm_backward")
BLOCKS = 6


class Layouts(TorchDispatchMode):
    """Counts operations that copy without changing the dtype, and images in another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[str] = Counter()
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        tokens = isinstance(result, Tensor) and result.numel() > 10_000
        tokens = tokens and result.shape[-2:] != (3, 3)  # the gradient of a weight
        if name in ("clone", "copy_", "_to_copy") and tokens:
            source = args[1] if name == "copy_" else args[0]
            self.copies[name] += source.dtype == result.dtype
        if name in SPATIAL:
            images = [x for x in pytree.tree_leaves((args, result)) if isinstance(x, Tensor)]
            images = [x for x in images if x.ndim == 4 and len(x) == 2]  # not weights
            plain = [x for x in images if not x.is_contiguous(memory_format=torch.channels_last)]
            self.others += [name] * len(plain)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_a_forward_and_backward_pass(dtype):
    torch.manual_seed(0)
    model = create_model("xcit_pico_6_p8").train()
    images = torch.randn(2, 3, 96, 96)
    with Layouts() as forward, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        features = model(images)
    with Layouts() as backward:
        features.sum().backward()
    assert forward.others == backward.others == []
    # the images; queries, keys and values by head, and the attended values back, in every block
    squares = {"_to_copy": BLOCKS} if dtype == torch.float32 else {}  # in bf16 a conversion
    assert +forward.copies == {"clone": 1 + 2 * BLOCKS} | squares
    assert +backward.copies == {"clone": BLOCKS}  # the gradient of the attended values


def test_another_layout_is_noticed():
    weight = torch.randn(4, 4, 3, 3)
    with Layouts() as found:
        torch.conv2d(torch.randn(2, 4, 8, 8), weight)
        torch.randn(2, 8, 32, 32).to(memory_format=torch.channels_last)
    assert found.others and found.copies == {"_to_copy": 1}
