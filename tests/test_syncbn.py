"""Synchronised batch-norm on two gloo processes against torch's BatchNorm2d on the joined batch."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from xcit_dino.train.syncbn import SyncBatchNorm, convert

SHAPES = {"2d": (6, 3, 4, 5), "1d": (6, 3)}


def example(kind):
    torch.manual_seed(0)
    bn = {"1d": nn.BatchNorm1d, "2d": nn.BatchNorm2d}[kind](3).double()
    nn.init.normal_(bn.weight), nn.init.normal_(bn.bias)
    shape = SHAPES[kind]
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
    for kind in SHAPES:
        bn, x, weight = example(kind)
        done = two_steps(convert(nn.Sequential(bn))[0], x[part], weight[part])
        torch.save([t.detach() for t in done], f"{folder}/{kind}{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_batch(tmp_path):
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    mp.spawn(worker, (store.port, str(tmp_path)), nprocs=2)
    for kind in SHAPES:
        first, second = (torch.load(tmp_path / f"{kind}{rank}.pt") for rank in (0, 1))
        want = two_steps(*example(kind))
        for i in (0, 1):
            torch.testing.assert_close(torch.cat([first[i], second[i]]), want[i])
        for i in (2, 3):  # each rank has its images' share of the parameter gradients
            torch.testing.assert_close(first[i] + second[i], want[i])
        for i in (4, 5):
            torch.testing.assert_close(first[i], want[i])
            torch.testing.assert_close(second[i], want[i])


def test_one_process_is_plain_batch_norm():
    bn, x, _ = example("2d")
    ours = convert(nn.Sequential(example("2d")[0]))[0]
    assert type(ours) is SyncBatchNorm
    torch.testing.assert_close(ours(x), bn(x))
    assert ours.state_dict().keys() == bn.state_dict().keys()
