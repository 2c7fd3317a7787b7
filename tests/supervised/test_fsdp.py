"""``--fsdp`` in supervised training: whole runs on two gloo processes, against plain ones."""

import json
import os
import shutil

import pytest
import torch
from torch.utils import _pytree as pytree

from tests import trainings, victims
from xcit_dino.train.distributed import dist

OPTIONS = {"batch_size_per_gpu": 2, "drop_path_rate": 0.0}  # masks are drawn rank by rank


def in_float64():
    """From here on, so that only real differences show."""
    from xcit_dino.eval.context import Context
    from xcit_dino.supervised.data import DeviceAugment

    torch.set_default_dtype(torch.float64)
    augment, normalize = DeviceAugment.__call__, Context.normalize
    DeviceAugment.__call__ = lambda *given: tuple(x.double() for x in augment(*given))
    Context.normalize = lambda *given: normalize(*given).double()


def worker(rank, port, shards, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)

    def train(name, place, **options):
        trainings.train(name, shards, folder / name / place, **OPTIONS, **options)

    for name in ("distill", "finetune"):
        if name == "finetune":  # a teacher works in float32
            in_float64()
        train(name, "plain")
        train(name, "sharded", fsdp=True)
        train(name, "cut", fsdp=True, max_steps=3)
        if rank == 0:
            shutil.copytree(folder / name / "cut", folder / name / "moved")
        dist.barrier()
        train(name, "cut", fsdp=True)
        train(name, "moved")
    dist.shutdown()


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """The folder with a folder of runs for each command."""
    folder = tmp_path_factory.mktemp("ranks")
    trainings.teacher(shards.parent)
    arguments = [(rank, 21_000 + os.getpid() % 20_000, shards, folder) for rank in (0, 1)]
    ranks = [victims.SERVER.Process(target=worker, args=each) for each in arguments]
    for rank in ranks:
        rank.start()
    ends = [victims.ended(rank) for rank in ranks]
    assert ends == [0, 0], "\n".join((folder / f"{rank}.log").read_text() for rank in (0, 1))
    return folder


def accuracies(run):
    found = json.loads((run / "results.json").read_text())
    return {name: entry["metrics"] for name, entry in found.items()}


def protocols(run):
    found = json.loads((run / "results.json").read_text())
    return {name: entry["protocol"] | {"weights": ""} for name, entry in found.items()}


@pytest.mark.parametrize("place", ["sharded", "moved"])
def test_weights_averages_and_moments_are_those_of_whole_networks(place, runs):
    """Also where a run in shards goes on without them."""
    want, got = (victims.final_bits(runs / "finetune" / p) for p in ("plain", place))
    assert got["step"] == 10 and want["model"].keys() == got["model"].keys()
    for part in ("model", "model_ema", "optimizer"):
        assert_close(got[part], want[part])


def assert_close(got, want):
    """All tensors of two nests."""
    leaves = (pytree.tree_leaves(nest) for nest in (got, want))
    for a, b in zip(*leaves, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["finetune", "distill"])
def test_losses_accuracies_and_protocols_are_those_of_whole_networks(name, runs):
    plain, sharded = runs / name / "plain", runs / name / "sharded"
    one, two = ([line["loss"] for line in victims.lines(run)] for run in (plain, sharded))
    assert one == pytest.approx(two, rel=1e-3) and len(one) == 10
    assert list(accuracies(sharded)) == [name, f"{name}/ema"]
    assert protocols(plain) == protocols(sharded)
    if name == "finetune":
        assert accuracies(plain) == accuracies(sharded)


@pytest.mark.parametrize("name", ["finetune", "distill"])
def test_a_run_in_shards_ends_with_the_same_bits_after_a_stop(name, runs):
    victims.assert_nothing_lost(runs / name / "cut", runs / name / "sharded")
    assert accuracies(runs / name / "cut") == accuracies(runs / name / "sharded")
