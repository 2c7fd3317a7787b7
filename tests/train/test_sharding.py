"""Two gloo processes: sharded networks, and backward by crop groups, against plain ones."""

import copy
import dataclasses
import os
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from tests import victims
from tests.nowait import NeverWaits
from tests.train.test_nowait import frozen_teacher
from xcit_dino.data.batch import Batch
from xcit_dino.errors import InputError
from xcit_dino.options import replace
from xcit_dino.ssl import trainer as ssl_trainer
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.pretrain import train_step
from xcit_dino.ssl.schedule import DinoHyperparameters
from xcit_dino.ssl.trainer import DinoTrainer, set_up
from xcit_dino.train.async_copy import first_nonfinite
from xcit_dino.train.distributed import dist, fsdp

TINY = victims.TINY | {"norm_last_layer": False, "clip_grad": 0.01, "out_dim": 33}
SHARDED = {"fsdp": True}
KINDS = {
    "plain": {},
    "groups": {"group_backward": True},
    "sharded": SHARDED,
    "sharded groups": SHARDED | {"group_backward": True, "grad_checkpointing": True},
}
WATCHED = {  # other options
    "Sinkhorn-Knopp and KoLeo": {"centering": "sinkhorn_knopp", "koleo_weight": 0.1},
    "the same in shards": SHARDED | {"centering": "sinkhorn_knopp", "koleo_weight": 0.1},
    "DINO and distilled, in shards": SHARDED | {"objective": "dino+distill"},
    "frozen backbone": {"freeze_backbone": 1.0},
    "batch-norm in the head": {"use_bn_in_head": True},
}
NOW = DinoHyperparameters(1e-2, 0.2, 0.9, 0.05, freeze_last_layer=False)
FROZEN = dataclasses.replace(NOW, freeze_last_layer=True)


class Views:
    """Stands in for the augmentation: gives views that are ready."""

    def __call__(self, batch):
        return batch.global_crops.flatten(0, 1), batch.local_crops.flatten(0, 1)


def trainer_of(world, dtype=torch.float32, **options) -> DinoTrainer:
    trainer = set_up(replace(PretrainConfig(), TINY | options), world, dtype, "", 8)
    trainer.augment = Views()
    return trainer


def step(trainer, number, now=NOW):
    """A step of two micro-batches, other ones on each rank."""
    nothing = np.zeros(0, np.int64)
    batches = []
    for micro in range(2):
        torch.manual_seed(100 * number + 10 * micro + trainer.world.rank)
        crops = (torch.randn(2, 2, 3, 16, 16), torch.randn(3, 2, 3, 8, 8))
        batches.append(Batch(number, micro, 0, nothing, nothing, torch.zeros(0), *crops))
    with NeverWaits():
        return train_step(trainer, batches, now)


def whole(trainer):
    return copy.deepcopy(fsdp.full_tensors(trainer.state.state_dict(), everywhere=True))


