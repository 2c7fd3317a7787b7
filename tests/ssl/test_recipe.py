"""xcit-dino recipe: its rules are plain and consistent, and what it writes trains."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.native_sets import make_set
from xcit_dino.cli import main
from xcit_dino.data.pack.demo import make
from xcit_dino.data.shards.config import DemoConfig
from xcit_dino.data.shards.describe import Description
from xcit_dino.errors import InputError
from xcit_dino.eval.online import BANK, QUERIES
from xcit_dino.models.zoo import model_spec
from xcit_dino.options import options
from xcit_dino.options import replace as with_options
from xcit_dino.ssl.config import PretrainConfig, pretrain_config
from xcit_dino.ssl.fit import misfits
from xcit_dino.ssl.recipe import recipe, speed, tables
from xcit_dino.ssl.recipe.rules import Budget, batch_size, choose, kind_of, network, prototypes

CIFAR = Description(50_000, sides=(32,) * 100, classes=10, val_images=10_000)
PHOTOS = Description(400, sides=tuple(range(200, 600, 4)))
IMAGENET = Description(1_281_167, sides=tuple(range(150, 650, 5)), classes=1000, val_images=50_000)
CPU, GPU = Budget(2, cores=2), Budget(2, device="cuda", cores=16)
SETS = {
    "cifar": CIFAR, "photos": PHOTOS, "imagenet": IMAGENET,
    "tiny": Description(3, sides=(8, 8, 9)),
    "bands": Description(2_000, sides=(64,) * 100, channels=13, dtype="uint16"),
    "boxes": Description(205, sides=(480,) * 100, targets="boxes"),
    "medium": Description(13_000, sides=(96,) * 100),
    "larger": Description(9_469, sides=(160,) * 100),
    "huge": Description(100_000_000, sides=(500,) * 100),
}  # fmt: skip
BUDGETS = {
    "minutes": Budget(0.1), "cpu": CPU, "days": Budget(100, cores=64), "gpu": GPU,
    "gpus": Budget(48, device="cuda", cores=8, gpus=8), "few": Budget(2, "cuda", most_images=8),
}  # fmt: skip


def values(data: Description, budget: Budget, **rates: float) -> dict[str, Any]:
    return {choice.option: choice.value for choice in choose(data, budget, rates)}


# -- rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("data", SETS.values(), ids=SETS)
def test_every_set_gets_options_that_fit_it(data, budget, monkeypatch):
    monkeypatch.setattr("xcit_dino.ssl.fit.describe", lambda folder: data)
    rates = {net.size: 1e7 / (n + 1) for n, net in enumerate(tables.NETWORKS)}
    choices = choose(data, budget, rates)
    assert len({choice.option for choice in choices}) == len(choices)
    config = with_options(PretrainConfig(), {choice.option: choice.value for choice in choices})
    few = config.run.batch_size_per_gpu * config.run.accum_iter * budget.gpus > data.images
    found = [line for line in misfits(config, "train", budget.gpus) if not few]
    small = data.side(0.9) < 16  # smaller than two patches of 4
    assert [line for line in found if not (small and "global_crops" in line)] == []
    assert not [line for line in config.remarks() if "warmup" in line or "freeze" in line]


def test_small_images_are_not_enlarged():
    found = values(CIFAR, CPU, pico_6=150)
    assert found["global_crops_size"] == 32 and found["arch"] == "xcit_pico_6_p8"
    assert found["blur_prob"] == [0, 0, 0] and found["local_crops_number"] == 0
    assert found["out_dim"] == 1024 and found["batch_size_per_gpu"] == 64


def test_photographs_on_a_gpu_and_on_a_cpu():
    found = values(IMAGENET, GPU, pico_6=3000, nano_12=2000, tiny_12=1200, small_12=400)
    sizes = [found[name] for name in ("global_crops_size", "local_crops_size")]
    assert sizes == [224, 96] and found["arch"] == "xcit_tiny_12_p16"
    assert found["out_dim"] == 16384
    found = values(PHOTOS, CPU, pico_6=40)
    sizes = [found[name] for name in ("global_crops_size", "local_crops_size")]
    assert sizes == [96, 48] and found["arch"] == "xcit_pico_6_p8"
    assert values(PHOTOS, replace(CPU, hours=100), pico_6=40)["global_crops_size"] == 224


def test_the_network_is_the_largest_that_pays():
    assert network(CIFAR, GPU, {}).size == "pico_6"
    assert network(CIFAR, GPU, {"pico_6": 1}).size == "pico_6"
    assert network(CIFAR, GPU, {"pico_6": 400, "nano_12": 310}).size == "nano_12"
    assert network(CIFAR, GPU, {"pico_6": 400, "nano_12": 200}).size == "pico_6"
    assert network(PHOTOS, GPU, {"pico_6": 1e6, "nano_12": 1e6}).size == "nano_12"
    assert network(IMAGENET, GPU, {"pico_6": 1e6}).size == "small_12"


def test_costs_are_those_of_the_networks():
    for net in tables.NETWORKS:
        spec = model_spec(f"xcit_{net.size}_p8")
        assert net.cost == spec.depth * spec.embed_dim**2
    assert [net.cost for net in tables.NETWORKS] == sorted(net.cost for net in tables.NETWORKS)


def test_the_length_follows_from_the_rate_and_the_hours():
    unlabeled = replace(CIFAR, classes=0)
    found = values(unlabeled, CPU, pico_6=100)
    seconds = 7200 * (1 - tables.TIME_KEPT) - tables.START_SECONDS["cpu"]
    assert found["epochs"] == int(seconds * 100 / (50_000 // 64 * 64)) == 13
    assert found["knn_every"] == 0 and found["warmup_epochs"] == 1.0
    twice = values(unlabeled, CPU, pico_6=200)
    assert twice["epochs"] == 27
    labeled = values(CIFAR, CPU, pico_6=200)  # its evaluations take a part of the time
    assert labeled["epochs"] == 26 and labeled["knn_every"] == 3
    assert values(PHOTOS, GPU, pico_6=1e5, nano_12=1e5)["epochs"] == tables.MOST_EPOCHS


def test_an_evaluation_is_what_pretraining_evaluates():
    assert tables.EVALUATED == (BANK, QUERIES)


def test_a_time_without_an_epoch_is_refused_with_one_that_suffices():
    with pytest.raises(InputError, match=r"--hours 2: one epoch of 1,281,167") as refused:
        values(IMAGENET, CPU, pico_6=30)
    hours = float(re.findall(r"take --hours ([\d.]+)", str(refused.value))[0])
    assert hours < 20
    assert values(IMAGENET, replace(CPU, hours=hours), pico_6=30)["epochs"] == 1


@pytest.mark.parametrize(
    ("images", "most", "wanted"),
    [(3000, 65536, 256), (50_000, 65536, 4096), (50_000, 1024, 1024), (1_281_167, 65536, 65536),
     (400, 65536, 64), (40, 65536, 32), (2, 65536, 2), (1, 65536, 2), (10**9, 65536, 65536)],
)  # fmt: skip
def test_prototypes(images, most, wanted):
    assert prototypes(images, most) == wanted


@pytest.mark.parametrize(
    ("images", "budget", "wanted"),
    [(50_000, CPU, 64), (400, CPU, 32), (205, CPU, 32), (10, CPU, 8), (1, CPU, 1),
     (1_281_167, GPU, 512), (1_281_167, replace(GPU, gpus=8), 1024),
     (1_281_167, replace(GPU, gpus=64), 2048), (3000, GPU, 64)],
)  # fmt: skip
def test_batch_size(images, budget, wanted):
    assert batch_size(Description(images), budget) == wanted


def test_the_learning_rate_is_given_for_256_images():
    assert values(CIFAR, CPU, pico_6=150)["lr"] == 0.006  # the quickstart's, at its batch of 64
    eight = replace(GPU, gpus=8, hours=48)
    found = values(IMAGENET, eight, pico_6=1e5, nano_12=1e5, tiny_12=1e5, small_12=5e3)
    assert found["arch"] == "xcit_small_12_p16" and found["batch_size_per_gpu"] == 128
    assert found["lr"] * 1024 / 256 == pytest.approx(0.001)  # VISSL's


def test_what_does_not_fit_into_memory_is_split():
    found = values(IMAGENET, replace(GPU, most_images=128), pico_6=1000)
    assert (found["batch_size_per_gpu"], found["accum_iter"]) == (128, 4)
    assert "accum_iter" not in values(IMAGENET, GPU, pico_6=1000)


@pytest.mark.parametrize(
    ("channels", "dtype", "kind"),
    [(3, "uint8", "photographs"), (3, "uint16", "photographs"), (1, "uint8", "grayscale"),
     (1, "uint16", "xray"), (1, "float32", "xray"), (5, "uint16", "satellite"),
     (2, "int16", "satellite")],
)  # fmt: skip
def test_kind_of_images(channels, dtype, kind):
    assert kind_of(Description(9, channels=channels, dtype=dtype)) == kind


def test_a_rate_is_of_steps(monkeypatch, tmp_path):
    """Of the second half, and of the batch."""
    make(DemoConfig(dst=tmp_path, train=40, val=1, size=16))
    now, took = [0.0], iter([9.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0])

    def step(trainer: Any, batches: Any, hyperparameters: Any) -> None:
        trainer.state.step += 1
        now[0] += next(took)

    monkeypatch.setattr(speed, "train_step", step)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    tiny = {"arch": "xcit_pico_6_p8", "global_crops_size": 16, "local_crops_number": 0}
    tiny |= {"out_dim": 8, "batch_size_per_gpu": 10, "num_workers": 0, "device": "cpu"}
    config = with_options(PretrainConfig(), tiny | {"data_path": tmp_path, "epochs": 1000})
    monkeypatch.setattr(speed, "SECONDS", 6.0)
    assert speed.images_per_second(config) == pytest.approx(10 / 2)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    make(DemoConfig(dst=folder, train=48, val=8))
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose speed is known."""
    monkeypatch.setattr(recipe, "images_per_second", lambda config: 64.0)


