"""Collectives on a GPU: NCCL, sharded networks and batch-norm over ranks, in a process group of one
(a machine with one GPU has no more); the CPU's form is gloo's."""

from __future__ import annotations

import copy
import traceback
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import HashStore, init_process_group
from torch.utils import _pytree as pytree

from tests import victims
from tests.gpu.devices import CUDA, NOW, batch_on, no_waiting, trainer_on
from xcit_dino.ssl.pretrain import train_step
from xcit_dino.ssl.trainer import DinoTrainer
from xcit_dino.train import optim
from xcit_dino.train.distributed import dist, fsdp, sync_batchnorm


def in_a_group(kind: str, body: str, file: str) -> None:
    """One of the functions below, in a process of its own."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    found = ""
    try:
        device = torch.device(kind, 0) if kind == "cuda" else torch.device("cpu")
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"  # as dist.init has it
        more = {"device_id": device} if kind == "cuda" else {}
        init_process_group(backend, store=HashStore(), rank=0, world_size=1, **more)
        globals()[body](device)
        dist.shutdown()
    except Exception:
        found = traceback.format_exc()
    Path(file).write_text(found)


def all_reduces(device: torch.device) -> None:
    """Ours, on the device and, beside it, on the host."""
    x = torch.arange(4.0, device=device)
    torch.testing.assert_close(dist.all_reduce_sum(x.clone()), x)
    torch.testing.assert_close(dist.all_reduce_mean(x.clone()), x)
    torch.testing.assert_close(dist.all_reduce_sum(torch.ones(2)), torch.ones(2))


def batchnorm_over_ranks(device: torch.device) -> None:
    """Outputs, gradients and statistics are torch's own, in both layouts and in bf16."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.manual_seed(0)
            plain = nn.BatchNorm2d(6).to(device)
            ours = sync_batchnorm.convert(nn.Sequential(copy.deepcopy(plain)))
            x = (3 * torch.randn(8, 6, 5, 5, device=device) + 1).to(dtype, memory_format=layout)
            results = []
            for layer in (plain, ours):
                images = x.clone().requires_grad_()
                y = layer(images)
                (y.float() * torch.linspace(0, 1, 5, device=device)).sum().backward()
                state = layer.state_dict().values()
                gradients = [p.grad for p in layer.parameters()]
                results.append([y, images.grad, *gradients, *state])
            for got, want in zip(*results, strict=True):
                torch.testing.assert_close(
                    got.float(), want.float(), rtol=tolerance, atol=10 * tolerance
                )


def in_shards(device: torch.device, dtype: torch.dtype) -> DinoTrainer:
    """As ``set_up`` makes it for several ranks."""
    trainer = trainer_on(device, dtype)
    for net in (trainer.student, trainer.teacher):
        parts = list(net.children()) if net is trainer.teacher else []
        fsdp.shard(net, net.backbone, device, dtype, parts=parts)
    trainer.state.optimizer = optim.adamw(trainer.student)
    trainer.parallel = trainer.student
    assert trainer.sharded and fsdp.is_shard(next(trainer.student.parameters()))
    return trainer


def sharded_step(device: torch.device) -> None:
    """FSDP2: two steps are those of the whole networks, and states go from one to the other."""
    whole, sharded = trainer_on(device), in_shards(device, torch.float32)
    for number in range(2):
        for trainer in (whole, sharded):
            metrics = train_step(trainer, [batch_on(device, trainer, number)], NOW)
            assert not metrics["skipped"]
    for name in ("student", "teacher"):
        found = fsdp.full_tensors(sharded.state.modules[name].state_dict(), everywhere=True)
        for key, want in whole.state.modules[name].state_dict().items():
            torch.testing.assert_close(found[key].cpu(), want.cpu(), rtol=1e-4, atol=1e-5)


def sharded_step_in_16_bits(device: torch.device) -> None:
    """The first loss is autocast's, on a CPU to the bit, the second one up to rounding; nothing
    waits."""
    trainers = trainer_on(device, torch.bfloat16), in_shards(device, torch.bfloat16)
    for number, tolerance in ((0, 1e-4 if device.type == "cuda" else 0.0), (1, 1e-2)):
        batches = [batch_on(device, trainer, number) for trainer in trainers]
        losses = []
        for trainer, batch in zip(trainers, batches, strict=True):
            with no_waiting(device) if number else nullcontext():
                losses.append(train_step(trainer, [batch], NOW)["loss"])
        torch.testing.assert_close(*losses, rtol=tolerance, atol=0)
    states = trainers[1].state.state_dict()
    tensors = [x for x in pytree.tree_leaves(states) if isinstance(x, torch.Tensor)]
    assert {x.dtype for x in tensors if x.is_floating_point()} == {torch.float32}


BODIES = [all_reduces, batchnorm_over_ranks, sharded_step, sharded_step_in_16_bits]


@pytest.mark.parametrize("kind", ["cpu", CUDA])
@pytest.mark.parametrize("body", BODIES)
def test_in_a_group_of_one(kind, body, tmp_path):
    file = tmp_path / "found"
    arguments = (kind, body.__name__, str(file))
    process = victims.SERVER.Process(target=in_a_group, args=arguments)
    process.start()
    assert victims.ended(process) == 0
    assert file.read_text() == ""
