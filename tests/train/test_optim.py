"""Optimizer parts against plain loops."""

import copy

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import nn

from xcit_dino.errors import InputError
from xcit_dino.models.zoo import create_model
from xcit_dino.train.optim import (
    adamw,
    clip_gradients,
    parameter_groups,
    set_hyperparameters,
    step_unless_nonfinite,
    update_average,
    update_ema,
)

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 5), nn.LayerNorm(5)
        self.temperature = nn.Parameter(torch.ones(2, 1, 1))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 5))
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)


def with_gradients(seed=0, scale=1.0):
    torch.manual_seed(seed)
    net = Net()
    for p in net.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p) * scale
    return net


def test_only_the_matrix_gets_weight_decay():
    net = Net()
    decayed, plain = parameter_groups(net)
    assert [p is net.linear.weight for p in decayed["params"]] == [True]
    assert len(plain["params"]) == 5 and decayed["decays"] and not plain["decays"]


def test_the_average_is_timms():
    """Parameters, batch-norm's statistics and its counter."""
    net = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4))
    theirs, ours = ModelEmaV3(net, decay=0.7), copy.deepcopy(net)
    for _ in range(3):
        net(torch.randn(2, 3, 5, 5))
        net[0].weight.data += 1
        theirs.update(net)
        update_average(ours, net, 0.7)
    assert ours[1].num_batches_tracked == 3
    for name, value in theirs.module.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("arch", "theirs"),
    [
        ("timm/vit_tiny_patch16_224", "vit_tiny_patch16_224"),
        ("timm/resnet18", "resnet18"),
        ("timm/tf_efficientnet_lite0", "tf_efficientnet_lite0"),
        ("xcit_nano_12_p8", "xcit_nano_12_p8_224"),
    ],
)
def test_layers_learn_as_fast_as_timm_has_it(arch, theirs):
    """DINO's head stands where timm's has its classifier."""
    with torch.device("meta"):
        net = nn.Module()
        net.backbone, net.head = create_model(arch), nn.Linear(3, 3)
        plain = timm.create_model(theirs, num_classes=10)
    names = {id(p): name for name, p in plain.named_parameters()}
    want = {
        names[id(p)]: group["lr_scale"]
        for group in param_groups_layer_decay(plain, layer_decay=0.7)
        for p in group["params"]
    }
    names = {id(p): name for name, p in net.named_parameters()}
    groups = parameter_groups(net, 0.7)
    found = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    assert found["head.weight"] == found["head.bias"] == 1
    for name, scale in found.items():
        other = name.removeprefix("backbone.").replace("pos_embeder", "pos_embed")
        if "cls_attn_blocks" in name:
            other = other.replace(".qkv.", ".q.")  # timm splits them
        if not name.startswith("head."):
            assert scale == pytest.approx(want[other]), name
    usual = {names[id(p)] for p in parameter_groups(net)[0]["params"]}
    decayed = {names[id(p)] for group in groups if group["decays"] for p in group["params"]}
    assert decayed == usual


def test_each_group_gets_its_share_of_the_learning_rate():
    net = nn.Module()
    net.backbone, net.head = create_model("xcit_pico_6_p8"), nn.Linear(80, 3)
    optimizer = adamw(net, 0.5)
    set_hyperparameters(optimizer, 0.1, 0.3)
    groups = optimizer.param_groups
    assert [g["lr"] for g in groups] == pytest.approx([0.1 * g["lr_scale"] for g in groups])
    assert {g["weight_decay"] for g in groups if g["decays"]} == {0.3}
    assert {g["weight_decay"] for g in groups if not g["decays"]} == {0.0}
    assert groups[0]["lr_scale"] == 1 and groups[-1]["lr_scale"] == 0.5**9  # 6 + 2 blocks, stem


def test_a_backbone_that_does_not_say_its_layers_is_refused():
    net = nn.Module()
    net.backbone = nn.Linear(3, 3)
    with pytest.raises(InputError, match="--layer_decay: .* leave it at 1"):
        parameter_groups(net, 0.9)


@pytest.mark.parametrize("limit", [0.5, 3.0, 100.0])
def test_clipping_equals_a_loop_over_parameters(limit):
    net = with_gradients(scale=4.0)
    plain = copy.deepcopy(net)
    for p, q in zip(plain.parameters(), net.parameters(), strict=True):
        if q.grad is not None:
            p.grad = q.grad.clone()
            coefficient = limit / (p.grad.norm() + 1e-6)
            if coefficient < 1:
                p.grad.mul_(coefficient)
    norms = clip_gradients(net.parameters(), limit)
    assert len(norms) == 6
    for p, q in zip(plain.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("limit", [0.5, 3.0, 100.0])
def test_clipping_together_equals_torchs(limit):
    ours, theirs = with_gradients(scale=4.0), with_gradients(scale=4.0)
    norms = clip_gradients(ours.parameters(), limit, together=True)
    total = nn.utils.clip_grad_norm_(theirs.parameters(), limit)
    torch.testing.assert_close(norms.norm(), total)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_clipping_off_leaves_gradients_alone():
    net = with_gradients(scale=50.0)
    before = net.linear.weight.grad.clone()
    clip_gradients(net.parameters(), 0.0)
    assert torch.equal(before, net.linear.weight.grad)


def test_ema_equals_a_loop_and_leaves_buffers():
    student, teacher = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    nn.init.normal_(student.weight), student.running_mean.fill_(7.0)
    want = 0.9 * teacher.weight + 0.1 * student.weight
    update_ema(teacher, student, 0.9)
    torch.testing.assert_close(teacher.weight, want)
    assert teacher.running_mean.eq(0).all()


def test_a_step_equals_torch_adamw_with_two_groups():
    ours, theirs = with_gradients(), with_gradients()
    optimizer = adamw(ours)
    set_hyperparameters(optimizer, 0.01, 0.3)
    assert step_unless_nonfinite(optimizer, NO_SCALER, clip_gradients(ours.parameters(), 0)) == 0
    rest = [p for n, p in theirs.named_parameters() if n != "linear.weight" and p.requires_grad]
    groups = [{"params": [theirs.linear.weight], "weight_decay": 0.3}, {"params": rest}]
    torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0).step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_gradient_skips_the_step_and_the_moments(poison):
    net = with_gradients()
    optimizer = adamw(net)
    set_hyperparameters(optimizer, 0.01, 0.3)
    before = copy.deepcopy(net.state_dict())
    net.norm.weight.grad[1] = poison
    assert step_unless_nonfinite(optimizer, NO_SCALER, clip_gradients(net.parameters(), 3.0)) == 1
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(s["exp_avg"].eq(0).all() and s["step"] == 0 for s in optimizer.state.values())
