"""On-line k-NN: the right accuracy, and no effect on the training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.eval import online
from xcit_dino.eval.features import load_features
from xcit_dino.eval.knn import evaluate
from xcit_dino.eval.online import online_knn
from xcit_dino.eval.target import pretrained, resolve
from xcit_dino.options import replace
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.pretrain import pretrain_with_knn
from xcit_dino.train.distributed.dist import World
from xcit_dino.train.run.metrics import read_metrics
from xcit_dino.train.state import load_checkpoint, newest_checkpoint

CPU = World(0, 1, torch.device("cpu"))
RUN = {"global_crops_size": 32, "num_workers": 0, "precision": "fp32"}


def test_equals_the_evaluation_and_disturbs_nothing(run_folder):
    config = run_folder.target()
    target, context = resolve(config, CPU)
    network = pretrained(target)
    bank, queries = (
        load_features(network, context.index(split), split, context) for split in ("train", "val")
    )
    expected = evaluate(bank, queries, (20,), 0.07, bank.num_classes, CPU)
    callback = online_knn(run_folder.data, RUN, CPU)
    assert callback is not None
    network.model.train()
    network.model.get_submodule("norm").eval()
    before = {k: v.clone() for k, v in network.model.state_dict().items()}
    random_state = torch.get_rng_state()
    found = callback(network.model, 1)
    assert found == {
        "knn_top1": pytest.approx(expected["top1_k20"], abs=1e-9),
        "knn_top5": pytest.approx(expected["top5_k20"], abs=1e-9),
    }
    assert torch.equal(random_state, torch.get_rng_state())
    assert network.model.training and not network.model.get_submodule("norm").training
    for name, value in network.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_only_when_due_and_only_where_it_can_be(run_folder, unlabeled, tmp_path):
    callback = online_knn(run_folder.data, RUN, CPU, every=3)
    assert callback is not None
    assert callback(torch.nn.Identity(), 2) == {}
    assert online_knn(unlabeled, RUN, CPU) is None
    assert online_knn(run_folder.data / "train", RUN, CPU) is None


def test_a_fixed_subset_spread_over_the_split(run_folder, monkeypatch):
    monkeypatch.setattr(online, "BANK", 24)
    callback = online_knn(run_folder.data, RUN, CPU)
    assert isinstance(callback, online.OnlineKnn)
    index = ShardIndex.load(run_folder.data / "train")
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    found = online.embed_subset(callback.context, index, model, 24, "k-NN", labeled=True)
    chosen = np.linspace(0, 95, 24).astype(int)
    assert found.features.shape == (24, 3) and found.samples.tolist() == chosen.tolist()
    assert found.labels.tolist() == index.labels[chosen].tolist()
    assert chosen[0] == 0 and chosen[-1] == 95


TINY = {
    "arch": "xcit_pico_6_p8", "out_dim": 64, "head_hidden_dim": 32, "head_bottleneck_dim": 16,
    "global_crops_size": 32, "local_crops_number": 0, "batch_size_per_gpu": 48, "epochs": 1,
    "num_workers": 0, "log_every": 1, "device": "cpu", "precision": "fp32",
}  # fmt: skip


def test_pretraining_logs_it_and_ends_with_the_same_bits(demo_shards, tmp_path):
    states = []
    for every in (0, 1):
        folder = tmp_path / str(every)
        options = {"data_path": demo_shards, "output_dir": folder, "knn_every": every}
        pretrain_with_knn(replace(PretrainConfig(), TINY | options))
        states.append(load_checkpoint(newest_checkpoint(folder)))
        found = [line["knn_top1"] for line in read_metrics(folder) if "knn_top1" in line]
        assert len(found) == every and all(0 <= value <= 100 for value in found)
    board = EventAccumulator(str(tmp_path / "1")).Reload()
    assert set(board.Tags()["images"]) == {"crops", "attention", "neighbors"}
    crops, attention, neighbors = (board.Images(name)[0] for name in
                                    ("crops", "attention", "neighbors"))  # fmt: skip
    assert crops.width == 2 * 132 and crops.height == 2 * 132  # 2 samples, 2 global crops
    assert attention.height == neighbors.height == 6 * 132
    assert neighbors.width == 7 * 132
    assert board.Tags()["histograms"] == ["feature_deviation"]
    for network in ("student", "teacher"):
        for name, value in states[0][network].items():
            assert torch.equal(value, states[1][network][name]), name


def test_unlabeled_data_are_pretrained_on_without_it(unlabeled, tmp_path, capsys):
    options = {"data_path": unlabeled, "output_dir": tmp_path, "batch_size_per_gpu": 8}
    pretrain_with_knn(replace(PretrainConfig(), TINY | options | {"knn_every": 1}))
    assert "no k-NN during pretraining" in capsys.readouterr().out
    assert not [line for line in read_metrics(tmp_path) if "knn_top1" in line]


def test_going_on_from_a_checkpoint_watches_old_and_new_data(demo_shards, tmp_path, capsys):
    """The new run's first k-NN, before any step, is the old run's last one."""
    old, new = tmp_path / "old", tmp_path / "new"
    shared = TINY | {"data_path": demo_shards, "knn_every": 1}
    pretrain_with_knn(replace(PretrainConfig(), shared | {"output_dir": old}))
    options = {"init_from": old, "knn_data_path": str(demo_shards), "output_dir": new}
    pretrain_with_knn(replace(PretrainConfig(), shared | options | {"seed": 1}))
    assert "loaded student and teacher" in capsys.readouterr().out
    before = [line for line in read_metrics(old) if "knn_top1" in line][-1]
    lines = [line for line in read_metrics(new) if "knn_top1" in line]
    assert [line["step"] for line in lines] == [0, 2]
    assert lines[0]["knn_top1"] == before["knn_top1"]
    assert all(line["knn_other_top1"] == line["knn_top1"] for line in lines), "the same data"
