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


def test_backbone_and_head_repeat_the_probes_accuracy(run_folder):
    linear.run(LinearConfig(run_folder.target(), epochs=3))
    evaluate.run(EvaluateConfig(run_folder.target(), head=run_folder.path / linear.HEAD_FILE))
    probe, again = result(run_folder, "linear"), result(run_folder, "evaluate/head")
    assert again["metrics"] == {k: v for k, v in probe["metrics"].items() if k != "holdout_top1"}
    assert again["per_class"] == probe["per_class"]
    assert again["protocol"]["weights"] == probe["protocol"]["weights"]
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
