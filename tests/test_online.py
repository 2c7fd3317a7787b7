"""On-line k-NN: the right accuracy, and a training that does not notice it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xcit_dino.data.index import ShardIndex
from xcit_dino.eval import online
from xcit_dino.eval.features import extract
from xcit_dino.eval.knn import evaluate
from xcit_dino.eval.online import online_knn
from xcit_dino.eval.subject import pretrained, resolve
from xcit_dino.train.dist import World

CPU = World(0, 1, torch.device("cpu"))


def test_equals_the_evaluation_and_disturbs_nothing(run_folder):
    config = run_folder.subject()
    subject = resolve(config)
    network = pretrained(subject)
    bank, queries = (
        extract(network, subject.index(split), split, subject, config, CPU)
        for split in ("train", "val")
    )
    expected = evaluate(bank, queries, (20,), 0.07, bank.num_classes, CPU)
    callback = online_knn(run_folder.data, crop=32)
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


def test_only_when_due_and_only_where_it_can_be(run_folder, unlabelled, tmp_path):
    callback = online_knn(run_folder.data, crop=32, every=3)
    assert callback is not None
    assert callback(torch.nn.Identity(), 2) == {}
    assert online_knn(unlabelled, crop=32) is None
    assert online_knn(run_folder.data / "train", crop=32) is None


def test_a_fixed_subset_spread_over_the_split(run_folder, monkeypatch):
    monkeypatch.setattr(online, "BANK", 24)
    callback = online_knn(run_folder.data, crop=32)
    assert isinstance(callback, online.OnlineKnn)
    index = ShardIndex.load(run_folder.data / "train")
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    rows, labels = callback._features(model, index, 24)
    chosen = np.linspace(0, 95, 24).astype(int)
    assert rows.shape == (24, 3) and labels.tolist() == index.labels[chosen].tolist()
    assert chosen[0] == 0 and chosen[-1] == 95
