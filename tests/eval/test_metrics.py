"""Metrics equal scikit-learn's on the same predictions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from xcit_dino.errors import InputError
from xcit_dino.eval import knn, linear
from xcit_dino.eval.config import FewConfig, KnnConfig, LinearConfig
from xcit_dino.eval.features import load_features
from xcit_dino.eval.knn import knn_hits
from xcit_dino.eval.scores import few, metrics
from xcit_dino.eval.scores.metrics import Scores, binary_auroc, class_means, class_rows
from xcit_dino.eval.target import pretrained, resolve
from xcit_dino.train.distributed.dist import World

ONE = World(0, 1, torch.device("cpu"))


def scored(count: int, classes: int, seed: int, ties: bool = False) -> metrics.Scored:
    numbers = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), numbers.integers(0, classes, count - classes)])
    logits = numbers.standard_normal((count, classes)) + 1.5 * np.eye(classes)[labels]
    table = torch.from_numpy(np.round(logits) if ties else logits).softmax(1).float()
    book = Scores(count, classes)
    for part in torch.arange(count).split(13):
        book.add(table[part], torch.from_numpy(labels)[part])
    return book.gathered()


@pytest.mark.parametrize(("classes", "ties"), [(2, False), (2, True), (7, False), (7, True)])
def test_equal_to_scikit_learn(classes, ties):
    found = scored(160, classes, seed=classes, ties=ties)
    rows = class_rows(found)
    means = class_means(rows)
    labels, predicted, scores = found.labels, found.predicted, found.scores
    np.testing.assert_array_equal(predicted, scores.argmax(1))
    assert means == pytest.approx(
        {
            "balanced_accuracy": 100 * reference.balanced_accuracy_score(labels, predicted),
            "macro_f1": 100 * reference.f1_score(labels, predicted, average="macro"),
            "auroc": 100 * np.mean([
                reference.roc_auc_score(labels == k, scores[:, k]) for k in range(classes)
            ]),
        },
        rel=1e-12,
    )  # fmt: skip
    if classes > 2 and not ties:  # softmax rows sum to one only within float32
        whole = scores.astype(float) / scores.astype(float).sum(1, keepdims=True)
        ovr = reference.roc_auc_score(labels, whole, multi_class="ovr", average="macro")
        assert means["auroc"] == pytest.approx(100 * ovr, abs=0.02)
    precision, recall, f1, images = reference.precision_recall_fscore_support(
        labels, predicted, zero_division=0
    )
    np.testing.assert_allclose([row.precision for row in rows], 100 * precision)
    np.testing.assert_allclose([row.recall for row in rows], 100 * recall)
    np.testing.assert_allclose([row.f1 for row in rows], 100 * f1)
    assert [row.images for row in rows] == images.tolist()


def test_classes_without_images_and_classes_never_predicted():
    """As scikit-learn: the first count for F1 only, the second count as 0."""
    labels, predicted = torch.tensor([0, 0, 1, 3]), torch.tensor([0, 2, 0, 3])
    book = Scores(4, 6)
    book.add(torch.eye(6)[predicted], labels)
    found = book.gathered()
    rows, means = class_rows(found), class_means(class_rows(found))
    assert [row.label for row in rows] == [0, 1, 2, 3]
    assert [row.auroc is None for row in rows] == [False, False, True, False]
    with pytest.warns(UserWarning, match="not in y_true"):
        balanced = reference.balanced_accuracy_score(labels, predicted)
    assert means["balanced_accuracy"] == pytest.approx(100 * balanced)
    f1 = reference.f1_score(labels, predicted, average="macro", zero_division=0)
    assert means["macro_f1"] == pytest.approx(100 * f1)
    assert means["auroc"] == pytest.approx(100 * np.mean([0.5, 0.5, 1.0]))


def test_area_under_the_curve_by_hand():
    positive = np.array([True, False, True, False])
    assert binary_auroc(np.array([0.9, 0.1, 0.8, 0.3]), positive) == 1
    assert binary_auroc(np.array([0.9, 0.1, 0.2, 0.3]), positive) == 0.75
    assert binary_auroc(np.zeros(4), positive) == 0.5


def test_too_many_scores_are_not_kept(monkeypatch):
    monkeypatch.setattr(metrics, "CELLS", 300)
    found = scored(160, 2, seed=0)
    assert found.scores is None and "auroc" not in class_means(class_rows(found))
    monkeypatch.undo()
    whole = scored(160, 2, seed=0)
    np.testing.assert_array_equal(found.predicted, whole.predicted)


# -- in the commands -------------------------------------------------------------------------------


def test_votes_of_nearest_neighbors_are_scored_at_the_headline_k():
    """Equal to scikit-learn on votes that are counted plainly."""
    numbers = np.random.default_rng(5)
    labels, targets = (
        numbers.integers(0, 4, 60),
        np.concatenate([np.arange(4), numbers.integers(0, 4, 36)]),
    )
    centers = numbers.standard_normal((4, 8))
    bank = (centers[labels] + numbers.standard_normal((60, 8))).astype(np.float32)
    queries = (centers[targets] + numbers.standard_normal((40, 8))).astype(np.float32)
    book = Scores(40, 4)
    knn_hits(bank, labels, queries, targets, (5, 20), 0.07, 4, votes=book)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, bank)]
    cosines = unit[0] @ unit[1].T
    nearest = np.argsort(-cosines, axis=1)[:, :20]
    votes = np.zeros((40, 4))
    for query, rows in enumerate(nearest):
        for row in rows:
            votes[query, labels[row]] += np.exp(cosines[query, row] / 0.07)
    votes /= votes.sum(1, keepdims=True)
    found = book.gathered()
    np.testing.assert_allclose(found.scores, votes, rtol=1e-3, atol=1e-6)
    means = class_means(class_rows(found))
    guesses = votes.argmax(1)
    assert means == pytest.approx({
        "balanced_accuracy": 100 * reference.balanced_accuracy_score(targets, guesses),
        "macro_f1": 100 * reference.f1_score(targets, guesses, average="macro"),
        "auroc": 100 * reference.roc_auc_score(targets, votes, multi_class="ovr"),
    }, abs=1e-6)  # fmt: skip


def test_ranks_gather_their_scores(monkeypatch):
    """Two ranks' parts, gathered, are those of one."""
    whole = scored(60, 3, seed=1)
    parts = [
        metrics.Scored(whole.labels[part], whole.predicted[part], whole.scores[part], 3)
        for part in (slice(0, 30), slice(30, 60))
    ]
    monkeypatch.setattr(metrics.dist, "world_size", lambda: 2)

    def gather(found, own):
        found[:] = parts

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert class_rows(Scores(60, 3).gathered()) == class_rows(whole)


