"""Our XCiT computes what timm's does, and meets its guarantees on layout, autograd and compile."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.reference import plain_cross_covariance_attention
from xcit_dino.errors import InputError
from xcit_dino.models.cross_covariance import cross_covariance_attention
from xcit_dino.models.xcit import XCiT, residual
from xcit_dino.models.zoo import create_model

MILLIONS = {  # issue text: with a 1000-class head, patch 8 and patch 16
    "nano_12": (3.05, 3.05),
    "tiny_12": (6.71, 6.72),
    "tiny_24": (12.11, 12.12),
    "small_12": (26.21, 26.25),
    "small_24": (47.63, 47.67),
    "medium_24": (84.32, 84.40),
    "large_24": (188.93, 189.10),
}


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Values that show every difference: layer scales, norms and temperatures far from 1."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        if value.ndim >= 2 and value.numel() != value.shape[0]:
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
        elif value.is_floating_point():
            value.uniform_(0.3, 1.2, generator=generator)


def to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The key mapping written apart from models/weights/load.py, so that each checks the other."""
    out = {}
    for name, value in state.items():
        name = name.replace("pos_embeder", "pos_embed")
        if name.startswith("cls_attn_blocks") and ".qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                out[name.replace("qkv", letter)] = part
        else:
            out[name] = value
    return out


def twins(size: str, patch: int, num_classes: int) -> tuple[XCiT, nn.Module]:
    ours = create_model(f"xcit_{size}_p{patch}", num_classes=num_classes)
    assert isinstance(ours, XCiT)
    randomize(ours)
    theirs = timm.create_model(f"xcit_{size}_p{patch}_224", num_classes=num_classes)
    theirs.load_state_dict(to_timm(ours.state_dict()))
    return ours, theirs


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("size", MILLIONS)
def test_parameter_counts(size: str) -> None:
    for patch, millions in zip((8, 16), MILLIONS[size], strict=True):
        with torch.device("meta"):
            model = create_model(f"xcit_{size}_p{patch}", num_classes=1000)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("size", "patch", "num_classes", "image"),
    [
        ("nano_12", 16, 10, (64, 64)),
        ("nano_12", 8, 0, (32, 48)),
        ("tiny_12", 16, 0, (48, 80)),
        ("tiny_24", 8, 7, (24, 40)),
        ("small_12", 16, 5, (96, 64)),
    ],
)
def test_outputs_and_gradients_equal_timm(
    size: str, patch: int, num_classes: int, image: tuple[int, int], training: bool
) -> None:
    ours, theirs = twins(size, patch, num_classes)
    ours.train(training), theirs.train(training)
    images = torch.randn(3, 3, *image)
    outputs, gradients = [], []
    for model in (ours, theirs):
        x = images.clone().requires_grad_()
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
        gradients.append(x.grad)
    assert close(outputs[0], outputs[1])
    assert close(gradients[0], gradients[1])
    # One step of running statistics, too, where training.
    statistics = dict(theirs.named_buffers())
    assert all(close(b, statistics[n]) for n, b in ours.named_buffers() if b.is_floating_point())


