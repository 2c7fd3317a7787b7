"""Linear probe, k-NN and evaluate on images with several labels or values each: metrics and steps
equal references."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn import metrics as reference
from sklearn.neighbors import KNeighborsRegressor

from tests.conftest import ARCH
from xcit_dino.cli import main
from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.pack.shard_writer import Sample, write_shard
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.data.shards.index_writer import write_index
from xcit_dino.data.targets.several import target_table
from xcit_dino.eval.linear_grid import Choice, HeadGroup
from xcit_dino.eval.scores import weighted
from xcit_dino.eval.scores.several import label_means, label_rows
from xcit_dino.eval.scores.values import value_means, value_rows
from xcit_dino.models.weights.load import load_backbone
from xcit_dino.models.zoo import create_model
from xcit_dino.report import accuracy
from xcit_dino.train.run.reader import read_run


@pytest.mark.parametrize("ties", [False, True])
def test_equal_to_scikit_learn(ties: bool) -> None:
    numbers = np.random.default_rng(0)
    labels = (numbers.random((200, 6)) < [0.5, 0.3, 0.1, 0.02, 0, 1]).astype(np.uint8)
    scores = 1 / (1 + np.exp(-numbers.standard_normal((200, 6)) - labels))
    scores = np.round(scores, 1) if ties else scores
    rows = label_rows(scores, labels)
    assert [row.label for row in rows] == [0, 1, 2, 3]  # what no image has, or all, is left out
    some = labels[:, :4], scores[:, :4]
    assert label_means(rows) == pytest.approx({
        "map": 100 * reference.average_precision_score(*some, average="macro"),
        "auroc": 100 * reference.roc_auc_score(*some, average="macro"),
        "macro_f1": 100 * reference.f1_score(some[0], some[1] >= 0.5, average="macro"),
    }, abs=1e-9)  # fmt: skip


def test_labels_that_do_not_count_are_named(
    run_folder, tmp_path: Path, demo_shards: Path, capsys
) -> None:
    shards = repacked(
        demo_shards, tmp_path / "tagged", "labels", ["x", "never", "always"],
        lambda label: [*[0][: label % 2], 2],
    )  # fmt: skip
    words = ["--output_dir", run_folder.path, "--data_path", shards, "--num_workers", 0]
    words += ["--pretrained_weights", run_folder.weights, "--device", "cpu"]
    words = [str(word) for word in words]
    line = "  2 of 3 labels do not count, as no image of val has them, or all: never, always\n"
    assert main(["knn", *words]) == 0
    assert line in capsys.readouterr().out
    assert main(["linear", *words, "--epochs", "1"]) == 0
    assert line in capsys.readouterr().out
    head = str(run_folder.path / "linear_head.safetensors")
    assert main(["evaluate", *words, "--head", head]) == 0
    assert line in capsys.readouterr().out


def test_a_step_is_that_of_autograd() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(8, 5), (torch.rand(8, 3) < 0.4).to(torch.uint8)
    cpu = torch.device("cpu")
    group = HeadGroup([Choice("cls", 0.5, 0.0), Choice("cls", 2.0, 0.1)], 5, 3, 256, 0, cpu)
    weights = [torch.cat([w, b[:, None]], 1).requires_grad_() for w, b in map(group.head, (0, 1))]
    optimizers = [torch.optim.SGD([w], lr, 0.9, weight_decay=d)
                  for w, lr, d in zip(weights, (0.5, 2.0), (0.0, 0.1), strict=True)]  # fmt: skip
    for _ in range(3):
        group.step({"cls": features}, labels, 1.0)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            logits = features @ weight[:, :-1].t() + weight[:, -1]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits, labels.float(), reduction="sum"
            )
            optimizer.zero_grad()
            (loss / 8).backward()
            optimizer.step()
    for number, weight in enumerate(weights):
        torch.testing.assert_close(torch.cat([*map(torch.atleast_2d, group.head(number)[:1])], 1),
                                   weight[:, :-1].detach())  # fmt: skip
    right, loss = group.score({"cls": features}, labels)
    logits = features @ weights[0][:, :-1].t() + weights[0][:, -1]
    assert right[0] == ((logits > 0) == (labels > 0)).all(1).sum()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, labels.float(), reduction="sum"
    )
    assert loss[0].item() == pytest.approx(expected.item(), rel=1e-5)


def repacked(
    demo_shards: Path, folder: Path, kind: str, names: list[str], target: Callable[[int], Any]
) -> Path:
    """The demo images with targets that follow from their classes."""
    for split in ("train", "val"):
        index = ShardIndex.load(demo_shards / split)
        samples = []
        for number in range(index.num_samples):
            shard, offset, size = index.locate(number)
            image = Path(index.path(shard)).read_bytes()[offset : offset + size]
            content = json.dumps(target(int(index.labels[number]))).encode()
            samples.append(Sample(f"{number:04d}", "jpg", image, -1, {}, (kind, content)))
        (folder / split).mkdir(parents=True)
        part = write_shard(folder / split, "shard-000000.tar", samples)
        write_index(folder / split, [part], None, target_classes=names)
    return folder


@pytest.fixture
def tagged(tmp_path: Path, demo_shards: Path) -> Path:
    """Label n: the class is among three."""
    return repacked(
        demo_shards, tmp_path / "tagged", "labels", ["x", "y", "z"],
        lambda label: [n for n in range(3) if n <= label % 5 <= n + 2],
    )  # fmt: skip


def test_the_command(run_folder, tagged: Path, capsys) -> None:
    words = ["--output_dir", run_folder.path, "--data_path", tagged, "--num_workers", 0]
    words += ["--pretrained_weights", run_folder.weights, "--device", "cpu"]
    words = [str(word) for word in words]
    assert main(["linear", *words, "--epochs", "10"]) == 0
    assert "linear probe, pretrained: map " in capsys.readouterr().out
    entry = json.loads((run_folder.path / "results.json").read_text())["linear"]
    assert set(entry["metrics"]) == {"map", "auroc", "macro_f1"}
    assert [line.split(",")[0] for line in entry["per_class"]] == ["class", "x", "y", "z"]
    assert entry["protocol"]["labels"] == "several an image"
    assert all("holdout_loss" in point for point in entry["grid"])
    chosen = min(entry["grid"], key=lambda point: point["holdout_loss"])
    assert {name: chosen[name] for name in entry["chosen"]} == entry["chosen"]
    assert read_run(run_folder.path).top1("linear") == entry["metrics"]["map"]
    for refused, said in (
        (["knn", "--labels_per_class", "3"], "--labels_per_class: not for images"),
        (["finetune", "--epochs", "1"], "several labels, which are for `xcit-dino knn`"),
        (["linear", "--protocol", "dino"], "--protocol dino: not for images with several"),
        (["linear", "--labels_per_class", "3"], "--labels_per_class: not for images"),
        (["linear", "--data_path", str(run_folder.data), "--epochs", "1"], ""),
    ):
        code = main([refused[0], *words, *refused[1:]])
        assert code == (2 if said else 0)
        assert said in capsys.readouterr().err


def test_splits_that_do_not_fit_are_refused(
    run_folder, tagged: Path, demo_shards: Path, tmp_path: Path, capsys
) -> None:
    words = ["linear", "--output_dir", run_folder.path, "--num_workers", 0, "--device", "cpu"]
    words += ["--pretrained_weights", run_folder.weights, "--data_path"]

    def refused(data: Path) -> str:
        assert main([str(word) for word in (*words, data)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    other = repacked(demo_shards, tmp_path / "other", "labels", ["x", "y", "w"], lambda _: [0])
    shutil.copytree(tagged / "train", tmp_path / "mixed/train")
    shutil.copytree(other / "val", tmp_path / "mixed/val")
    assert "have different labels; pack both from one table" in refused(tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed/val")
    shutil.copytree(demo_shards / "val", tmp_path / "mixed/val")
    assert "have different kinds of labels" in refused(tmp_path / "mixed")
    assert "no label of val is one that some images have" in refused(other)


# -- values ----------------------------------------------------------------------------------------


def test_errors_of_values_are_those_of_scikit_learn() -> None:
    numbers = np.random.default_rng(0)
    true = numbers.normal(3, [1, 20], (50, 2))
    predicted = true + numbers.normal(0, [0.5, 30], (50, 2))
    found = value_means(value_rows(predicted, true), ["a", "b"])
    mae = reference.mean_absolute_error(true, predicted, multioutput="raw_values")
    rmse = reference.root_mean_squared_error(true, predicted, multioutput="raw_values")
    assert found == pytest.approx({
        "r2": 100 * reference.r2_score(true, predicted), "mae_a": mae[0], "rmse_a": rmse[0],
        "mae_b": mae[1], "rmse_b": rmse[1],
    })  # fmt: skip


def test_values_are_predicted_in_their_own_units(run_folder, demo_shards: Path, tmp_path: Path):
    """The head with the saved weights, applied by hand, has the errors that are reported."""
    data = repacked(
        demo_shards, tmp_path / "aged", "values", ["age", "mass"],
        lambda label: [50.0 + 2 * label, 1e4 * (label % 2)],
    )  # fmt: skip
    words = ["--output_dir", run_folder.path, "--data_path", data, "--num_workers", 0]
    words += ["--pretrained_weights", run_folder.weights, "--device", "cpu", "--layers", "cls"]
    few = ("--epochs", 20, "--lrs", 0.05)
    assert main([str(word) for word in ("linear", *words, *few)]) == 0
    entry = json.loads((run_folder.path / "results.json").read_text())["linear"]
    names = {f"{kind}_{name}" for kind in ("mae", "rmse") for name in ("age", "mass")}
    assert set(entry["metrics"]) == names | {"r2"} and entry["metrics"]["r2"] > 0
    assert read_run(run_folder.path).top1("linear") == entry["metrics"]["r2"]
    head = load_file(run_folder.path / "linear_head.safetensors")
    (cache,) = (run_folder.path / "features").glob("pretrained-val-*")
    predicted = np.load(cache / "cls.npy") @ head["weight"].numpy().T + head["bias"].numpy()
    ages = 50 + 2 * ShardIndex.load(demo_shards / "val").labels
    error = np.abs(predicted[:, 0] - ages).mean()
    assert entry["metrics"]["mae_age"] == pytest.approx(error, rel=1e-4)
    head_file = run_folder.path / "linear_head.safetensors"
    words = [str(word) for word in words]
    assert main(["evaluate", *words[:-2], "--head", str(head_file)]) == 0
    again = json.loads((run_folder.path / "results.json").read_text())["evaluate/head"]
    assert again["metrics"] == pytest.approx(entry["metrics"], rel=1e-5)
    assert again["per_class"] == entry["per_class"] and again["protocol"]["labels"] == "values"


# -- k-NN ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.07, 1e-4])
def test_weighted_means_are_those_of_brute_force(temperature: float, monkeypatch) -> None:
    monkeypatch.setattr(weighted, "CELLS", 40)  # two queries at a time
    numbers = np.random.default_rng(0)
    bank, queries = numbers.standard_normal((30, 5)), numbers.standard_normal((7, 5))
    targets = numbers.standard_normal((30, 2))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, bank)]
    cosines = unit[0] @ unit[1].T
    order = np.argsort(-cosines, axis=1)[:, :10]
    found = weighted.weighted_means(
        np.take_along_axis(cosines, order, 1), order, targets, [3, 10], temperature
    )
    for number, k in enumerate((3, 10)):
        for query in range(7):
            nearest = np.argsort(-cosines[query])[:k]
            weights = np.exp((cosines[query, nearest] - cosines[query].max()) / temperature)
            expected = np.average(targets[nearest], axis=0, weights=weights)
            np.testing.assert_allclose(found[number, query], expected, rtol=1e-9)


def test_knn_of_several_labels(run_folder, tagged: Path, capsys) -> None:
    """Against scikit-learn's neighbors with the same weights, and its metrics."""
    words = ["--output_dir", run_folder.path, "--data_path", tagged, "--num_workers", 0]
    words += ["--pretrained_weights", run_folder.weights, "--device", "cpu"]
    assert main([str(word) for word in ("knn", *words, "--nb_knn", 5, 20)]) == 0
    assert "k-NN, pretrained: map_k5 " in capsys.readouterr().out
    entry = json.loads((run_folder.path / "results.json").read_text())["knn"]
    assert set(entry["metrics"]) == {"map_k5", "map_k20", "auroc", "macro_f1"}
    assert [line.split(",")[0] for line in entry["per_class"]] == ["class", "x", "y", "z"]
    assert entry["protocol"]["labels"] == "several an image"
    run = read_run(run_folder.path)
    assert run.top1("knn") == entry["metrics"]["map_k20"]
    scores, truth = neighbors_of_scikit_learn(run_folder.path, tagged, 20)
    expected = reference.average_precision_score(truth, scores, average="macro")
    assert entry["metrics"]["map_k20"] == pytest.approx(100 * expected, abs=1e-3)
    expected = reference.roc_auc_score(truth, scores, average="macro")
    assert entry["metrics"]["auroc"] == pytest.approx(100 * expected, abs=1e-3)
    assert [card.title for card in accuracy.headlines(run).data] == ["k-NN, k = 20, mAP"]
    assert accuracy.knn_table([run]).header == ["k-NN, mAP, %", "k = 5", "k = 20"]


