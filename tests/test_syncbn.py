"""Synchronised batch-norm on two gloo processes against torch's BatchNorm2d on the joined batch."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from xcit_dino.train.syncbn import SyncBatchNorm2d, convert


def example():
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(3).double()
    nn.init.normal_(bn.weight), nn.init.normal_(bn.bias)
    return bn, torch.randn(6, 3, 4, 5).double() * 3 + 100, torch.randn(6, 3, 4, 5).double()


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
    bn, x, weight = example()
    bn = convert(nn.Sequential(bn))[0]
    part = slice(0, 2) if rank == 0 else slice(2, 6)  # unequal parts
    torch.save([t.detach() for t in two_steps(bn, x[part], weight[part])], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_batch(tmp_path):
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    mp.spawn(worker, (store.port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    want = two_steps(*example())
    for i in (0, 1):
        torch.testing.assert_close(torch.cat([first[i], second[i]]), want[i])
    for i in (2, 3):  # each rank has its images' share of the parameter gradients
        torch.testing.assert_close(first[i] + second[i], want[i])
    for i in (4, 5):
        torch.testing.assert_close(first[i], want[i])
        torch.testing.assert_close(second[i], want[i])


def test_one_process_is_plain_batch_norm():
    bn, x, _ = example()
    ours = convert(nn.Sequential(example()[0]))[0]
    assert type(ours) is SyncBatchNorm2d
    torch.testing.assert_close(ours(x), bn(x))
    assert ours.state_dict().keys() == bn.state_dict().keys()