def test_parameter_gradients_equal_timm_in_float64() -> None:
    ours, theirs = twins("nano_12", 8, 4)
    images = torch.randn(2, 3, 24, 32, dtype=torch.float64)
    for model in (ours, theirs):
        model.double().train()(images).square().sum().backward()
    expected = dict(theirs.named_parameters())
    gradients = to_timm({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():  # a key's bias has none: a softmax ignores shifts
        torch.testing.assert_close(gradient, expected[name].grad, rtol=1e-7, atol=1e-12)


def test_all_tokens_equal_timm() -> None:
    for size in ("nano_12", "tiny_12"):
        ours, theirs = twins(size, 16, 0)
        images = torch.randn(2, 3, 48, 32)
        tokens = ours.eval().forward_features(images)
        assert tokens.shape == (2, 1 + 6, ours.embed_dim)
        assert close(tokens, theirs.eval().forward_features(images))
        assert close(ours(images), tokens[:, 0])


def test_nano_backpropagates_with_anomaly_detection() -> None:
    """The official nano writes in place into a tensor that autograd needs, and fails here."""
    model = create_model("xcit_nano_12_p16").train()
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        model(images).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_gradcheck_of_a_small_model() -> None:
    model = XCiT(patch_size=4, embed_dim=8, depth=1, num_heads=2, tokens_norm=False).double()
    randomize(model)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model.train(), (images,), atol=1e-4)


class CopyCounter(TorchDispatchMode):
    """Counts operators that copy a tensor as large as the tokens."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.copies = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("clone", "copy_", "_to_copy", "contiguous") and out.numel() >= self.size:
            self.copies.append(name)
        return out


def test_convolutions_read_and_write_tokens_without_a_copy() -> None:
    model = create_model("xcit_pico_6_p4")
    tokens = torch.randn(2, 8, 6, 80)
    interaction = model.blocks[0].local_mp
    with CopyCounter(tokens.numel()) as counter:
        out = interaction(tokens)
        tokens_of_stem = model.patch_embed(torch.randn(2, 3, 32, 24))
    assert counter.copies == []
    assert out.is_contiguous() and tokens_of_stem.is_contiguous()


def test_copy_counter_sees_a_copy() -> None:
    with CopyCounter(6) as counter:
        torch.ones(2, 3).t().contiguous()
    assert counter.copies == ["clone"]


def test_cross_covariance_attention_under_bfloat16_autocast() -> None:
    """As close to float32 as timm's normalized copies are."""
    ours, theirs = twins("nano_12", 16, 0)
    tokens = torch.randn(4, 7, 7, 128)
    exact = ours.blocks[0].attn(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        error = (ours.blocks[0].attn(tokens) - exact).norm()
        their_error = (theirs.blocks[0].attn(tokens.flatten(1, 2)).view_as(exact) - exact).norm()
    assert error <= 0.02 * exact.norm()
    assert error <= 1.1 * their_error


def test_attention_survives_float16_sums_and_empty_channels() -> None:
    qkv = torch.full((1, 900, 3 * 80), 12.0, dtype=torch.float16)  # 12 * 12 * 900 > 65504
    qkv[..., :5] = 0
    qkv.requires_grad_()
    attended = cross_covariance_attention(qkv, torch.ones(4, 1, 1))
    assert attended.isfinite().all()
    attended.sum().backward()
    assert qkv.grad is not None and qkv.grad.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 7])