def neighbors_of_scikit_learn(run: Path, data: Path, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(Means of the neighbors' targets, true targets) of the validation images."""
    tables = {}
    for split in ("train", "val"):
        (cache,) = (run / "features").glob(f"pretrained-{split}-*")
        features = np.load(cache / "cls.npy")
        targets, _ = target_table(ShardIndex.load(data / split), LoaderConfig())
        tables[split] = features / np.linalg.norm(features, axis=1, keepdims=True), targets

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances**2 / 2) / 0.07)

    found = KNeighborsRegressor(k, weights=weights, algorithm="brute").fit(*tables["train"])
    return found.predict(tables["val"][0]), tables["val"][1]


def test_knn_of_values(run_folder, demo_shards: Path, tmp_path: Path) -> None:
    data = repacked(
        demo_shards, tmp_path / "aged", "values", ["age", "mass"],
        lambda label: [50.0 + 2 * label, 1e4 * (label % 2)],
    )  # fmt: skip
    words = ["--output_dir", run_folder.path, "--data_path", data, "--num_workers", 0]
    words += ["--pretrained_weights", run_folder.weights, "--device", "cpu", "--nb_knn", 7]
    assert main([str(word) for word in ("knn", *words)]) == 0
    entry = json.loads((run_folder.path / "results.json").read_text())["knn"]
    predicted, true = neighbors_of_scikit_learn(run_folder.path, data, 7)
    mae = reference.mean_absolute_error(true, predicted, multioutput="raw_values")
    rmse = reference.root_mean_squared_error(true, predicted, multioutput="raw_values")
    assert entry["metrics"] == pytest.approx({
        "r2_k7": 100 * reference.r2_score(true, predicted), "mae_age": mae[0],
        "rmse_age": rmse[0], "mae_mass": mae[1], "rmse_mass": rmse[1],
    }, rel=1e-3)  # fmt: skip
    assert read_run(run_folder.path).top1("knn") == entry["metrics"]["r2_k7"]