def worker(rank, port, folder):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # so that only real differences show
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = dist.init("cpu")
    found = {}
    for kind, options in KINDS.items():
        trainer = trainer_of(world, **options)
        found[kind] = [(step(trainer, n), whole(trainer)) for n in range(2)]
    found["watched"] = {}
    for name, options in WATCHED.items():
        now = dataclasses.replace(NOW, freeze_backbone="freeze_backbone" in options)
        with mock.patch.object(ssl_trainer, "frozen_teacher", frozen_teacher):
            trainer = trainer_of(world, **options)
        found["watched"][name] = [step(trainer, n, now)["loss"].item() for n in range(2)]
    found["resumed"], found["moved"], found["frozen"] = {}, {}, {}
    for kind, options in (("plain", {}), ("sharded", SHARDED)):
        trainer = trainer_of(world, **options)
        for place, origin in (("resumed", kind), ("moved", "plain")):
            trainer.state.load_state_dict(copy.deepcopy(found[origin][0][1]))
            found[place][kind] = (step(trainer, 1), whole(trainer))
        step(trainer, 2, FROZEN)
        found["frozen"][kind] = whole(trainer)["student"]["head.last_layer.weight_v"]
    weight = trainer.student.backbone.blocks[0].mlp.fc1.weight
    assert isinstance(weight, DTensor)
    found["rows"] = len(weight.to_local()) / len(weight)
    found["evaluated"] = trainer.eval_backbone().eval()(torch.ones(1 + rank, 3, 16, 16))[0]
    with torch.no_grad():
        weight.to_local()[:1] *= torch.nan if rank else 1.0
    found["spoilt"] = first_nonfinite({"student": trainer.student.state_dict()})
    torch.save(found, f"{folder}/{rank}.pt")
    dist.shutdown()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    arguments = [(rank, 20_000 + os.getpid() % 20_000, str(folder)) for rank in (0, 1)]
    ranks = [victims.SERVER.Process(target=worker, args=each) for each in arguments]
    for rank in ranks:
        rank.start()
    assert [victims.ended(rank) for rank in ranks] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_close(got, want):
    """All numbers of two nests."""
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        if not isinstance(a, str):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("kind", list(KINDS)[1:])
def test_the_steps_are_those_of_whole_networks_on_two_ranks(kind, found):
    """Losses, norms, weights, moments, teacher and center; clipping shortens most gradients."""
    for rank in (0, 1):
        assert_close(found[rank][kind], found[rank]["plain"])


def test_no_operation_of_a_step_on_two_ranks_needs_the_host(found):
    """:func:`step` watches them all; FSDP changes nothing of the loss."""
    for rank in found:
        assert rank["watched"].keys() == WATCHED.keys()
        assert np.isfinite(list(rank["watched"].values())).all()
        whole, sharded = (rank["watched"][name] for name in list(WATCHED)[:2])
        np.testing.assert_allclose(sharded, whole, rtol=1e-7)


def test_shards_go_on_bit_for_bit_from_whole_tensors(found):
    for rank in (0, 1):
        assert victims.same(found[rank]["resumed"]["sharded"], found[rank]["sharded"][1])


def test_shards_go_on_from_a_run_without_and_back(found):
    moved = found[0]["moved"]
    assert_close(moved["sharded"], moved["plain"])
    torch.testing.assert_close(found[0]["frozen"]["sharded"], found[0]["frozen"]["plain"])
    frozen = moved["sharded"][1]["student"]["head.last_layer.weight_v"]
    assert torch.equal(found[0]["frozen"]["sharded"], frozen)


def test_a_rank_keeps_half_and_evaluates_the_whole(found):
    assert [rank["rows"] for rank in found] == [0.5, 0.5]
    torch.testing.assert_close(found[0]["evaluated"], found[1]["evaluated"])


def test_all_ranks_see_what_is_not_finite_in_one_shard(found):
    assert found[0]["spoilt"] == found[1]["spoilt"] == "student.backbone.blocks.0.mlp.fc1.weight"


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_run_in_shards_ends_with_the_same_bits_after_a_stop(shards, tmp_path):
    """The real training on two ranks, cut off and resumed; then one rank goes on without shards."""

    def train(folder, **options):
        port = 20_000 + os.getpid() % 20_000 + 1
        ranks = [
            victims.start(folder, shards, rank=f"{rank} of 2 at {port}", **options, **both)
            for rank in (0, 1)
        ]
        assert [victims.ended(rank) for rank in ranks] == [0, 0], victims.said(folder)

    both = {"fsdp": True, "batch_size_per_gpu": 2, "epochs": 2, "drop_path_rate": 0.0}
    train(tmp_path / "whole")
    train(tmp_path / "cut", max_steps=6)
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    train(tmp_path / "cut")
    victims.assert_nothing_lost(tmp_path / "cut", tmp_path / "whole")
    victims.finish(tmp_path / "other", shards, epochs=2, drop_path_rate=0.0)
    one, two = ([line["loss"] for line in victims.lines(tmp_path / x)] for x in ("other", "whole"))
    assert one == pytest.approx(two, rel=1e-3)


def test_half_precision_with_a_scaler_is_refused():
    with pytest.raises(InputError, match="--fsdp: --precision fp16"):
        replace(PretrainConfig(), {"fsdp": True, "precision": "fp16"})
