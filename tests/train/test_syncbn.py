"""Synchronized batch-norm on two gloo processes against torch's and timm's on the joined batch."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.layers import BatchNormAct2d, SplitBatchNorm2d
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import nn

from xcit_dino.errors import InputError
from xcit_dino.models.zoo import create_model
from xcit_dino.train.distributed.sync_batchnorm import SyncBatchNorm, convert


class Renamed(nn.BatchNorm2d):
    """As some networks have one, for an initialization of their own."""


class Derived(BatchNormAct2d):
    """As a network may have one, with another name and the same arithmetic."""


LAYERS = {
    "1d": (nn.BatchNorm1d(3), (6, 3)),
    "1d of sequences": (nn.BatchNorm1d(3), (6, 3, 4)),
    "2d": (nn.BatchNorm2d(3), (6, 3, 4, 5)),
    "3d": (nn.BatchNorm3d(3), (6, 3, 2, 4, 5)),
    "renamed": (Renamed(3), (6, 3, 4, 5)),
    "timm's": (BatchNormAct2d(3, act_layer=nn.GELU), (6, 3, 4, 5)),
    "derived from timm's": (Derived(3), (6, 3, 4, 5)),
    "without momentum": (nn.BatchNorm2d(3, momentum=None), (6, 3, 4, 5)),
}


def example(kind):
    torch.manual_seed(0)
    bn, shape = copy.deepcopy(LAYERS[kind])
    bn = bn.double()
    nn.init.normal_(bn.weight), nn.init.normal_(bn.bias)
    return bn, torch.randn(shape).double() * 3 + 100, torch.randn(shape).double()


def two_steps(bn, x, weight):
    """Outputs, input gradient, parameter gradients, buffers after two training steps."""
    for scale in (1.0, 2.0):
        bn.zero_grad()
        x = (x.detach() * scale).requires_grad_()
        y = bn(x)
        (y * weight).sum().backward()
    return y, x.grad, bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_var


def worker(rank, port, folder):
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    part = slice(0, 2) if rank == 0 else slice(2, 6)  # unequal parts
    for kind in LAYERS:
        bn, x, weight = example(kind)
        done = two_steps(convert(nn.Sequential(bn))[0], x[part], weight[part])
        torch.save([t.detach() for t in done], f"{folder}/{kind}{rank}.pt")
    bn, x, weight = far_from_zero()
    done = two_steps(convert(nn.Sequential(bn))[0], x[part], weight[part])
    torch.save([t.detach() for t in done], f"{folder}/far{rank}.pt")
    net = convert(create_model("timm/test_efficientnet"))  # has BatchNormAct2d in it
    net(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(rank)))
    torch.save(dict(net.named_buffers()), f"{folder}/net{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_batch(tmp_path):
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    mp.spawn(worker, (store.port, str(tmp_path)), nprocs=2)
    for kind in LAYERS:
        first, second = (torch.load(tmp_path / f"{kind}{rank}.pt") for rank in (0, 1))
        want = two_steps(*example(kind))
        for i in (0, 1):
            torch.testing.assert_close(torch.cat([first[i], second[i]]), want[i])
        for i in (2, 3):  # each rank has its images' share of the parameter gradients
            torch.testing.assert_close(first[i] + second[i], want[i])
        for i in (4, 5):
            torch.testing.assert_close(first[i], want[i])
            torch.testing.assert_close(second[i], want[i])

    assert_exact_in_bfloat16(*(torch.load(tmp_path / f"far{rank}.pt") for rank in (0, 1)))
    first, second = (torch.load(tmp_path / f"net{rank}.pt") for rank in (0, 1))
    assert first and all(torch.equal(first[name], second[name]) for name in first)


def far_from_zero():
    """bfloat16 inputs whose mean is twenty times their deviation."""
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(3)
    nn.init.normal_(bn.weight), nn.init.normal_(bn.bias)
    x = (torch.randn(6, 3, 16, 16) + 20).bfloat16()
    return bn, x, torch.randn(x.shape).bfloat16()


def assert_exact_in_bfloat16(first, second):
    """The arithmetic is float32, rounded once."""
    bn, x, weight = far_from_zero()
    y, grad, *rest = two_steps(bn.double(), x.double(), weight.double())
    for got, want in ((0, y), (1, grad)):
        error = torch.cat([first[got], second[got]]).double() - want
        assert error.abs().max() <= 2**-8 * want.abs().max()
        assert error.norm() <= 2**-8 * want.norm()
    for i, want in zip((2, 3), rest, strict=False):
        torch.testing.assert_close(first[i] + second[i], want.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "layer", [SplitBatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True)]
)
def test_layers_that_gather_statistics_otherwise_are_refused(layer):
    with pytest.raises(InputError, match=f"layer 0 is a {type(layer).__name__}.*one process"):
        convert(nn.Sequential(layer))


@pytest.mark.parametrize("layer", [FrozenBatchNormAct2d(3), nn.InstanceNorm2d(3), nn.LayerNorm(3)])
def test_layers_without_statistics_of_batches_stay(layer):
    assert type(convert(nn.Sequential(layer))[0]) is type(layer)


def test_one_process_is_plain_batch_norm():
    bn, x, _ = example("2d")
    ours = convert(nn.Sequential(example("2d")[0]))[0]
    assert type(ours) is SyncBatchNorm
    torch.testing.assert_close(ours(x), bn(x))
    assert ours.state_dict().keys() == bn.state_dict().keys()
