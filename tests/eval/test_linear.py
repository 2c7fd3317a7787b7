"""Linear probe: heads against torch.optim.SGD, an honest choice, both protocols, the saved head."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from tests.nowait import NeverWaits
from xcit_dino.data.packed import to_device
from xcit_dino.errors import InputError
from xcit_dino.eval import linear, linear_augmented, linear_grid
from xcit_dino.eval.config import LinearConfig
from xcit_dino.eval.features import Features
from xcit_dino.eval.linear import train_cached
from xcit_dino.eval.linear_augmented import step_grids
from xcit_dino.eval.linear_grid import Choice, Heads, Table, best, grid, hold_out
from xcit_dino.eval.scores.heads import accuracy, topk_hits
from xcit_dino.eval.target import Network
from xcit_dino.provenance import digest
from xcit_dino.train.schedules import cosine

CPU = torch.device("cpu")


def clusters(count: int, seed: int, dim: int = 12, classes: int = 4) -> Features:
    """Overlapping clusters as blocks cls and patch."""
    centers = np.random.default_rng(0).standard_normal((classes, 2 * dim))
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    rows = centers[labels] + 1.5 * generator.standard_normal((count, 2 * dim))
    rows = rows.astype(np.float32)
    return Features({"cls": rows[:, :dim], "patch": rows[:, dim:]}, labels, classes, 0)


def test_every_head_is_trained_as_by_torch():
    """All heads at once equal one ``nn.Linear`` each under ``torch.optim.SGD`` and autograd."""
    choices = grid(("cls", "cls+patch"), (0.01, 0.5), (0.0, 0.1))
    heads = Heads(choices, {"cls": 6, "patch": 3}, 5, batch_size=64, seed=3, device=CPU)
    start = [heads.head(n) for n in range(len(choices))]
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(16, 9, generator=generator), torch.randint(5, (16,), generator=generator))
        for _ in range(6)
    ]
    for step, (x, labels) in enumerate(batches):
        heads.step({"cls": x[:, :6], "patch": x[:, 6:]}, labels, cosine(step, 6, 1.0, 0.0))

    x, labels = batches[0]
    scores = heads.score([({"cls": x[:, :6], "patch": x[:, 6:]}, labels)])
    for number, choice in enumerate(choices):
        head = torch.nn.Linear(start[number][0].shape[1], 5)
        head.load_state_dict(dict(zip(("weight", "bias"), start[number], strict=True)))
        lr = choice.lr * 64 / 256
        optimizer = torch.optim.SGD(
            head.parameters(), lr, momentum=0.9, weight_decay=choice.weight_decay
        )
        for step, (part, wanted) in enumerate(batches):
            optimizer.param_groups[0]["lr"] = lr * cosine(step, 6, 1.0, 0.0)
            F.cross_entropy(head(part[:, : head.in_features]), wanted).backward()
            optimizer.step()
            optimizer.zero_grad()
        for ours, theirs in zip(heads.head(number), head.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            logits = head(x[:, : head.in_features])
        accuracy = 100 * (logits.argmax(1) == labels).float().mean().item()
        assert scores[number][0] == pytest.approx(accuracy)
        assert scores[number][1] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


def test_schedule_is_torchs_cosine():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=0)
    for epoch in range(10):
        assert cosine(epoch, 10, 1.0, 0.0) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_best_prefers_accuracy_then_loss_then_order():
    assert best([(50, 1.0), (60, 3.0), (60, 2.0), (60, 2.0)]) == 2
    assert best([(50, float("inf")), (50, float("inf"))]) == 0


def test_held_out_images_are_a_fixed_share():
    held_out = hold_out(200, 0.1, seed=0)
    assert held_out.sum() == 20 and torch.equal(held_out, hold_out(200, 0.1, seed=0))
    assert not torch.equal(held_out, hold_out(200, 0.1, seed=1))
    assert hold_out(2, 0.01, seed=0).sum() == 1
    with pytest.raises(InputError, match="fewer than 2 images"):
        hold_out(1, 0.1, seed=0)


def test_cached_training_learns():
    train, val = clusters(400, seed=1), clusters(300, seed=2)
    choices = grid(("cls", "cls+patch"), (1e-4, 0.1), (0.0,))
    probe = train_cached(train, choices, 4, LinearConfig(epochs=20, probe_batch_size=64), CPU)
    assert probe.choice == Choice("cls+patch", 0.1, 0.0)
    assert probe.chosen == best(probe.scores)
    assert torch.get_float32_matmul_precision() == "highest", "as before"
    assert accuracy(val, probe.choice.layers, probe.weight, probe.bias)[0]["top1"] > 90


@pytest.mark.parametrize("labels_turned", ["held out", "others"])
def test_the_choice_is_made_by_heads_that_never_saw_the_held_out_images(monkeypatch, labels_turned):
    """The judged heads know nothing of the held-out images' labels, the reported one learns all."""
    train, choices = clusters(400, seed=1), grid(("cls",), (0.1,), (0.0,))
    config = LinearConfig(epochs=3, probe_batch_size=64, holdout=0.25)
    held_out = hold_out(400, config.holdout, config.seed).numpy()
    changed = held_out if labels_turned == "held out" else ~held_out
    turned = Features(train.blocks, np.where(changed, (train.labels + 1) % 4, train.labels), 4, 0)
    judged = []
    score = Heads.score
    monkeypatch.setattr(
        Heads, "score", lambda self, batches: judged.append(self.head(0)) or score(self, batches)
    )
    first, second = (train_cached(f, choices, 4, config, CPU) for f in (train, turned))
    same = torch.equal(judged[0][0], judged[1][0])
    assert same == (labels_turned == "held out")
    assert not torch.equal(first.weight, second.weight)


