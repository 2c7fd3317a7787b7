"""Dense features: of every layer and any size, against hooks in the network; the pyramid."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xcit_dino.errors import InputError
from xcit_dino.models.dense import Pyramid, feature_maps, grid_features, map_sizes, pyramid_taps
from xcit_dino.models.zoo import create_model


def hooked(module: nn.Module) -> list[torch.Tensor]:
    """Collects what a module returns."""
    seen: list[torch.Tensor] = []
    module.register_forward_hook(lambda _, __, out: seen.append(out))  # pyright: ignore
    return seen


@torch.no_grad()
def test_maps_of_blocks_are_what_the_blocks_return():
    model = create_model("xcit_pico_6_p8").eval()
    images = torch.randn(2, 3, 24, 40)
    seen = {tap: hooked(model.blocks[tap]) for tap in (0, 3, 5)}  # type: ignore[index]
    tokens = model.forward_features(images)  # type: ignore[operator]
    expected = {tap: out[0].permute(0, 3, 1, 2) for tap, out in seen.items()}
    found = feature_maps(model, images, [5, -1, 0, 3])
    assert [tuple(x.shape) for x in found] == [(2, 80, 3, 5)] * 4
    for tap, x in zip((5, 0, 3), (found[0], found[2], found[3]), strict=True):
        assert torch.equal(x, expected[tap])
    assert torch.equal(found[1].flatten(2).transpose(1, 2), tokens[:, 1:])


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(24, 40), (17, 8), (9, 33)])
def test_any_size_is_padded_to_whole_patches(height: int, width: int):
    model = create_model("xcit_pico_6_p8").eval()
    images = torch.randn(1, 3, height, width)
    grid = grid_features(model, images)
    assert grid.shape == (1, -(-height // 8), -(-width // 8), 80)
    padded = images[:, :, [min(y, height - 1) for y in range(grid.shape[1] * 8)]]
    padded = padded[..., [min(x, width - 1) for x in range(grid.shape[2] * 8)]]
    assert torch.equal(grid.flatten(1, 2), model.forward_features(padded)[:, 1:])  # type: ignore


@torch.no_grad()
def test_maps_of_timm():
    vit = create_model("timm/vit_tiny_patch16_224").eval()
    seen = hooked(vit.blocks[3])  # type: ignore[index]
    images = torch.randn(1, 3, 32, 48)
    tokens = vit.forward_features(images)  # type: ignore[operator]
    third, output = feature_maps(vit, images, [3, -1])
    assert torch.allclose(third.flatten(2).transpose(1, 2), seen[0][:, 1:], atol=1e-6)
    assert torch.allclose(output.flatten(2).transpose(1, 2), tokens[:, 1:], atol=1e-6)
    net = create_model("timm/resnet18").eval()
    assert pyramid_taps(net) == (1, 2, 3, 4)
    assert map_sizes(net, pyramid_taps(net), 64, 3) == [(64, 4), (128, 8), (256, 16), (512, 32)]


@pytest.mark.parametrize(
    "arch, taps",
    [("xcit_small_12_p8", (3, 5, 7, 11)), ("xcit_small_24_p16", (7, 11, 15, 23)),
     ("xcit_pico_6_p8", (1, 2, 3, 5))],
)  # fmt: skip
def test_taps_are_the_published_ones(arch: str, taps: tuple[int, ...]):
    with torch.device("meta"):
        assert pyramid_taps(create_model(arch)) == taps


def test_unknown_layers_are_refused():
    with pytest.raises(InputError, match="--taps 6: XCiT has layers 0 to 5"):
        feature_maps(create_model("xcit_pico_6_p8"), torch.zeros(1, 3, 16, 16), [6])


@pytest.mark.parametrize("patch, shapes", [
    (16, {"fpn1.0.weight": (384, 384, 2, 2), "fpn1.0.bias": (384,), "fpn1.1.weight": (384,),
          "fpn1.1.bias": (384,), "fpn1.3.weight": (384, 384, 2, 2), "fpn1.3.bias": (384,),
          "fpn2.0.weight": (384, 384, 2, 2), "fpn2.0.bias": (384,)}),
    (8, {"fpn1.0.weight": (384, 384, 2, 2), "fpn1.0.bias": (384,)}),
])  # fmt: skip
def test_pyramid_has_the_official_parameters(patch: int, shapes: dict[str, tuple[int, ...]]):
    """xcit ``semantic_segmentation/backbone/xcit.py``."""
    pyramid = Pyramid(384, patch)
    assert {name: tuple(p.shape) for name, p in pyramid.named_parameters()} == shapes
    levels = pyramid([torch.randn(1, 384, 4, 4)] * 4)
    sides = [4 * patch // stride for stride in (4, 8, 16, 32)]
    assert [x.shape[-1] for x in levels] == sides
