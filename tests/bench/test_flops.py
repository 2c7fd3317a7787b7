"""The counted operations against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.flops import forward_flops, head_flops
from xcit_dino.models.head import DINOHead
from xcit_dino.models.zoo import create_model, model_spec


@pytest.mark.parametrize(
    ("arch", "side"), [("xcit_nano_12_p16", 224), ("xcit_nano_12_p16", 96), ("xcit_tiny_12_p8", 64)]
)
def test_backbone(arch: str, side: int) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        create_model(arch).train()(torch.randn(1, 3, side, side))
    assert forward_flops(model_spec(arch), side) == counter.get_total_flops()


def test_head() -> None:
    with FlopCounterMode(display=False) as counter:
        DINOHead(128, 1000)(torch.randn(1, 128))
    assert head_flops(128, 1000) == counter.get_total_flops()