def test_top_hits_by_hand():
    logits = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5]])
    assert topk_hits(logits, torch.tensor([1, 2])).tolist() == [1, 2]
    assert topk_hits(torch.eye(7), torch.tensor([0, 1, 2, 3, 4, 5, 0])).tolist()[0] == 6


def test_run_cached(run_folder):
    config = LinearConfig(run_folder.target(baselines=True), epochs=3, lrs=(0.01, 0.1, 1.0))
    linear.run(config)
    results = json.loads((run_folder.path / "results.json").read_text())
    assert set(results) == {"linear", "linear/random", "linear/pixels"}
    entry = results["linear"]
    assert set(entry["metrics"]) == {
        "top1", "top5", "balanced_accuracy", "macro_f1", "auroc", "holdout_top1"
    }  # fmt: skip
    assert {found["val_images"] for found in results.values()} == {48}
    assert len(entry["grid"]) == 3 * len(config.weight_decays) * len(config.layers)
    assert entry["chosen"] in [
        {k: point[k] for k in ("layers", "lr", "weight_decay")} for point in entry["grid"]
    ]
    assert max(p["holdout_top1"] for p in entry["grid"]) == entry["metrics"]["holdout_top1"]
    assert len(results["linear/pixels"]["grid"]) == 3 * len(config.weight_decays)
    with safe_open(run_folder.path / linear.HEAD_FILE, "pt") as file:
        assert file.metadata()["layers"] == entry["chosen"]["layers"]
        assert len(json.loads(file.metadata()["classes"])) == file.get_tensor("bias").shape[0]
    linear.run(LinearConfig(run_folder.target(), epochs=3, lrs=(0.01, 0.1, 1.0)))
    again = json.loads((run_folder.path / "results.json").read_text())["linear"]
    assert again["metrics"] == entry["metrics"]
    linear.run(LinearConfig(run_folder.target(), epochs=2, lrs=(0.01, 0.1, 1.0)))
    earlier = linear.HEAD_FILE.replace(".", f"@{digest(entry['protocol'])}.")
    for name, epochs in ((linear.HEAD_FILE, 2), (earlier, 3)):  # another protocol, another head
        with safe_open(run_folder.path / name, "pt") as file:
            assert json.loads(file.metadata()["protocol"])["epochs"] == epochs
    assert len(list(run_folder.path.glob("linear_head*"))) == 2


