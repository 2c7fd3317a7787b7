"""The projection head equals one built from torch's own weight_norm, values and gradients."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit_dino.models.head import DINOHead


class PlainHead(nn.Module):
    """DINO's head as the paper tells it, with torch's (deprecated) weight_norm."""

    def __init__(self, use_bn: bool) -> None:
        super().__init__()
        norm = [nn.BatchNorm1d(24)] if use_bn else []
        norm2 = [nn.BatchNorm1d(24)] if use_bn else []
        self.mlp = nn.Sequential(
            nn.Linear(12, 24), *norm, nn.GELU(), nn.Linear(24, 24), *norm2, nn.GELU(),
            nn.Linear(24, 8),
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.last_layer = nn.utils.weight_norm(nn.Linear(8, 40, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, p=2))


def small_head(**kwargs: bool) -> DINOHead:
    return DINOHead(12, 40, hidden_dim=24, bottleneck_dim=8, **kwargs)


@pytest.mark.parametrize("use_bn", [False, True])
def test_equals_the_plain_head(use_bn: bool) -> None:
    plain = PlainHead(use_bn).double()
    plain.last_layer.weight_g.data.uniform_(0.5, 2)
    head = small_head(use_bn=use_bn, norm_last_layer=False).double()
    head.load_state_dict(plain.state_dict())
    x = torch.randn(6, 12, dtype=torch.float64)
    target = torch.randn(6, 40, dtype=torch.float64)
    torch.testing.assert_close(head(x), plain(x))
    for model in (head, plain):
        model.zero_grad()
        (model(x) * target).sum().backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    actual = {name: p.grad for name, p in head.named_parameters()}
    torch.testing.assert_close(actual, expected)


def test_norm_last_layer_freezes_the_length_of_the_prototypes() -> None:
    head = small_head()
    assert not head.last_layer.weight_g.requires_grad
    assert small_head(norm_last_layer=False).last_layer.weight_g.requires_grad
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=10.0)
    head(torch.randn(4, 12)).square().sum().backward()
    optimizer.step()
    weight = head.last_layer(torch.eye(8)).T  # the scores of the axes
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(40))


def test_scores_are_those_of_the_bottleneck_in_float32_under_autocast() -> None:
    head = small_head()
    x = torch.randn(5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        z, scores = head.bottleneck(x), head(x)
    rows = F.normalize(head.last_layer.weight_v, dim=1)
    torch.testing.assert_close(scores, z @ rows.T, atol=1e-6, rtol=1e-5)


def test_bottleneck_stays_on_the_sphere_under_autocast() -> None:
    head = small_head()
    with torch.autocast("cpu", torch.bfloat16):
        z = head.bottleneck(torch.randn(64, 12))
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(64), atol=1e-6, rtol=0)


def test_default_sizes_and_official_names() -> None:
    head = DINOHead(80, 100)
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    assert shapes == {
        "mlp.0.weight": (2048, 80), "mlp.0.bias": (2048,),
        "mlp.2.weight": (2048, 2048), "mlp.2.bias": (2048,),
        "mlp.4.weight": (256, 2048), "mlp.4.bias": (256,),
        "last_layer.weight_g": (100, 1), "last_layer.weight_v": (100, 256),
    }  # fmt: skip
    assert head.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not head.mlp[0].bias.any()
    assert set(dict(DINOHead(8, 5, nlayers=1).mlp.named_parameters())) == {"weight", "bias"}
