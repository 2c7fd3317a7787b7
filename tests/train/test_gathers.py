"""Two gloo processes in bf16: what a step in shards sends, and that whole networks compute the
same."""

from __future__ import annotations

import copy
import os
from collections import Counter

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests import victims
from tests.train.test_sharding import NOW, step, trainer_of, whole
from xcit_dino.train.distributed import dist

BF16, FP32 = torch.bfloat16, torch.float32
SHARDED = {"fsdp": True}
KINDS = {  # name -> (dtype, options)
    "whole": (BF16, {}),
    "shards": (BF16, SHARDED),
    "computed again": (BF16, SHARDED | {"group_backward": True, "grad_checkpointing": True}),
    "float32": (FP32, SHARDED),
}
PRODUCTS = ("qkv", "proj", "fc1", "fc2", "conv1", "conv2")
SENT = {"_allgather_base_": "gathered", "_reduce_scatter_base_": "reduced"}


class Traffic(TorchDispatchMode):
    """Counts elements of whole tensors, by what is done to them and by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("c10d::")
        if name in SENT:
            tensor = max(args[:2], key=torch.numel)
            self.counts[SENT[name], tensor.dtype] += tensor.numel()
        return func(*args, **(kwargs or {}))


def worker(rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world, found = dist.init("cpu"), {}
    for kind, (dtype, options) in KINDS.items():
        trainer = trainer_of(world, dtype, **options)
        blocks: set[torch.dtype] = set()
        trainer.student.backbone.blocks[-1].register_forward_hook(
            lambda *given, blocks=blocks: blocks.add(given[2].dtype)
        )
        start = whole(trainer)
        with Traffic() as traffic:
            metrics = [step(trainer, 0)]
        first = whole(trainer)
        metrics.append(step(trainer, 1))
        found[kind] = metrics, [start, first, whole(trainer)], traffic.counts, blocks
    trainer = trainer_of(world, BF16, **SHARDED)
    trainer.state.load_state_dict(copy.deepcopy(found["shards"][1][1]))
    found["resumed"] = step(trainer, 1), whole(trainer)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.shutdown()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    arguments = [(rank, 20_000 + os.getpid() % 20_000 + 2, str(folder)) for rank in (0, 1)]
    ranks = [victims.SERVER.Process(target=worker, args=each) for each in arguments]
    for rank in ranks:
        rank.start()
    assert [victims.ended(rank) for rank in ranks] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["shards", "computed again"])
def test_the_products_are_those_of_autocast_in_whole_networks(kind, found):
    """The first loss to the bit; a gradient is a sum of 16-bit ones in another order."""
    for rank in found:
        want, got = rank["whole"][0], rank[kind][0]
        assert torch.equal(got[0]["teacher_entropy"], want[0]["teacher_entropy"])
        if kind == "shards":  # by groups of crops the loss is a sum of two
            assert torch.equal(got[0]["loss"], want[0]["loss"])
        torch.testing.assert_close(got[0]["loss"], want[0]["loss"], rtol=1e-6, atol=0)
        torch.testing.assert_close(got[0]["grad_norm"], want[0]["grad_norm"], rtol=1e-2, atol=0)
        torch.testing.assert_close(got[1]["loss"], want[1]["loss"], rtol=1e-2, atol=0)


@pytest.mark.parametrize("kind", ["shards", "computed again"])
def test_a_blocks_weights_are_gathered_in_16_bits_and_gradients_reduced_in_32(kind, found):
    start = found[0][kind][1][0]["student"]
    names = [name for name in start if name.startswith("backbone.blocks.")]
    weights = sum(start[name].numel() for name in names if name.split(".")[-2] in PRODUCTS)
    for rank in found:
        counts = rank[kind][2]
        # of two micro-batches: the teacher's once, the student's for two sizes, there and back
        assert counts["gathered", BF16] == 2 * (1 + 2 * 2) * weights
        assert counts["reduced", FP32] > 0 and counts["reduced", BF16] == 0
    narrow, wide = (found[0][name][2] for name in ("shards", "float32"))
    assert wide["gathered", BF16] == 0
    assert wide["gathered", FP32] == narrow["gathered", FP32] + narrow["gathered", BF16]
    assert wide["reduced", FP32] == narrow["reduced", FP32]


def test_residuals_weights_moments_and_averages_stay_in_float32(found):
    for rank in found:
        for kind in KINDS:
            _, states, _, blocks = rank[kind]
            assert blocks == {FP32}
            tensors = [x for x in pytree.tree_leaves(states) if isinstance(x, torch.Tensor)]
            assert {x.dtype for x in tensors if x.is_floating_point()} == {FP32}
        start, first, _ = rank["shards"][1]
        for name, weight in first["student"].items():
            if weight.is_floating_point() and "running" not in name:
                want = start["teacher"][name].lerp(weight, 1 - NOW.momentum_teacher)
                assert torch.equal(first["teacher"][name], want), name
        weight = first["student"]["backbone.blocks.0.mlp.fc1.weight"]
        assert (weight != weight.to(BF16)).any()


def test_a_run_goes_on_bit_for_bit(found):
    for rank in found:
        metrics, states, *_ = rank["shards"]
        assert victims.same(rank["resumed"], (metrics[1], states[2]))