def test_a_recipe_is_printed_with_reasons_and_read_by_pretrain(shards, tmp_path, quick, capsys):
    out = tmp_path / "new" / "mine.yaml"
    assert main(["recipe", str(shards), str(out), "--hours", "0.1", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "48 images, shorter sides of 32 pixels, 3 channels of uint8, 12 classes" in printed
    assert "measuring xcit_pico_6_p8 ... 64 images/s" in printed
    assert re.search(r"^epochs +6\d\d +.* at 64 images/s$", printed, re.MULTILINE)
    config = pretrain_config(["--config", str(out)])
    assert config.run.device == "cpu" and config.loader.data_path == str(shards)
    assert config.model.arch == "xcit_pico_6_p8" and not config.remarks()
    assert not misfits(config, str(shards / "train"))
    text = out.read_text()
    start = f"# xcit-dino pretrain --config {out} --output_dir runs/mine"
    assert start in text and printed.rstrip().endswith(start[2:])
    for line in text.splitlines():
        assert not line or line.startswith("#") or re.search(r"# \[(\w+)\]", line), line
    for tag in set(re.findall(r"# \[(\w+)\]", text)):
        assert f"[{tag}]" in text.partition("arch:")[0]


def test_an_existing_file_is_kept(shards, tmp_path, quick, capsys):
    out = tmp_path / "mine.yaml"
    out.write_text("mine")
    assert main(["recipe", str(shards), str(out)]) == 2
    assert f"{out}: exists, and is not overwritten; give another name" in capsys.readouterr().err
    assert out.read_text() == "mine"
    other = tmp_path / "other.yaml"
    assert main(["recipe", str(shards), str(other), "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{shards}", "{out}", "--hours", "0"], "--hours 0.0: must be from"),
        (["{shards}", "{out}", "--gpus", "2", "--device", "cpu"], "--gpus 2: .* leave it out"),
        (["{out}", "{out}"], "no train shards there; make them with"),
        (["{shards}", "{shards}/train"], "exists, and is not overwritten"),
        (["{shards}", "{shards}/train/index.json/x"], "cannot be written to"),
        (["{shards}"], "OUT is missing"),
        (["{shards}", "{out}", "--precision", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
    ],
)
def test_bad_input_is_refused_in_one_line(words, message, shards, tmp_path, capsys):
    out = tmp_path / "mine.yaml"
    words = [word.format(shards=shards, out=out) for word in words]
    assert main(["recipe", *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error) and not out.exists()


def test_too_little_time_is_refused_and_nothing_written(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "images_per_second", lambda config: 0.5)
    out = tmp_path / "mine.yaml"
    words = ["recipe", str(shards), str(out), "--device", "cpu", "--hours"]
    assert main([*words, "0.02"]) == 2 and not out.exists()
    hours = re.findall(r"take --hours ([\d.]+)", capsys.readouterr().err)[0]
    assert main([*words, hours]) == 0 and out.exists()


def test_images_that_cannot_be_read_are_refused(tmp_path, capsys):
    make(DemoConfig(dst=tmp_path, train=3, val=1))
    for tar in (tmp_path / "train").glob("*.tar"):
        tar.unlink()
    assert main(["recipe", str(tmp_path), str(tmp_path / "mine.yaml")]) == 2
    assert "of no image the size can be read" in capsys.readouterr().err


def test_memory_that_does_not_suffice_is_met_with_smaller_batches(
    shards, tmp_path, monkeypatch, capsys
):
    def rate(config: PretrainConfig) -> float:
        if config.run.batch_size_per_gpu > most[0]:
            raise torch.OutOfMemoryError
        return 64.0

    most = [4]
    monkeypatch.setattr(recipe, "images_per_second", rate)
    out = tmp_path / "mine.yaml"
    assert main(["recipe", str(shards), str(out), "--device", "cpu"]) == 0
    config = pretrain_config(["--config", str(out)])
    assert (config.run.batch_size_per_gpu, config.run.accum_iter) == (4, 8)
    most[0] = 0
    assert main(["recipe", str(shards), str(tmp_path / "other.yaml"), "--device", "cpu"]) == 2
    assert "not one image of xcit_pico_6_p8 fits" in capsys.readouterr().err


def test_larger_networks_are_measured_as_long_as_they_seem_to_pay(
    shards, tmp_path, monkeypatch, capsys
):
    speeds = {"xcit_pico_6_p8": 1e6, "xcit_nano_12_p8": 100.0}
    monkeypatch.setattr(recipe, "images_per_second", lambda config: speeds[config.model.arch])
    out = tmp_path / "mine.yaml"
    assert main(["recipe", str(shards), str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"measuring (\S+)", printed) == list(speeds)
    assert pretrain_config(["--config", str(out)]).model.arch == "xcit_pico_6_p8"  # nano is slow


@pytest.mark.parametrize(
    ("channels", "dtype", "kind", "recipe_of"),
    [(5, "uint16", "auto", "satellite"), (5, "uint16", "microscopy", "microscopy"),
     (1, "uint16", "auto", "xray"), (1, "uint8", "auto", "grayscale"),
     (1, "uint16", "microscopy", "microscopy")],
)  # fmt: skip
def test_other_images_get_the_augmentation_of_their_kind(
    channels, dtype, kind, recipe_of, tmp_path, quick
):
    shards = make_set(tmp_path / "set", channels, dtype, train=16, val=4, size=32)
    out = tmp_path / "mine.yaml"
    assert main(["recipe", str(shards), str(out), "--device", "cpu", "--kind", kind]) == 0
    config = pretrain_config(["--config", str(out)])
    theirs = pretrain_config(["--config", f"configs/images/{recipe_of}.yaml"])
    same = dict(options(config.augment)) | {"blur_prob": 0, "channel_drop_prob": 0}
    assert same == dict(options(theirs.augment)) | {"blur_prob": 0, "channel_drop_prob": 0}
    assert config.augment.blur_prob == (0, 0, 0)  # images of 32 pixels
    assert not config.augment.without_meaning(channels)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [3, 5])
def test_what_is_written_trains(channels, tmp_path, monkeypatch, capsys):
    """With the speed measured, and the first steps of the run trained."""
    monkeypatch.setattr(speed, "SECONDS", 0.2)
    monkeypatch.chdir(tmp_path)
    make_set(tmp_path / "shards", channels, "uint16", train=48, val=8, size=32)
    words = ["shards", "mine.yaml", "--hours", "1", "--device", "cpu", "--num_workers", "0"]
    assert main(["recipe", *words]) == 0
    run = ["--output_dir", "runs/mine", "--max_steps", "2", "--knn_every", "1"]
    assert main(["pretrain", "--config", "mine.yaml", *run]) == 0
    assert "WARNING: --" not in capsys.readouterr().err
    assert list(Path("runs/mine/checkpoints").glob("checkpoint-00000002.pth"))
