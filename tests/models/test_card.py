"""The model card: true to the files, results only of these very weights, code that runs."""

from __future__ import annotations

import json
import re

import numpy as np
import PIL.Image
import pytest
import torch

import xcit_dino
from xcit_dino.errors import InputError
from xcit_dino.files import file_checksum
from xcit_dino.inputs import InputSettings
from xcit_dino.models.config import ExportConfig
from xcit_dino.models.weights import formats
from xcit_dino.models.weights.card_code import preprocessing_code
from xcit_dino.models.weights.convert import export
from xcit_dino.models.zoo import create_model
from xcit_dino.provenance import record_result


@pytest.fixture
def checkpoint(tmp_path):
    """A pretraining checkpoint in a run folder, with results of it and of another."""
    backbone = create_model("xcit_pico_6_p8", num_classes=0).state_dict()
    path = tmp_path / "run" / "checkpoints" / "checkpoint-00000100.pth"
    path.parent.mkdir(parents=True)
    config = "arch: xcit_pico_6_p8\nepochs: 7\nteacher_temp: 0.04\ndata_path: /data/birds\n"
    teacher = {f"backbone.{name}": value for name, value in backbone.items()}
    torch.save({"teacher": teacher, "config": config, "epoch": 7, "step": 100, "data": "ab" * 32},
               path)  # fmt: skip
    ours = {"weights": file_checksum(path), "temperature": 0.07, "crop": 32, "network": "teacher"}
    record_result(tmp_path / "run", "knn", {"top1_k20": 51.25, "top5_k20": 90.0}, ours)
    record_result(tmp_path / "run", "linear", {"top1": 77.77}, {"weights": "of another"})
    return path


def test_says_what_it_is(checkpoint, tmp_path):
    export(ExportConfig(checkpoint, tmp_path / "out" / "birds.safetensors"))
    text = (tmp_path / "out" / "birds.safetensors.md").read_text()
    for words in (
        "# birds", "`xcit_pico_6_p8`, the teacher", "7 epochs, 100 steps", "Shards `birds`",
        "| epochs | 7 |", "| knn, k = 20 | 51.25 | 90.00 | crop 32; temperature 0.07 |",
        file_checksum(tmp_path / "out" / "birds.safetensors"),
    ):  # fmt: skip
        assert words in text, words
    assert "77.77" not in text and "/data" not in text


