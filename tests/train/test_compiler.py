"""Compiled blocks and recomputed ones against plain ones."""

from functools import partialmethod

import pytest
import torch
from torch import nn

from xcit_dino.errors import InputError
from xcit_dino.models.xcit import XCiT
from xcit_dino.models.zoo import create_model
from xcit_dino.train.compiler import checkpoint_blocks, compile_blocks, eager

CPU = torch.device("cpu")


def small() -> XCiT:
    torch.manual_seed(0)
    return XCiT(patch_size=4, embed_dim=16, depth=3, num_heads=2).train()


def gradients(model: nn.Module, side: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(side)
    model.zero_grad()
    model(torch.randn(2, 3, side, side)).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def graphs(monkeypatch):
    """Graphs compiled, traced as for real but run by torch itself: inductor takes half a minute."""
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    torch._dynamo.reset()
    yield traced
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
def test_one_graph_for_each_crop_size_whatever_the_depth(graphs):
    plain, compiled = small(), small()
    compile_blocks(compiled, "on", CPU)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for _ in range(2):
        for side in (16, 8):
            torch.testing.assert_close(gradients(compiled, side), gradients(plain, side))
    assert len(graphs) == 2


def test_an_evaluation_compiles_nothing(graphs):
    model = small()
    compile_blocks(model, "on", CPU)
    with eager(), torch.no_grad():
        model.eval()(torch.randn(1, 3, 16, 16))
    assert not graphs


def test_auto_leaves_a_cpu_alone_and_on_needs_blocks(graphs):
    model = small()
    compile_blocks(model, "auto", CPU)
    gradients(model, 8)
    assert not graphs
    with pytest.raises(InputError, match="--compile on"):
        compile_blocks(nn.Linear(2, 2), "on", CPU)


def test_checkpointing_where_there_is_some():
    ours, timms = small(), create_model("timm/vit_tiny_patch16_224")
    checkpoint_blocks(ours), checkpoint_blocks(timms)
    assert ours.grad_checkpointing and timms.grad_checkpointing
    with pytest.raises(InputError, match="--grad_checkpointing"):
        checkpoint_blocks(nn.Linear(2, 2))