def test_run_dino(run_folder):
    """The augmented protocol goes through the backbone in every epoch, with other crops each
    time."""
    seen = []
    step = Heads.step

    def watched(self, blocks, labels, factor):
        seen.append((blocks["cls"].clone(), factor))
        step(self, blocks, labels, factor)

    config = LinearConfig(
        run_folder.target(batch_size_per_gpu=32), protocol="dino", epochs=2, lrs=(0.1, 1.0)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_augmented.Heads, "step", watched)
        linear.run(config)
    everything, without = seen[::2], seen[1::2]  # the reported grid, and the one that is judged
    assert [factor for _, factor in everything] == [1.0] * 3 + [0.5] * 3
    assert sum(len(x) for x, _ in without) == 2 * (96 - hold_out(96, config.holdout, 0).sum())
    first, second = (torch.cat([x for x, _ in part]) for part in (everything[:3], everything[3:]))
    assert torch.cdist(first, second).min() > 1e-4, "no crop comes twice"
    results = json.loads((run_folder.path / "results.json").read_text())
    assert results["linear-dino"]["protocol"]["augmentation"] == "RandomResizedCrop + flip"
    assert results["linear-dino"]["protocol"]["batch"] == 32


def test_a_step_of_the_augmented_grids_never_waits_for_the_device():
    choices = grid(("cls",), (0.1, 1.0), (0.0, 0.1))
    selection, final = (Heads(choices, {"cls": 8}, 3, 6, 0, CPU) for _ in range(2))
    blocks, labels = {"cls": torch.randn(6, 8)}, torch.arange(6) % 3
    out = torch.tensor([True, False, False, True, False, False])
    before = [tensor.clone() for tensor in selection.state()]
    with NeverWaits(numbers=True):
        rows = {"labels": labels, "held_out": torch.ones(6, dtype=torch.bool)}
        step_grids(selection, final, blocks, rows, 1)
    assert all(map(torch.equal, selection.state(), before)), "nothing was left to learn from"
    with NeverWaits(numbers=True):
        step_grids(selection, final, blocks, {"labels": labels, "held_out": out}, 1)
    expected = Heads(choices, {"cls": 8}, 3, 6, 0, CPU)
    expected.step({"cls": blocks["cls"][~out]}, labels[~out], 1)
    assert all(map(torch.equal, selection.state(), expected.state()))


def test_rows_of_a_table_are_queued_copies(monkeypatch):
    copied = []
    monkeypatch.setattr(linear_grid, "to_device", lambda x, d: copied.append(d) or to_device(x, d))
    features = Features({"cls": np.eye(4, dtype=np.float32)}, np.arange(4), 4, 0)
    blocks, labels = Table(features, ["cls"], CPU).rows(torch.tensor([3, 1]))
    assert torch.equal(blocks["cls"], torch.eye(4)[[3, 1]]) and labels.tolist() == [3, 1]
    assert copied == [CPU] * 3  # numbers, block and labels


def test_a_stopped_augmented_training_goes_on_and_ends_with_the_same_numbers(run_folder):
    target = run_folder.target(batch_size_per_gpu=32)
    config = LinearConfig(target, protocol="dino", epochs=3, lrs=(0.1, 1.0), layers=("cls",))
    linear.run(config)
    whole = json.loads((run_folder.path / "results.json").read_text())["linear-dino"]
    steps = []
    step = Heads.step

    def stopping(self, *arguments):
        steps.append(1)
        if len(steps) == 2 * 8:  # in the third epoch, of two grids
            raise KeyboardInterrupt
        step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_augmented.Heads, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            linear.run(config)
        patch.chdir(run_folder.data.parent)  # other workers, another spelling: the same training
        typed = run_folder.target(
            batch_size_per_gpu=32, num_workers=1, data_path=run_folder.data.name
        )
        linear.run(dataclasses.replace(config, target=typed))
    assert len(steps) == 2 * (8 + 3), "two whole epochs were kept"
    again = json.loads((run_folder.path / "results.json").read_text())["linear-dino"]
    assert again["metrics"] == whole["metrics"] and again["grid"] == whole["grid"]
    assert not list(run_folder.path.glob("*.state.pth"))