def test_its_code_loads_the_file(checkpoint, tmp_path, monkeypatch):
    export(ExportConfig(checkpoint, tmp_path / "birds.safetensors"))
    code = re.findall(
        r"```python\n(.*?)```", (tmp_path / "birds.safetensors.md").read_text(), re.DOTALL
    )[0]
    monkeypatch.chdir(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    space = {"images": images}
    exec(code, space)
    model = create_model("xcit_pico_6_p8", num_classes=0).eval()
    teacher = torch.load(checkpoint, weights_only=True)["teacher"]
    model.load_state_dict({k.removeprefix("backbone."): v for k, v in teacher.items()})
    assert torch.equal(space["outputs"], model(images))


def test_a_bare_file_has_a_card_that_says_what_is_not_known(tmp_path):
    bare = tmp_path / "bare.pth"
    torch.save(create_model("xcit_pico_6_p8", num_classes=3).state_dict(), bare)
    export(ExportConfig(bare, tmp_path / "bare.safetensors"))
    text = (tmp_path / "bare.safetensors.md").read_text()
    assert text.count("Not recorded in the checkpoint.") == 2 and "classifier of 3 classes" in text
    assert "No accuracy of this network" in text


def test_results_that_cannot_be_read_are_refused(checkpoint, tmp_path):
    (tmp_path / "broken.json").write_text(json.dumps({})[:-1])
    with pytest.raises(InputError, match="broken.json"):
        output = tmp_path / "birds.safetensors"
        export(ExportConfig(checkpoint, output, results=tmp_path / "broken.json"))


def test_accuracies_of_this_very_network_with_k_head_and_protocol(tmp_path):
    """One file holds a student and a teacher, and both have results by several protocols."""
    backbone = create_model("xcit_pico_6_p8", num_classes=0).state_dict()
    path = tmp_path / "run" / "checkpoints" / "checkpoint-00000100.pth"
    path.parent.mkdir(parents=True)
    networks = {
        network: {f"backbone.{name}": value for name, value in backbone.items()}
        for network in ("teacher", "student")
    }
    torch.save(networks, path)
    of = {"weights": file_checksum(path)}
    for network, crop, top1 in (("teacher", 32, 59.4), ("teacher", 64, 63.8), ("student", 32, 48)):
        metrics = {f"top{n}_k{k}": top1 + n + k / 100 for n in (1, 5) for k in (10, 20)}
        record_result(tmp_path / "run", "knn", metrics, of | {"network": network, "crop": crop})
    record_result(tmp_path / "run", "linear", {"top1": 70.5}, of | {"network": "student"},
                  chosen={"layers": "cls", "lr": 0.1})  # fmt: skip
    results = tmp_path / "run" / "results.json"
    for which in ("teacher", "student"):
        output = tmp_path / which / "birds.safetensors"
        export(ExportConfig(path, output, which=which, results=results))
    teacher, student = (
        (tmp_path / which / "birds.safetensors.md").read_text() for which in ("teacher", "student")
    )
    for row in (
        "| knn, k = 10 | 60.50 | 64.50 | crop 32 |",
        "| knn, k = 20 | 65.00 | 69.00 | crop 64 |",
    ):
        assert row in teacher and row not in student
    assert "| linear | 70.50 |  | head layers cls, lr 0.1 |" in student
    assert "linear |" not in teacher and "| knn, k = 20 | 49.20 | 53.20 | crop 32 |" in student
    facts = formats.metadata(tmp_path / "student" / "birds.safetensors")
    assert len(json.loads(facts["results"])) == 2


def test_baselines_of_the_same_protocol_classes_and_license(checkpoint, tmp_path):
    run = checkpoint.parent.parent
    shared = {"temperature": 0.07, "crop": 32}
    random, other = {"network": "random", "seed": 0}, {"network": "pixels", "side": 32, "crop": 64}
    record_result(run, "knn/random", {"top1_k20": 21.5, "top5_k20": 60.0}, shared | random)
    record_result(run, "knn/pixels", {"top1_k20": 99.0, "top5_k20": 99.0}, shared | other)
    ours = shared | {"weights": file_checksum(checkpoint), "network": "teacher"}
    rows = ["class,label,images", '"jay, blue",0,5', "owl,1,5"]
    record_result(run, "knn", {"top1_k20": 51.25, "top5_k20": 90.0}, ours, per_class=rows)
    export(ExportConfig(checkpoint, tmp_path / "birds.safetensors"))
    text = (tmp_path / "birds.safetensors.md").read_text()
    ours, baseline = "| knn, k = 20 | 51.25 | 90.00 |", "| knn, k = 20: random weights | 21.50 |"
    assert text.index(ours) < text.index(baseline) and "99.00" not in text
    assert "Of the images evaluated: 0 jay, blue, 1 owl." in text
    assert "## License" in text and "Not chosen yet" in text


@pytest.mark.parametrize("size", [32, 96])
def test_its_preprocessing_is_that_of_the_evaluations(checkpoint, tmp_path, monkeypatch, size):
    tree = torch.load(checkpoint, weights_only=True)
    tree["config"] += f"global_crops_size: {size}\nmean: [0.2, 0.3, 0.4]\nstd: [0.5, 0.6, 0.7]\n"
    torch.save(tree, checkpoint)
    export(ExportConfig(checkpoint, tmp_path / "birds.safetensors"))
    text = (tmp_path / "birds.safetensors.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text.split("## Preprocessing")[1], re.DOTALL)[0]
    photo = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    large = PIL.Image.fromarray(photo).resize((200, 150))
    large.save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(code.replace("image.jpg", "image.png"), space)
    _, transform = xcit_dino.load(tmp_path / "birds.safetensors")
    expected = transform(large)[None]
    assert space["images"].shape == expected.shape == (1, 3, size, size)
    assert (space["images"] - expected).abs().max() < 2 / 255 / 0.5, "one step of a byte"


def test_preprocessing_of_other_images_than_rgb_is_a_formula():
    settings = InputSettings(
        size=32, mean=(0.5,), std=(0.25,), channels=1, low=(0.0,), high=(4095.0,)
    )  # fmt: skip
    code = re.findall(r"```python\n(.*?)```", preprocessing_code(settings), re.DOTALL)[0]
    space = {"pixels": np.array([[[0.0, 4095.0, 8190.0]]], np.float32)}
    exec(code, space)
    assert space["images"].tolist() == [[[[-2.0, 2.0, 2.0]]]]


@pytest.mark.slow
def test_the_card_of_one_file_is_not_that_of_another(checkpoint, tmp_path):
    pytest.importorskip("onnx")
    for ending in ("safetensors", "onnx"):
        export(ExportConfig(checkpoint, tmp_path / f"birds.{ending}"))
    for ending, words in (("safetensors", "load_file("), ("onnx", "onnxruntime")):
        assert words in (tmp_path / f"birds.{ending}.md").read_text()