# -- evaluate --------------------------------------------------------------------------------------


def test_evaluate_of_several_labels(run_folder, tagged: Path, demo_shards, tmp_path, capsys):
    """A saved head has the metrics of the probe that trained it, a checkpoint with such a head of
    its own too; heads of other labels are refused."""
    words = ["--output_dir", run_folder.path, "--data_path", tagged, "--num_workers", 0]
    words = [str(word) for word in (*words, "--device", "cpu")]
    own = [*words, "--pretrained_weights", str(run_folder.weights)]
    assert main(["linear", *own, "--epochs", "5", "--layers", "cls"]) == 0
    head_file = run_folder.path / "linear_head.safetensors"
    head = ["--head", str(head_file)]
    assert main(["evaluate", *own, *head]) == 0
    backbone = create_model(ARCH, num_classes=0)
    load_backbone(run_folder.weights, backbone, None)
    state = backbone.state_dict()
    state |= {f"head.{name}": value for name, value in load_file(head_file).items()}
    torch.save(state, tmp_path / "whole.pth")
    assert main(["evaluate", *words, "--pretrained_weights", str(tmp_path / "whole.pth")]) == 0
    results = json.loads((run_folder.path / "results.json").read_text())
    for name in ("evaluate", "evaluate/head"):
        assert results[name]["metrics"] == pytest.approx(results["linear"]["metrics"], abs=1e-3)
        assert results[name]["protocol"]["labels"] == "several an image"
        assert results[name]["per_class"] == results["linear"]["per_class"]
    values = repacked(demo_shards, tmp_path / "v", "values", ["x", "y", "z"], lambda n: [n, 1, n])
    others = repacked(demo_shards, tmp_path / "o", "labels", ["x", "y", "w"], lambda n: [n % 3])
    capsys.readouterr()
    for data, said in (
        (values, "several an image (x, y, z), and those of the data values (x, y, z)"),
        (others, "several an image (x, y, z), and those of the data several an image (x, y, w)"),
        (demo_shards, "and those of the data one an image"),
    ):
        assert main(["evaluate", *own, *head, "--data_path", str(data)]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
    assert main(["evaluate", *own, *head, "--label_map", str(tmp_path / "map.txt")]) == 2
    assert "--label_map: not for images with several labels" in capsys.readouterr().err