def test_the_edge_of_the_grid_is_pointed_out_with_a_wider_one(capsys):
    network = Network("pretrained", torch.nn.Identity(), {})
    config = LinearConfig(lrs=(0.1, 0.01))
    for lr, wider in ((0.1, "0.01 0.1 0.2 0.5"), (0.01, "0.002 0.005 0.01 0.1")):
        linear.print_result(network, Choice("cls", lr, 0.0), {"top1": 1.0, "top5": 2.0}, config)
        assert capsys.readouterr().out.endswith(f"add --lrs {wider}\n")


def test_few_held_out_images_take_turns():
    """As many parts as the share has it, classes spread evenly, an only image never held out."""
    labels = torch.tensor([0] * 20 + [1] * 10 + [2])
    for share, number in ((0.1, 10), (0.2, 5), (0.5, 2)):
        parts = linear_grid.hold_outs(labels, share, 0)
        assert len(parts) == number
        assert torch.stack(parts).sum(0).tolist() == [1] * 30 + [0]
        counts = torch.stack([labels[part].bincount(minlength=2)[:2] for part in parts])
        assert (counts.max(0).values - counts.min(0).values <= 1).all()
    assert linear_grid.hold_outs(torch.arange(5), 0.1, 0) == []
    several = torch.zeros(30, 4, dtype=torch.uint8)
    assert torch.stack(linear_grid.hold_outs(several, 0.1, 0)).sum(0).tolist() == [1] * 30
    many = torch.arange(2000) % 10
    (only,) = linear_grid.hold_outs(many, 0.1, 3)
    assert torch.equal(only, hold_out(2000, 0.1, 3))
    assert len(linear_grid.hold_outs(torch.arange(2000) % 400, 0.1, 3)) == 10, "classes are many"


@pytest.mark.parametrize("per_class", [1, 3, 10])
def test_of_few_images_no_untrained_head_is_chosen(per_class):
    """The lowest learning rate, which leaves the head as it began, won every tie."""
    many = clusters(400, seed=1)
    rows = np.concatenate([np.flatnonzero(many.labels == c)[:per_class] for c in range(4)])
    few = Features({n: b[rows] for n, b in many.blocks.items()}, many.labels[rows], 4, 0)
    choices = grid(("cls+patch",), LinearConfig.lrs, (0.0,))
    probe = train_cached(few, choices, 4, LinearConfig(), CPU)
    test = clusters(1000, seed=2)
    metrics, _ = accuracy(test, "cls+patch", probe.weight, probe.bias)
    assert metrics["top1"] > 60, probe.choice


def test_layers_that_a_network_lacks_are_refused():
    plain = torch.nn.Linear(2, 2)
    network = Network("pretrained", plain, {"arch": "timm/resnet18"})
    for named in (("deep",), ("cls", "deep")):
        message = f"--layers {' '.join(named)}: timm/resnet18 has its output only"
        with pytest.raises(InputError, match=message):
            linear.choices_for(LinearConfig(layers=named), network)
    pixels = linear.choices_for(LinearConfig(layers=("deep",)), Network("pixels", plain, {}))
    plainly = [linear.choices_for(LinearConfig(layers=each), network)
               for each in (("cls",), LinearConfig.layers)]  # fmt: skip
    assert {choice.layers for each in (pixels, *plainly) for choice in each} == {"cls"}
