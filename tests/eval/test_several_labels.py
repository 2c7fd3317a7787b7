"""The linear probe on images with several labels each: metrics and steps equal references."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from xcit_dino.cli import main
from xcit_dino.data.pack.shard_writer import Sample, write_shard
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.data.shards.index_writer import write_index
from xcit_dino.eval.linear_grid import Choice, HeadGroup
from xcit_dino.eval.scores.several import label_means, label_rows
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


@pytest.fixture
def tagged(tmp_path: Path, demo_shards: Path) -> Path:
    """The demo images; label n: the class is among the four from n on."""
    for split in ("train", "val"):
        index = ShardIndex.load(demo_shards / split)
        samples = []
        for number in range(index.num_samples):
            shard, offset, size = index.locate(number)
            image = Path(index.path(shard)).read_bytes()[offset : offset + size]
            label = int(index.labels[number])
            labels = json.dumps([n for n in range(3) if n <= label % 5 <= n + 2])
            target = ("labels", labels.encode())
            samples.append(Sample(f"{number:04d}", "jpg", image, -1, {}, target))
        folder = tmp_path / "tagged" / split
        folder.mkdir(parents=True)
        part = write_shard(folder, "shard-000000.tar", samples)
        write_index(folder, [part], None, target_classes=["x", "y", "z"])
    return tmp_path / "tagged"


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
        (["knn"], "for `xcit-dino linear` alone"),
        (["linear", "--protocol", "dino"], "--protocol dino: not for images with several"),
        (["linear", "--labels_per_class", "3"], "--labels_per_class: not for images"),
        (["linear", "--data_path", str(run_folder.data)], ""),
    ):
        code = main([refused[0], *words, *refused[1:]])
        assert code == (2 if said else 0)
        assert said in capsys.readouterr().err
