"""k-NN: equal to brute force on random and tied cases; bounded parts merge to the same; bad
input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bench import knn as bench
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError
from xcit_dino.eval import knn
from xcit_dino.eval.config import KnnConfig
from xcit_dino.eval.features import Features
from xcit_dino.eval.knn import Search, fitting_ks, knn_hits, predict, vote_ranks
from xcit_dino.report.compare import baseline
from xcit_dino.train.distributed.dist import World
from xcit_dino.train.run.reader import read_run

OF_CLASSES = {"balanced_accuracy", "macro_f1", "auroc"}
ONE = World(0, 1, torch.device("cpu"))


def random_case(generator: np.random.Generator, kind: str):
    """Features whose cosines are exact in float32 wherever they tie."""
    count, queries = int(generator.integers(12, 90)), int(generator.integers(1, 12))
    dim, classes = int(generator.choice([4, 16])), int(generator.integers(1, 9))
    shape = (count + queries, dim)
    if kind == "signs":  # entries +-1 and a length that is a power of two: many equal cosines
        features = generator.choice([-1.0, 1.0], shape)
    elif kind == "copies":  # few different rows
        features = generator.choice([-1.0, 1.0], (3, dim))[generator.integers(0, 3, shape[0])]
    else:
        features = generator.standard_normal(shape)
    features = torch.from_numpy(features.astype(np.float32))
    labels = torch.from_numpy(generator.integers(0, classes, shape[0]))
    return features[:count], labels[:count], features[count:], labels[count:], classes


@pytest.mark.parametrize("kind", ["normal", "signs", "copies"])
def test_equals_brute_force(kind):
    generator = np.random.default_rng(0)
    for _ in range(60):
        bank, labels, queries, targets, classes = random_case(generator, kind)
        ks = sorted({1, 2, 5, int(generator.integers(1, len(bank) + 1)), len(bank)})
        hits = knn_hits(
            bank.numpy(), labels.numpy(), queries.numpy(), targets.numpy(), ks, 0.07, classes
        )
        for row, k in enumerate(ks):
            expected = bench.brute_force_hits(bank, labels, queries, targets, k, 0.07, classes)
            assert tuple(hits[row].int().tolist()) == expected, (kind, k)


@pytest.mark.parametrize("kind", ["normal", "signs", "copies"])
def test_a_bank_in_parts_gives_the_same_neighbors(kind, monkeypatch):
    generator = np.random.default_rng(1)
    for _ in range(20):
        bank, _, queries, _, _ = random_case(generator, kind)
        k = int(generator.integers(1, len(bank) + 1))
        similarities, rows = Search(bank.numpy())(queries.numpy(), k)
        with monkeypatch.context() as patch:
            patch.setattr(knn, "BANK_ROWS", 7)
            patch.setattr(knn, "VOTE_CELLS", 16)
            parts = Search(bank.numpy())(queries.numpy(), k)
        np.testing.assert_allclose(parts[0], similarities, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(parts[1], rows)


def test_predicted_classes_have_the_most_votes():
    generator = np.random.default_rng(0)
    similarities = -np.sort(-generator.uniform(-1, 1, (40, 7)).astype(np.float32), 1)
    labels = generator.integers(0, 4, (40, 7))
    found = predict(torch.from_numpy(similarities), torch.from_numpy(labels), 0.07, 4)
    for row, label in enumerate(found.tolist()):
        votes = [0.0] * 4
        for s, neighbor in zip(similarities[row].tolist(), labels[row].tolist(), strict=True):
            votes[neighbor] += float(np.exp(s / 0.07))
        assert votes[label] == pytest.approx(max(votes))
    equal = torch.zeros(1, 4), torch.tensor([[3, 1, 2, 1]]), torch.tensor([[2, 3, 3, 2]])
    assert predict(equal[0], equal[1], 0.07, 4).tolist() == [1]
    assert predict(equal[0], equal[2], 0.07, 4).tolist() == [2]  # as many votes as 3


def test_equals_the_official_loop():
    bank, labels = bench.clusters(3000, 64, 20, seed=1)
    queries, targets = bench.clusters(500, 64, 20, seed=2)
    ks = (10, 20, 100, 200)
    arrays = (bank.numpy(), labels.numpy(), queries.numpy(), targets.numpy())
    ours = knn_hits(*arrays, ks, 0.07, 20) / 500 * 100
    unit_bank = torch.nn.functional.normalize(bank, dim=1)
    unit_queries = torch.nn.functional.normalize(queries, dim=1)
    for row, k in enumerate(ks):
        official = bench.official_knn(unit_bank, labels, unit_queries, targets, k, 0.07, 20)
        assert ours[row, 0].item() == pytest.approx(official[0], abs=1e-9)
        if k >= 100:  # with fewer than five voted classes the official sort leaves top-5 to chance
            assert ours[row, 1].item() == pytest.approx(official[1], abs=1e-9)
        assert 20 < official[0] < 100


def test_votes_by_hand():
    """Two neighbors of class 1 outvote a nearer one of class 2; labels break ties."""
    similarities, labels = torch.tensor([[0.9, 0.88, 0.88, 0.2]]), torch.tensor([[2, 1, 1, 0]])
    ranks = [
        vote_ranks(similarities, labels, torch.tensor([target]), (1, 3, 4), 0.07, 5)[:, 0].tolist()
        for target in range(5)
    ]
    # k = 1: class 2, then those without a vote by label; k = 3: 1, 2, rest; k = 4: 1, 2, 0, 3, 4
    assert ranks == [[1, 2, 2], [2, 0, 0], [0, 1, 1], [3, 3, 3], [4, 4, 4]]


def test_votes_stay_finite_at_low_temperature():
    hits = knn_hits(np.eye(3), np.arange(3), np.eye(3), np.arange(3), [3], 1e-6, 3)
    assert hits.tolist() == [[3, 3]]


def test_features_that_are_not_finite_are_refused():
    bank = np.full((4, 2), np.nan, np.float32)
    with pytest.raises(InputError, match="non-finite"):
        knn_hits(bank, np.zeros(4, int), bank, np.zeros(4, int), [2], 0.07, 2)


def test_k_larger_than_the_bank_is_left_out(capsys):
    assert fitting_ks((200, 10, 20, 100), 80, verbose=True) == [10, 20]
    assert "k = 100 and 200 skipped: the bank has only 80 images" in capsys.readouterr().out
    with pytest.raises(InputError, match="--nb_knn 20: .* only 12 .*; ask for at most 12"):
        fitting_ks((20, 200), 12)


def test_the_default_ks_serve_a_small_bank(run_folder, capsys):
    knn.run(KnnConfig(run_folder.target()))
    result = json.loads((run_folder.path / "results.json").read_text())["knn"]
    assert result["protocol"]["nb_knn"] == [10, 20]
    accuracies = {"top1_k10", "top5_k10", "top1_k20", "top5_k20"}
    assert set(result["metrics"]) == accuracies | OF_CLASSES
    assert capsys.readouterr().out.count("skipped") == 1


def test_ranks_share_the_queries(monkeypatch):
    """The hits of two ranks add up to those of one."""
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 4, 50)
    rows = generator.standard_normal((50, 8)).astype(np.float32)
    features = Features({"cls": rows}, labels, 4, 0)
    whole = knn.evaluate(features, features, (3,), 0.07, 4, ONE)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor)
    halves = [
        knn.evaluate(features, features, (3,), 0.07, 4, World(rank, 2, torch.device("cpu")))
        for rank in range(2)
    ]
    assert sum(half["top1_k3"] for half in halves) == pytest.approx(whole["top1_k3"])


def test_run_writes_results_with_their_protocol(run_folder):
    knn.run(KnnConfig(run_folder.target(baselines=True), nb_knn=(1, 5)))
    results = json.loads((run_folder.path / "results.json").read_text())
    assert set(results) == {"knn", "knn/random", "knn/pixels"}
    accuracies = {"top1_k1", "top5_k1", "top1_k5", "top5_k5"}
    assert set(results["knn"]["metrics"]) == accuracies | OF_CLASSES
    assert len(results["knn"]["per_class"]) == 1 + len(
        ShardIndex.load(run_folder.data / "val").classes
    )
    protocol = results["knn"]["protocol"]
    assert protocol["temperature"] == 0.07 and protocol["nb_knn"] == [1, 5]
    assert protocol["resize"] == protocol["crop"] == 32 and protocol["network"] == "teacher"
    assert protocol["train_images"] == 96 and len(protocol["weights"]) == 16
    assert {"commit", "versions", "hardware", "wall_seconds"} <= set(results["knn"])
    run = read_run(run_folder.path)
    for network in ("random", "pixels"):
        assert baseline(run, results["knn"], f"knn/{network}") == results[f"knn/{network}"]
    before = results["knn"]["metrics"]
    knn.run(KnnConfig(run_folder.target(), nb_knn=(5, 1)))
    results = json.loads((run_folder.path / "results.json").read_text())
    assert results["knn"]["metrics"] == before and "knn@" not in "".join(results)


def test_unlabeled_images_are_refused(run_folder, unlabeled):
    with pytest.raises(InputError, match="have no label"):
        knn.run(KnnConfig(run_folder.target(data_path=str(unlabeled)), nb_knn=(1,)))
