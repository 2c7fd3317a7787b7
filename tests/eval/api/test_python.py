"""The Python interface: the same features, results and refusals as the commands."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import xcit_dino
from tests.conftest import ARCH
from xcit_dino.data.io.storage import open_source
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError
from xcit_dino.eval import linear
from xcit_dino.eval.config import LinearConfig
from xcit_dino.eval.features import load_features
from xcit_dino.eval.knn import evaluate as knn_accuracies
from xcit_dino.eval.linear import choices_for
from xcit_dino.eval.scores.heads import accuracy
from xcit_dino.eval.target import pretrained, resolve
from xcit_dino.files import file_checksum
from xcit_dino.provenance import read_results
from xcit_dino.train.distributed.dist import init as cpu_world

ROOT = Path(__file__).parents[3]


@pytest.fixture
def trained(run_folder) -> Path:
    """The run folder with its weights as a checkpoint."""
    file = run_folder.path / "checkpoints" / "checkpoint-00000001.pth"
    file.parent.mkdir()
    file.write_bytes(run_folder.weights.read_bytes())
    facts = {"step": 1, "bytes": file.stat().st_size, "sha256": file_checksum(file)}
    file.with_suffix(".json").write_text(json.dumps(facts))
    return run_folder.path


@pytest.fixture
def val_images(run_folder) -> list[bytes]:
    index = ShardIndex.load(run_folder.data / "val")
    source = open_source(index, resolve(run_folder.target(), cpu_world("cpu"))[1].loader)
    places = [index.locate(n) for n in range(index.num_samples)]
    return [image for image in source.read_many(places) if isinstance(image, bytes)]


@pytest.fixture
def commands(run_folder):
    """Features of both splits as the commands see them."""
    target, context = resolve(run_folder.target(), cpu_world("cpu"))
    network = pretrained(target)
    return {
        split: load_features(network, context.index(split), split, context)
        for split in ("train", "val")
    }


def test_load_and_embed_give_the_commands_features(run_folder, trained, val_images, commands):
    model, transform = xcit_dino.load(trained)
    context = resolve(run_folder.target(), cpu_world("cpu"))[1]
    assert (transform.resize, transform.crop) == (context.resize, context.crop)
    assert transform.inputs == context.inputs
    found = xcit_dino.embed(val_images, model, transform, batch_size=7)
    np.testing.assert_allclose(found, commands["val"].blocks["cls"], rtol=1e-5, atol=1e-5)


def test_images_of_every_kind_are_the_same_image(run_folder, val_images, tmp_path):
    _, transform = xcit_dino.load(run_folder.weights, arch=ARCH)
    raw = val_images[0]
    (tmp_path / "photo").write_bytes(raw)
    with Image.open(io.BytesIO(raw)) as opened:
        picture = opened.convert("RGB")
    array = np.asarray(picture)
    expected = transform(raw)
    for image in (
        tmp_path / "photo", str(tmp_path / "photo"), picture, array,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
    ):  # fmt: skip
        assert torch.equal(transform(image), expected), type(image)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(raw), expected)
    gray = np.full((40, 50), 7, np.uint8)
    assert torch.equal(transform(gray), transform(np.repeat(gray[:, :, None], 3, 2)))


def test_a_data_loader_of_transformed_images(run_folder, val_images):
    model, transform = xcit_dino.load(run_folder.weights, arch=ARCH)
    tensors = [(transform(image), 0) for image in val_images[:5]]
    batches = torch.utils.data.DataLoader(tensors, batch_size=2)  # pyright: ignore
    expected = xcit_dino.embed(val_images[:5], model, transform)
    np.testing.assert_allclose(xcit_dino.embed(batches, model), expected, rtol=1e-5, atol=1e-6)
    one = xcit_dino.embed(val_images[0], model, transform)
    np.testing.assert_allclose(one, expected[:1], rtol=1e-5, atol=1e-6)


def test_knn_equals_the_command(commands):
    bank, queries = commands["train"], commands["val"]
    classes = int(max(bank.labels.max(), queries.labels.max())) + 1
    expected = knn_accuracies(bank, queries, [5], 0.07, classes, cpu_world("cpu"))["top1_k5"]
    names = np.array([f"class {n:03d}" for n in range(classes)])
    classifier = xcit_dino.KNN(k=5).fit(bank.blocks["cls"], names[bank.labels])
    got = 100 * classifier.score(queries.blocks["cls"], names[queries.labels])
    assert got == pytest.approx(expected)
    assert np.allclose(classifier.predict_proba(queries.blocks["cls"]).sum(1), 1)
    cosines, rows = classifier.kneighbors(bank.blocks["cls"][:3], 1)
    assert rows[:, 0].tolist() == [0, 1, 2] and np.allclose(cosines, 1, atol=1e-5)


def test_the_linear_probe_equals_the_command(commands, run_folder):
    bank, queries = commands["train"], commands["val"]
    config = LinearConfig(epochs=3, lrs=(0.1, 1.0), layers=("cls",))
    network = pretrained(resolve(run_folder.target(), cpu_world("cpu"))[0])
    classes = int(bank.labels.max()) + 1
    probe = linear.train_cached(
        bank, choices_for(config, network), classes, config, torch.device("cpu")
    )
    expected = accuracy(queries, "cls", probe.weight, probe.bias)[0]["top1"]
    mine = xcit_dino.LinearProbe(epochs=3, lrs=(0.1, 1.0))
    mine.fit(bank.blocks["cls"], bank.labels)
    assert mine.lr_ == probe.choice.lr
    assert 100 * mine.score(queries.blocks["cls"], queries.labels) == pytest.approx(expected)


def test_commands_as_functions(run_folder, tmp_path):
    options = {
        "pretrained_weights": run_folder.weights, "output_dir": run_folder.path, "nb_knn": (5, 10),
        "num_workers": 0, "device": "cpu", "arch": None,
    }  # fmt: skip
    result = xcit_dino.knn(**options)
    assert set(result["metrics"]) >= {"top1_k5", "top1_k10"} and "protocol" in result
    run = xcit_dino.pretrain(
        data_path=run_folder.data, arch=ARCH, output_dir=tmp_path / "run", max_steps=1,
        batch_size_per_gpu=4, global_crops_size=32, local_crops_number=0, out_dim=64,
        num_workers=0, device="cpu", knn_every=0,
    )  # fmt: skip
    assert (run / "config.yaml").is_file()
    assert xcit_dino.load(run)[0](torch.zeros(1, 3, 32, 32)).shape == (1, 80)
    with pytest.raises(InputError, match="unknown option --nb_kn"):
        xcit_dino.knn(nb_kn=3, output_dir=run_folder.path)


def test_evaluations_return_what_they_wrote(run_folder, tmp_path):
    """Not an older result, whatever name the new one is stored under."""
    options = {
        "pretrained_weights": run_folder.weights, "output_dir": run_folder.path, "num_workers": 0,
        "device": "cpu", "batch_size_per_gpu": 48,
    }  # fmt: skip
    few, probe = {"labels_per_class": 2, "draws": 2}, {"epochs": 1, "lrs": (0.1,), "layers": "cls"}
    xcit_dino.knn(**options, nb_knn=5, baselines=True)
    xcit_dino.linear(**options, **probe)
    found = {
        "knn-few": xcit_dino.knn(**options, **few, nb_knn=(1, 2), baselines=True),
        "linear-few": xcit_dino.linear(**options, **few, **probe),
        "linear-dino": xcit_dino.linear(**options, **probe, protocol="dino"),
        "evaluate/head": xcit_dino.evaluate(
            **options, head=run_folder.path / "linear_head.safetensors"
        ),
    }
    stored = read_results(run_folder.path)
    assert found == {name: stored[name] for name in found}


def test_functions_have_the_defaults_of_the_commands(run_folder, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = {"num_workers": 0, "device": "cpu", "batch_size_per_gpu": 4, "input_size": 32}
    run = xcit_dino.finetune(
        pretrained_weights=trained, data_path=run_folder.data, max_steps=1, eval_every=0,
        **common,
    )  # fmt: skip
    assert run == trained / "finetune" and (run / "config.yaml").is_file()
    with pytest.raises(InputError, match="unknown option --epochz; did you mean epochs"):
        xcit_dino.finetune(epochz=1)
    with pytest.raises(InputError, match="--output_dir runs/default holds no checkpoint"):
        xcit_dino.knn(arch=ARCH, data_path=run_folder.data)


def test_exported_files_and_folders(run_folder, val_images, tmp_path):
    expected = xcit_dino.embed(val_images[:3], *xcit_dino.load(run_folder.weights, arch=ARCH))
    from xcit_dino.cli import main

    file = tmp_path / "mine.safetensors"
    assert main(["weights", "export", str(run_folder.weights), "--output", str(file)]) == 0
    np.testing.assert_allclose(xcit_dino.embed(val_images[:3], file), expected, atol=1e-5)


def test_timms_folders_and_classifiers(val_images, tmp_path):
    from xcit_dino.cli import main

    torch.manual_seed(0)
    network = xcit_dino.create_model("timm/test_resnet", num_classes=5).eval()
    torch.save({"model": network.state_dict(), "arch": "timm/test_resnet"}, tmp_path / "five.pth")
    words = ["weights", "export", tmp_path / "five.pth", "--format", "timm-hub"]
    words += ["--arch", "timm/test_resnet", "--output", tmp_path / "hub"]
    assert main([str(word) for word in words]) == 0
    for source, arch in ((tmp_path / "five.pth", "timm/test_resnet"), (tmp_path / "hub", None)):
        model, transform = xcit_dino.load(source, arch=arch, classifier=True)
        images = torch.stack([transform(image) for image in val_images[:2]])
        assert torch.allclose(model(images), network(images), atol=1e-5)
        features = xcit_dino.load(source, arch=arch)[0](images)
        expected = network.forward_head(network.forward_features(images), pre_logits=True)
        assert torch.allclose(features, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4, 3)), "array of float64"),
        (np.zeros((4, 4, 13), np.uint8), "13 channels"),
        (b"no image", "the image: cannot be decoded"),
        ("missing.jpg", "missing.jpg: No such file"),
        (None, "None is no image; give a path"),
        ((torch.zeros(3, 32, 32), 0), "is no image; give a path"),
    ],
)
def test_images_that_the_transform_cannot_take(run_folder, image, words):
    model, transform = xcit_dino.load(run_folder.weights, arch=ARCH)
    with pytest.raises(InputError, match=words):
        transform(image)
    good = np.zeros((40, 40, 3), np.uint8)
    with pytest.raises(InputError, match=f"image 2: .*{words}"):
        xcit_dino.embed([good, good, image], model, transform)


@pytest.mark.parametrize(
    ("images", "options", "words"),
    [
        (None, {}, "embed: None is no image"),
        (3, {}, "embed: 3 is no image"),
        ([], {}, "embed: no images were given"),
        (["a.jpg"], {"batch_size": 0}, "batch_size=0; give a whole number from 1"),
        (["a.jpg"], {"batch_size": -1}, "batch_size=-1; give"),
        (["a.jpg"], {"batch_size": 2.5}, "batch_size=2.5; give"),
    ],
)
def test_what_embed_cannot_take(run_folder, images, options, words):
    model, transform = xcit_dino.load(run_folder.weights, arch=ARCH)
    with pytest.raises(InputError, match=words):
        xcit_dino.embed(images, model, transform, **options)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (torch.zeros(3, 32, 32, dtype=torch.uint8), r"uint8 \[1, 3, 32, 32\]"),
        ((torch.zeros(1, 32, 32), 0), r"float32 \[1, 1, 32, 32\]"),
        (torch.zeros(32, 32), r"float32 \[1, 32, 32\]"),
        ("a.jpg", "str"),
        ({"image": torch.zeros(3, 32, 32)}, "dict"),
    ],
)
def test_loaders_without_the_transform(run_folder, item, words):
    model, _ = xcit_dino.load(run_folder.weights, arch=ARCH)
    loader = torch.utils.data.DataLoader([item])  # pyright: ignore
    with pytest.raises(InputError, match=f"the DataLoader gives {words}; its data set needs the"):
        xcit_dino.embed(loader, model)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_one_array_is_one_image(run_folder, channels):
    """Of any channels: it counts as the transform takes it, and is never split into its rows."""
    model, transform = xcit_dino.load(run_folder.weights, arch=ARCH)
    image = np.arange(48 * 32 * channels).reshape(48, 32, channels).astype(np.uint8)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    for shown in (image, tensor):
        if channels in (2, 7):
            with pytest.raises(InputError, match=f"image 0: .*has {channels} channels"):
                xcit_dino.embed(shown, model, transform)
            continue
        expected = xcit_dino.embed([shown], model, transform)
        np.testing.assert_array_equal(xcit_dino.embed(shown, model, transform), expected)
        assert xcit_dino.embed(shown[None], model, transform).shape == (1, 80)
    stack = np.zeros((5, 48, 32), np.uint8)
    with pytest.raises(InputError, match="32 channels; give .* several images are .N, H, W, C"):
        xcit_dino.embed(stack, model, transform)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("xcit_small_12_p8_dino", "give the file of its weights"),
        ("nothing/here", "no such file or folder"),
        ("timm/resnet18x", "no such model; did you mean"),
        (None, "load: None is no source; give a run folder"),
    ],
)
def test_sources_that_cannot_be_loaded(source, words):
    with pytest.raises(InputError, match=words):
        xcit_dino.load(source)


def test_no_classifier(run_folder):
    with pytest.raises(InputError, match="has no classifier; load the folder of a run of finetune"):
        xcit_dino.load(run_folder.weights, arch=ARCH, classifier=True)


@pytest.mark.parametrize("arch", ["xcit_pico_6_p16", "timm/resnet18"])
def test_another_arch_than_that_of_the_weights(run_folder, trained, arch, tmp_path):
    from xcit_dino.cli import main

    hub = tmp_path / "hub"
    torch.save({"model": xcit_dino.create_model("timm/test_resnet").state_dict()}, tmp_path / "t")
    words = ["weights", "export", tmp_path / "t", "--format", "timm-hub", "--output", hub]
    assert main([str(word) for word in [*words, "--arch", "timm/test_resnet"]]) == 0
    for source, held in ((run_folder.weights, ARCH), (trained, ARCH), (hub, "timm/test_resnet")):
        with pytest.raises(InputError, match=f"holds {held}, not arch='{arch}'; leave arch out"):
            xcit_dino.load(source, arch=arch)
        xcit_dino.load(source, arch=held)


@pytest.mark.parametrize("device", ["cuda:63", "xpu", "foo", "cpu:x"])
def test_devices_that_are_not_there(run_folder, device):
    with pytest.raises(InputError, match="torch finds none here; it has cpu"):
        xcit_dino.load(run_folder.weights, device=device)


def test_importing_the_package_imports_no_torch():
    code = "import sys, xcit_dino; xcit_dino.list_models(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.fixture
def photos(val_images, run_folder, tmp_path) -> Path:
    """Class folders of the validation images, and one of them twice."""
    folder = tmp_path / "photos"
    labels = ShardIndex.load(run_folder.data / "val").labels
    for number, (image, label) in enumerate(zip(val_images, labels, strict=True)):
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        (folder / f"class{label}" / f"{number:03d}.png").write_bytes(image)
    first = next(folder.glob("*/000.png"))
    (first.parent / "copy.png").write_bytes(val_images[0])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["find_duplicates", "few_labels", "search_by_image"])
def test_the_examples_run(name, run_folder, photos, tmp_path):
    file = tmp_path / "mine.safetensors"
    from xcit_dino.cli import main

    assert main(["weights", "export", str(run_folder.weights), "--output", str(file)]) == 0
    copy = next(photos.glob("*/copy.png"))
    words = {
        "find_duplicates": ["--least", "0.99999"],
        "few_labels": ["--labels", "2", "--draws", "2"],
        "search_by_image": [str(copy), "--most", "2"],
    }[name]
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", photos, *words, "--weights", file],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    if name == "few_labels":
        assert "k-NN: " in done.stdout and "linear: " in done.stdout
    else:
        assert "copy.png" in done.stdout and "000.png" in done.stdout
        assert done.stdout.startswith("1.000")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("few_labels {tmp}/none --weights w", "none: 0 images in 0 class folders; give two or"),
        ("few_labels {one} --weights w", "1 images in 1 class folders; give two or more classes"),
        ("few_labels {one} --weights w --draws 0", "--draws 0: must be at least 1"),
        ("few_labels {one} --weights w --labels 0", "--labels 0: must be at least 1"),
        ("find_duplicates {tmp}/none --weights w", "none: 0 images in it; give a folder of two"),
        ("find_duplicates {one} --weights w", "1 images in it; give a folder of two or more"),
        ("search_by_image {tmp}/none q.png --weights w", "none: no images in it, or no such"),
        ("search_by_image {one} q.png --weights w", "w: no such file or folder"),
        ("search_by_image {one} q.png --weights w --most 0", "--most 0: must be at least 1"),
    ],
)
def test_the_examples_refuse_bad_input(line, words, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "one" / "class"
    folder.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    name, *rest = line.format(tmp=tmp_path, one=folder.parent).split()
    file = ROOT / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(file), *rest])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and said.count("\n") == 1


@pytest.mark.slow
def test_the_page_runs(trained, photos, run_folder, tmp_path, monkeypatch):
    """The code of docs/python.md, in order, in one program; its pretraining made small."""
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 5
    code = "".join(blocks)
    small = (
        "output_dir='runs/python', epochs=1, warmup_epochs=0, batch_size_per_gpu=8, device='cpu', "
        "global_crops_size=32, local_crops_number=0, out_dim=64, num_workers=0"
    )
    for old, new in (
        ('output_dir="runs/python"', small), ("nb_knn=", "num_workers=0, device='cpu', nb_knn="),
        ("xcit_dino.LinearProbe()", "xcit_dino.LinearProbe(epochs=2)"), ("num_workers=2", ""),
    ):  # fmt: skip
        assert old in code
        code = code.replace(old, new)
    (tmp_path / "runs").mkdir()
    (tmp_path / "shards").mkdir()
    (tmp_path / "runs" / "my_run").symlink_to(trained)
    (tmp_path / "shards" / "photos").symlink_to(run_folder.data)
    (tmp_path / "photos_by_class").symlink_to(photos)
    for name, source in zip("ab", sorted(photos.glob("*/*")), strict=False):
        (photos / f"{name}.jpg").write_bytes(source.read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "(2, 80)" in done.stdout


CLASSIFIERS = [lambda: xcit_dino.KNN(k=1), lambda: xcit_dino.LinearProbe(epochs=1, lrs=(0.1,))]


@pytest.mark.parametrize("make", CLASSIFIERS)
def test_what_classifiers_cannot_take(make):
    rows, labels = np.eye(8, 4, dtype=np.float32), [0, 1] * 4
    classifier = make()
    with pytest.raises(InputError, match="knows no features yet; call fit first"):
        classifier.predict(rows)
    classifier.fit(rows, labels)
    for call, words in (
        (lambda: classifier.predict(rows[:, :3]), "of 3 dimensions, but fit was given 4"),
        (lambda: classifier.score(rows, labels[:3]), r"score: 8 rows .* shape \(3,\)"),
        (lambda: classifier.predict(rows[0]), r"shape \(4,\); give .rows, dimensions"),
        (lambda: classifier.fit([["a"]], [0]), "features are not numbers"),
        (lambda: classifier.fit(rows * np.nan, labels), "features contain NaN"),
    ):
        with pytest.raises(InputError, match=words):
            call()


@pytest.mark.parametrize("k", [0, 1.5, "3", None, True])
def test_numbers_of_neighbors(k):
    with pytest.raises(InputError, match="KNN: k=.*; give a whole number from 1"):
        xcit_dino.KNN(k=k)
    classifier = xcit_dino.KNN(k=2).fit(np.eye(4), range(4))
    if k is not None:
        with pytest.raises(InputError, match="kneighbors: k=.*; give a whole number from 1"):
            classifier.kneighbors(np.eye(4), k)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lrs": 0.1}, "LinearProbe: lrs must be .*, got 0.1"),
        ({"lrs": ()}, "lrs: give at least one"),
        ({"epochs": "many"}, "LinearProbe: epochs must be int, got 'many'"),
        ({"epochs": 0}, "epochs 0: must be from 1"),
    ],
)
def test_options_of_the_linear_probe(options, words):
    with pytest.raises(InputError, match=words):
        xcit_dino.LinearProbe(**options)


def test_temperatures():
    for temperature in (0, "x", np.nan):
        with pytest.raises(InputError, match="KNN: temperature=.*; give a number above 0"):
            xcit_dino.KNN(temperature=temperature)  # pyright: ignore
