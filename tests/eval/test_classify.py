"""`evaluate`: a classifier's own head, a probe's head, and heads that do not fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError
from xcit_dino.eval import evaluate, linear
from xcit_dino.eval.config import EvaluateConfig, LinearConfig
from xcit_dino.eval.features import load_features
from xcit_dino.eval.scores.label_map import read_map
from xcit_dino.eval.target import pretrained, resolve
from xcit_dino.models.zoo import create_model
from xcit_dino.train.distributed.dist import World

ARCH = "xcit_pico_6_p8"


def result(run_folder, name: str):
    return json.loads((run_folder.path / "results.json").read_text())[name]


def test_a_classifier_checkpoint(run_folder, tmp_path):
    torch.manual_seed(0)
    index = ShardIndex.load(run_folder.data / "val")
    model = create_model(ARCH, num_classes=len(index.classes or []))
    torch.save({"model": model.state_dict()}, tmp_path / "classifier.pth")
    target = run_folder.target(
        pretrained_weights=tmp_path / "classifier.pth", batch_size_per_gpu=20
    )
    evaluate.run(EvaluateConfig(target))

    backbone = create_model(ARCH)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    backbone.load_state_dict(state)
    torch.save({"model": state}, tmp_path / "backbone.pth")
    config = run_folder.target(pretrained_weights=tmp_path / "backbone.pth")
    found, context = resolve(config, World(0, 1, torch.device("cpu")))
    features = load_features(pretrained(found), index, "val", context)
    logits = model.head(torch.tensor(features.blocks["cls"]))
    order = logits.argsort(1, descending=True)
    places = (order == torch.tensor(features.labels)[:, None]).int().argmax(1)
    metrics = result(run_folder, "evaluate")["metrics"]
    assert metrics["top1"] == pytest.approx(100 * (places < 1).float().mean().item(), abs=1e-4)
    assert metrics["top5"] == pytest.approx(100 * (places < 5).float().mean().item(), abs=1e-4)
    assert result(run_folder, "evaluate")["protocol"]["val_images"] == 48


def test_backbone_and_head_repeat_the_probes_accuracy(run_folder, capsys):
    linear.run(LinearConfig(run_folder.target(), epochs=3))
    evaluate.run(EvaluateConfig(run_folder.target(), head=run_folder.path / linear.HEAD_FILE))
    probe, again = result(run_folder, "linear"), result(run_folder, "evaluate/head")
    assert "was trained on features" not in capsys.readouterr().err
    assert again["metrics"] == {k: v for k, v in probe["metrics"].items() if k != "holdout_top1"}
    assert again["per_class"] == probe["per_class"]
    assert again["protocol"]["weights"] == probe["protocol"]["weights"]
    other = run_folder.target(crop_size=24, checkpoint_key="student")
    evaluate.run(EvaluateConfig(other, head=run_folder.path / linear.HEAD_FILE))
    assert "features of another network and resize and crop" in capsys.readouterr().err
    assert again["protocol"]["layers"] == probe["chosen"]["layers"]


@pytest.mark.parametrize(
    "shape, match",
    [
        ((12, 7), "trained on 7 features .*xcit_pico_6_p8 has 80"),
        ((1000, 80), "has 1000 classes"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(run_folder, tmp_path, shape, match):
    head = tmp_path / "head.safetensors"
    save_file(
        {"weight": torch.zeros(shape), "bias": torch.zeros(shape[0])}, head, {"layers": "cls"}
    )
    with pytest.raises(InputError, match=match):
        evaluate.run(EvaluateConfig(run_folder.target(), head=head))


def test_a_backbone_is_no_classifier(run_folder):
    with pytest.raises(InputError, match="no classifier"):
        evaluate.run(EvaluateConfig(run_folder.target()))


def test_unlabeled_images_are_refused(run_folder, unlabeled):
    with pytest.raises(InputError, match="have no label"):
        evaluate.run(EvaluateConfig(run_folder.target(data_path=str(unlabeled))))


# -- heads of other classes ------------------------------------------------------------------------


@pytest.fixture
def larger(run_folder, tmp_path):
    """A classifier of 20 classes, its logits for the validation images, their labels and names."""
    torch.manual_seed(3)
    model = create_model(ARCH, num_classes=20)
    torch.save({"model": model.state_dict()}, tmp_path / "larger.pth")
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    torch.save({"model": state}, tmp_path / "backbone.pth")
    config = run_folder.target(pretrained_weights=tmp_path / "backbone.pth")
    found, context = resolve(config, World(0, 1, torch.device("cpu")))
    index = ShardIndex.load(run_folder.data / "val")
    features = load_features(pretrained(found), index, "val", context)
    logits = model.head(torch.tensor(features.blocks["cls"])).detach()
    save_file(
        {"weight": model.head.weight.detach(), "bias": model.head.bias.detach()},
        tmp_path / "head.safetensors", {"layers": "cls"},
    )  # fmt: skip
    return tmp_path, logits, torch.tensor(features.labels), index.classes


@pytest.mark.parametrize("coarse", [False, True])
def test_classes_of_the_data_in_a_larger_head(run_folder, larger, coarse):
    """Each class by its own outputs: the probability of a class is the sum of theirs, and other
    outputs do not compete."""
    folder, logits, labels, names = larger
    groups = [[19 - n, n] if coarse and n < 3 else [19 - n] for n in range(len(names))]
    if coarse:
        file = folder / "map.json"
        file.write_text(json.dumps({
            name: group if len(group) > 1 else group[0]
            for name, group in zip(names, groups, strict=True)
        }))  # fmt: skip
    else:
        file = folder / "map.txt"
        outputs = [f"other {n}" for n in range(20)]
        for name, (number,) in zip(names, groups, strict=True):
            outputs[number] = name
        file.write_text("\n".join(outputs))
    probabilities = logits.double().exp()
    table = torch.stack([probabilities[:, group].sum(1) for group in groups], 1)
    expected = 100 * (table.argmax(1) == labels).double().mean().item()
    weights = run_folder.target(pretrained_weights=folder / "larger.pth")
    evaluate.run(EvaluateConfig(weights, label_map=file))
    entry = result(run_folder, "evaluate")
    assert entry["metrics"]["top1"] == pytest.approx(expected, abs=1e-6)
    assert "label_map" in entry["protocol"] and len(entry["per_class"]) > 1
    bare = run_folder.target(pretrained_weights=folder / "backbone.pth")
    evaluate.run(EvaluateConfig(bare, head=folder / "head.safetensors", label_map=file))
    again = result(run_folder, "evaluate/head")["metrics"]
    assert again["top1"] == pytest.approx(expected, abs=1e-6)


def test_bad_maps_are_refused(run_folder, larger):
    folder, _, _, names = larger
    weights = run_folder.target(pretrained_weights=folder / "larger.pth")

    def refused(text: str, match: str, file: str = "map.json") -> None:
        (folder / file).write_text(text)
        with pytest.raises(InputError, match=match):
            evaluate.run(EvaluateConfig(weights, label_map=folder / file))

    whole = {name: number for number, name in enumerate(names)}
    refused("[1]", "must be")
    refused(json.dumps(whole | {names[0]: "x"}), "must be")
    refused(json.dumps(whole | {names[0]: [1, -1]}), "must be")
    refused(json.dumps({name: 0 for name in names[1:]}), f"lacks 1 classes .*{names[0]}")
    refused(json.dumps(whole | {names[0]: 20}), "names output 20, and the head has outputs 0 to 19")
    refused(json.dumps(whole | {names[0]: 1}), "output 1 stands for two classes")
    refused("\n".join(names[1:]), "lacks 1 classes", "map.txt")
    with pytest.raises(InputError, match="numbers for classes, no names"):
        read_map(folder / "map.json", None, 20)
