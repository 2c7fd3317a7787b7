"""The DINO loss against the official double loop over views, values and gradients."""

import copy

import pytest
import torch

from bench.reference import PlainLoss, PlainPrototypes, plain_koleo, plain_sinkhorn
from xcit_dino.models.head import Prototypes
from xcit_dino.ssl.fused_loss import dino_cross_entropy
from xcit_dino.ssl.koleo import koleo_loss
from xcit_dino.ssl.loss import DinoLoss
from xcit_dino.ssl.sinkhorn import sinkhorn_knopp

K, Z, B, TEMP = 37, 6, 5, 0.06


def bottleneck(views, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    z = torch.nn.functional.normalize(torch.randn(views * B, Z, dtype=dtype), dim=1)
    return z.requires_grad_()


def prototypes(dtype=torch.float64, norm_last=False):
    torch.manual_seed(7)
    ours = Prototypes(Z, K, norm_last).to(dtype)
    torch.nn.init.uniform_(ours.weight_g, 0.5, 2.0)
    plain = PlainPrototypes(Z, K, norm_last).to(dtype)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


@pytest.mark.parametrize("views", [2, 3, 12])
@pytest.mark.parametrize("chunk", [8, K, 1000])
def test_values_gradients_and_center_equal_the_double_loop(views, chunk, monkeypatch):
    """Prototypes included; the last chunk is a smaller one."""
    monkeypatch.setattr(
        "xcit_dino.ssl.loss.dino_cross_entropy",
        lambda *args, **kwargs: dino_cross_entropy(*args, **kwargs, chunk=chunk),
    )
    ours, plain = DinoLoss(K).double(), PlainLoss(K, views, 0.1, 0.9).double()
    layer, plain_layer = prototypes()
    for step in range(3):  # the center moves
        z, teacher = bottleneck(views, step), 3 * layer(bottleneck(2, 100 + step)).detach()
        inputs = (z, layer.weight_v, layer.weight_g)
        got = ours(z, layer, ours.targets(teacher, TEMP, 2))
        grads = torch.autograd.grad(got, inputs)
        ours.update_center()
        want = plain(plain_layer(z), teacher, TEMP)
        inputs = (z, plain_layer.weight_v, plain_layer.weight_g)
        plain_grads = torch.autograd.grad(want, inputs)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        torch.testing.assert_close(grads, plain_grads, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(ours.center, plain.center[0])


def test_gradients_equal_finite_differences():
    layer, _ = prototypes()
    targets = torch.randn(2, B, K, dtype=torch.float64).softmax(-1)
    z = bottleneck(3)
    arguments = (z, layer.weight_v, layer.weight_g, targets, 0.1, 10)
    assert torch.autograd.gradcheck(dino_cross_entropy, arguments)


@pytest.mark.parametrize("views", [3, 12])
def test_global_and_local_views_apart_add_up_to_the_whole(views):
    layer, _ = prototypes()
    targets = torch.randn(2, B, K, dtype=torch.float64).softmax(-1)
    z, loss_fn = bottleneck(views), DinoLoss(K)
    inputs = (z, layer.weight_v, layer.weight_g)
    whole = loss_fn(z, layer, targets)
    want = torch.autograd.grad(whole, inputs)
    one = loss_fn(z[: 2 * B], layer, targets, num_views=views)
    two = loss_fn(z[2 * B :], layer, targets, local=True, num_views=views)
    torch.testing.assert_close(one + two, whole, rtol=1e-12, atol=0)
    got = torch.autograd.grad(one + two, inputs)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_a_loss_scale_and_micro_batches_go_through():
    """What GradScaler and accumulation do: the factor comes from outside, gradients add up."""
    layer, _ = prototypes()
    targets = torch.randn(2, B, K, dtype=torch.float64).softmax(-1)
    once, scaled = bottleneck(4), bottleneck(4)
    dino_cross_entropy(once, layer.weight_v, layer.weight_g, targets, 0.1).backward()
    first = layer.weight_v.grad.clone()
    for _ in range(2):
        loss = dino_cross_entropy(scaled, layer.weight_v, layer.weight_g, targets, 0.1)
        (loss * 1024 / 2).backward()
    torch.testing.assert_close(scaled.grad, 1024 * once.grad)
    torch.testing.assert_close(layer.weight_v.grad - first, 1024 * first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_close_to_float64_as_the_plain_version_is(dtype):
    """Under autocast and without; the normalizer and the softmax stay in float32."""
    exact, _ = prototypes()
    layer, plain_layer = (copy.deepcopy(net).float() for net in prototypes())
    targets = torch.randn(2, B, K, dtype=torch.float64).mul(3).softmax(-1)

    def gradient(layer, z, targets, plain):
        low = dtype == torch.bfloat16 and z.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            if plain:
                students = (layer(z).float() / 0.1).log_softmax(-1).unflatten(0, (4, B))
                pairs = [(q, s) for q in (0, 1) for s in range(4) if s != q]
                loss = sum(-(targets[q] * students[s]).sum(-1).mean() for q, s in pairs) / 6
            else:
                loss = dino_cross_entropy(z, layer.weight_v, layer.weight_g, targets, 0.1, 8)
        return torch.autograd.grad(loss, (z, layer.weight_v))

    z = bottleneck(4)
    small = z.detach().float().requires_grad_()
    best = gradient(exact, z, targets, False)
    ours = gradient(layer, small, targets.float(), False)
    plain = gradient(plain_layer, small, targets.float(), True)
    for b, o, p in zip(best, ours, plain, strict=True):
        assert (o - b).norm() <= 1.5 * (p - b).norm() + 1e-6 * b.norm()
        assert (o - b).norm() <= (0.02 if dtype == torch.bfloat16 else 1e-5) * b.norm()


def test_two_micro_batches_make_one_center_update():
    whole, halves = DinoLoss(K), DinoLoss(K)
    teacher = torch.randn(2 * B, K)
    whole.targets(teacher, TEMP, 2), whole.update_center()
    for half in (teacher[:4], teacher[4:]):
        halves.targets(half, TEMP, 2)
    halves.update_center()
    torch.testing.assert_close(whole.center, halves.center)


def test_the_only_state_is_the_center():
    assert list(DinoLoss(K).state_dict()) == ["center"]


@pytest.mark.parametrize("iterations", [1, 3, 50])
def test_sinkhorn_knopp_equals_dinov2s_and_uses_prototypes_equally(iterations):
    torch.manual_seed(0)
    scores = torch.rand(24, K, dtype=torch.float64) * 2 - 1
    found = sinkhorn_knopp(scores, 0.07, iterations)
    torch.testing.assert_close(found, plain_sinkhorn(scores, 0.07, iterations))
    torch.testing.assert_close(found.sum(1), torch.ones(24, dtype=torch.float64))
    if iterations == 50:
        torch.testing.assert_close(
            found.sum(0), torch.full((K,), 24 / K).double(), rtol=0.01, atol=0
        )


def test_sinkhorn_knopp_of_large_scores_does_not_overflow():
    """exp(40 / 0.04) is beyond any float."""
    torch.manual_seed(0)
    scores = torch.rand(24, K) * 2 + 40
    found = sinkhorn_knopp(scores, 0.04)
    exact = plain_sinkhorn(scores.double() - 40, 0.04)
    torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=1e-7)


def test_koleo_equals_the_loops_value_and_gradient():
    torch.manual_seed(0)
    ours = torch.randn(3 * 7, 5, dtype=torch.float64, requires_grad=True)
    plain = ours.detach().clone().requires_grad_()
    found, want = koleo_loss(ours, 3), plain_koleo(list(plain.chunk(3)))
    torch.testing.assert_close(found, want)
    found.backward()
    want.backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_koleo_is_computed_in_float32_under_autocast():
    torch.manual_seed(0)
    features = torch.randn(14, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = koleo_loss(features.bfloat16(), 2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, koleo_loss(features.bfloat16().double(), 2).float())