def test_attention_equals_the_plain_twin_with_its_gradients(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, tokens, 3 * 10, dtype=torch.float64, generator=generator)
    temperature = torch.rand(2, 1, 1, dtype=torch.float64, generator=generator) + 0.5
    weight = torch.randn(3, tokens, 10, dtype=torch.float64, generator=generator)
    found = []
    for attend in (cross_covariance_attention, plain_cross_covariance_attention):
        leaves = [x.clone().requires_grad_() for x in (qkv, temperature)]
        attended = attend(*leaves)
        found.append((attended, *torch.autograd.grad((attended * weight).sum(), leaves)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(cross_covariance_attention(qkv, temperature), found[1][0])


def test_a_compiled_block_has_the_gradients_of_an_eager_one() -> None:
    block = create_model("xcit_pico_6_p4").blocks[0].train()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
    tokens, found = torch.randn(2, 3, 3, 80), []
    for each in (block, compiled):
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            each(tokens).square().mean().backward()
        found.append({name: p.grad for name, p in block.named_parameters()})
    torch.testing.assert_close(found[0], found[1], rtol=0.02, atol=1e-4)


def test_drop_path_skips_images_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x, update, gamma = torch.randn(4000, 2, 3), torch.randn(4000, 2, 3), torch.rand(3)
    out = residual(x, update, gamma, drop_rate=0.25)
    change = out - x
    kept = change.flatten(1).abs().sum(1) > 0
    assert abs(kept.float().mean() - 0.75) < 0.03
    torch.testing.assert_close(change[kept], (gamma * update / 0.75)[kept], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(residual(x, update, gamma), x + gamma * update)


def test_drop_path_only_in_training_and_at_every_depth() -> None:
    model = create_model("xcit_pico_6_p4", drop_path_rate=0.5)
    images = torch.randn(2, 3, 16, 16)
    assert [block.drop_path_rate for block in model.blocks] == [0.5] * 6
    assert torch.equal(model.eval()(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_attention_maps_and_intermediates_agree_with_the_forward_pass() -> None:
    model = create_model("xcit_tiny_12_p8").eval()
    randomize(model)
    images = torch.randn(2, 3, 24, 40)
    attentions, seen = [block.attn for block in model.cls_attn_blocks], []
    for attn in attentions:
        attn.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    maps = model.get_attention(images)
    assert maps.shape == (2, 2, 4, 3, 5)
    # By hand, from the layer's inputs, with queries for all tokens as in the official code.
    for layer, attn, tokens in zip(maps, attentions, seen, strict=True):
        q, k, _ = attn.qkv(tokens).view(2, 16, 3, 4, 48).permute(2, 0, 3, 1, 4)
        weights = ((q[:, :, :1] * k).sum(-1) / 48**0.5).softmax(-1)
        assert close(layer.flatten(2), weights[:, :, 1:])

    (first, _), (last, patches) = model.get_intermediate(images, n=2)
    tokens = model.forward_features(images)
    assert close(last, model(images)) and close(patches, tokens[:, 1:].mean(1))
    assert not close(first, last)
    assert len(model.get_intermediate(images)) == 1
    maps: dict[int, torch.Tensor] = {}
    assert close(model.get_intermediate(images, 1, maps)[0][0], last)
    expected = model.block_maps(images, range(len(model.blocks)))
    assert list(maps) == list(expected) and all(close(maps[n], expected[n]) for n in maps)
    with pytest.raises(InputError, match="2 class attention layers"):
        model.get_intermediate(images, n=3)


def test_compiles_without_graph_breaks_for_any_size() -> None:
    model = XCiT(patch_size=4, embed_dim=16, depth=2, num_heads=2).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((16, 24), (32, 16)):
            images = torch.randn(2, 3, *size)
            assert close(compiled(images), model(images))


def test_recomputed_activations_change_neither_gradients_nor_statistics() -> None:
    images, results = torch.randn(4, 3, 16, 16), []
    for again in (False, True):
        torch.manual_seed(0)
        model = create_model("xcit_pico_6_p4", drop_path_rate=0.5).train()
        model.grad_checkpointing = again
        torch.manual_seed(1)
        model(images).square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((gradients, dict(model.named_buffers())))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_recomputing_keeps_less() -> None:
    kept = []
    model = create_model("xcit_pico_6_p4").train()
    for model.grad_checkpointing in (False, True):
        sizes: list[int] = []

        def pack(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(torch.randn(2, 3, 32, 32))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4


def test_any_channels_and_patch_4() -> None:
    model = create_model("xcit_pico_6_p4", in_chans=5, num_classes=3)
    assert model(torch.randn(2, 5, 12, 20)).shape == (2, 3)
    assert len(model.patch_embed.proj) == 3  # two convolutions, one GELU
    assert 0.5e6 < sum(p.numel() for p in create_model("xcit_pico_6_p16").parameters()) < 0.75e6


def test_no_weight_decay_names_exist() -> None:
    model = create_model("xcit_pico_6_p8")
    names = dict(model.named_parameters())
    spared = {name for name, p in names.items() if "temperature" in name or name == "cls_token"}
    assert model.no_weight_decay() == spared and len(spared) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"patch_size": 14}, "patch_size 14"), ({"drop_path_rate": 1.0}, "drop_path_rate 1.0")],
)
def test_bad_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_model("xcit_pico_6_p4", **arguments)


def test_indivisible_image_names_the_remedy() -> None:
    with pytest.raises(InputError, match="30x32 is not divisible by patch_size 4.*multiples of 4"):
        create_model("xcit_pico_6_p4")(torch.randn(1, 3, 30, 32))