# -- few labels ------------------------------------------------------------------------------------


def test_a_draw_has_n_images_of_each_class():
    labels = np.repeat([0, 1, 2, -1], [40, 3, 20, 9])
    np.random.default_rng(0).shuffle(labels)
    rows = few.draw(labels, 5, seed=0, number=0)
    assert np.bincount(labels[rows]).tolist() == [5, 3, 5]
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, few.draw(labels, 5, seed=0, number=0))
    others = [few.draw(labels, 5, 0, 1), few.draw(labels, 5, 1, 0)]
    assert all(other.tolist() != rows.tolist() for other in others)


def test_every_image_is_drawn_about_as_often():
    labels = np.zeros(10, np.int64)
    counts = np.bincount(np.concatenate([few.draw(labels, 2, 0, n) for n in range(1000)]))
    assert counts.min() > 150 and counts.max() < 250


def test_means_and_spreads():
    found = few.mean_and_spread([{"top1": 1.0}, {"top1": 2.0}, {"top1": 6.0}])
    assert found == pytest.approx({"top1": 3.0, "top1_std": np.std([1, 2, 6], ddof=1)})
    assert few.mean_and_spread([{"top1": 1.0}]) == {"top1": 1.0}


def test_more_labels_than_there_are_images(capsys):
    few.check_classes(np.array([0, 0, 1]), 2)
    assert "1 of 2 classes have fewer images" in capsys.readouterr().out
    with pytest.raises(InputError, match="has only 2 labeled, readable images; ask for at most 2"):
        few.check_classes(np.array([0, 0, 1]), 3)


def test_knn_and_linear_with_few_labels(run_folder):
    target = run_folder.target()
    limited = FewConfig(labels_per_class=3, draws=2)
    knn.run(KnnConfig(target, nb_knn=(1, 5), few=limited))
    linear.run(LinearConfig(target, epochs=2, lrs=(0.1,), layers=("cls",), few=limited))
    results = json.loads((run_folder.path / "results.json").read_text())
    assert set(results) == {"knn-few", "linear-few"}
    for name, key in (("knn-few", "top1_k5"), ("linear-few", "top1")):
        protocol, found = results[name]["protocol"], results[name]["metrics"]
        assert (protocol["labels_per_class"], protocol["draws"]) == (3, 2)
        assert found[f"{key}_std"] >= 0 and 0 < found["balanced_accuracy"] <= 100
    assert not (run_folder.path / "linear_head.safetensors").exists()
    # the mean of k-NN on the two draws, by hand
    features = {
        split: load_features(
            *(pretrained(resolve(target, ONE)[0]), resolve(target, ONE)[1].index(split)), split,
            resolve(target, ONE)[1],
        )
        for split in ("train", "val")
    }  # fmt: skip
    bank, queries = features["train"], features["val"]
    hits = []
    for number in range(2):
        rows = few.draw(bank.labels, 3, 0, number)
        hits.append(knn_hits(
            bank.blocks["cls"][rows], bank.labels[rows], queries.blocks["cls"], queries.labels,
            (5,), 0.07, bank.num_classes,
        )[0, 0].item())  # fmt: skip
    mean = 100 * np.mean(hits) / len(queries)
    assert results["knn-few"]["metrics"]["top1_k5"] == pytest.approx(mean)
