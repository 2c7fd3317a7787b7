"""Images are prepared as in the network's training, by every command; broken weights."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from tests.eval.test_features import ONE
from xcit_dino.cli import main
from xcit_dino.data.io.storage import shards_at
from xcit_dino.data.pixels import RGB8
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError
from xcit_dino.eval import evaluate, knn
from xcit_dino.eval.config import EvaluateConfig, KnnConfig
from xcit_dino.eval.features import load_features
from xcit_dino.eval.online import OnlineKnn, online_knn
from xcit_dino.eval.target import pretrained, resolve
from xcit_dino.inputs import InputSettings
from xcit_dino.models.weights import formats
from xcit_dino.models.weights.load import input_settings
from xcit_dino.models.zoo import create_model
from xcit_dino.options import replace
from xcit_dino.supervised.config import FinetuneConfig
from xcit_dino.supervised.trainer import with_input_settings

ARCH = "xcit_pico_6_p8"
MEAN, STD = [0.2, 0.5, 0.7], [0.5, 0.3, 0.4]


def pictures(index: ShardIndex) -> list[Image.Image]:
    """Decoded by Pillow."""
    found = []
    for number in range(index.num_samples):
        shard, offset, size = index.locate(number)
        data = Path(index.path(shard)).read_bytes()[offset : offset + size]
        found.append(Image.open(io.BytesIO(data)).convert("RGB"))
    return found


def plain(index: ShardIndex, mean: list[float], std: list[float]) -> torch.Tensor:
    """Pixels [n, 3, H, W], normalized by hand."""
    pixels = np.stack([np.asarray(picture) for picture in pictures(index)]) / 255
    return torch.from_numpy((pixels - mean) / std).permute(0, 3, 1, 2).float()


def own_statistics(run_folder) -> None:
    """As if the run had been given ``--mean`` and ``--std``."""
    path = run_folder.path / "config.yaml"
    path.write_text(f"{path.read_text()}mean: {MEAN}\nstd: {STD}\n")


def test_timms_networks_see_what_timm_shows_them(run_folder, tmp_path):
    """Size, crop, interpolation, mean and std, against timm's own transforms on Pillow images."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=12).eval()
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    own = resolve_data_config(model=model)
    assert own["mean"] == (0.5, 0.5, 0.5) and own["input_size"][-1] == 160
    config = run_folder.target(arch="timm/test_resnet", pretrained_weights=tmp_path / "theirs.pth")
    target, context = resolve(config, ONE)
    index = context.index("val")
    found = load_features(pretrained(target), index, "val", context).blocks["cls"]
    transform = create_transform(**own)
    images = torch.stack([transform(picture) for picture in pictures(index)])
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    assert np.abs(found - expected.numpy()).max() < 0.02 * expected.abs().max()
    evaluate.run(EvaluateConfig(config))
    protocol = json.loads((run_folder.path / "results.json").read_text())["evaluate"]["protocol"]
    assert protocol["mean"] == [0.5, 0.5, 0.5] and protocol["crop"] == 160
    assert protocol["resize"] == int(160 / own["crop_pct"])
    assert protocol["interpolation"] == own["interpolation"] == "bilinear"


def test_a_runs_own_mean_and_std_are_used(run_folder):
    own_statistics(run_folder)
    target, context = resolve(run_folder.target(), ONE)
    index, network = context.index("val"), pretrained(target)
    with torch.no_grad():
        expected = network.model(plain(index, MEAN, STD))
    found = load_features(network, index, "val", context)
    np.testing.assert_allclose(found.blocks["cls"], expected, atol=1e-4)
    online = online_knn(run_folder.data, {"global_crops_size": 32, "mean": MEAN, "std": STD}, ONE)
    assert isinstance(online, OnlineKnn)
    assert online.context.protocol == context.protocol


def test_options_win_and_other_weights_do_not_take_the_runs_settings(run_folder, tmp_path):
    own_statistics(run_folder)
    given = run_folder.target(mean=(0.5, 0.5, 0.5), interpolation="bilinear", crop_size=24)
    _, context = resolve(given, ONE)
    assert context.inputs.mean == (0.5, 0.5, 0.5) and list(context.inputs.std) == STD
    assert (context.inputs.interpolation, context.crop) == ("bilinear", 24)
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    other = {"arch": "timm/test_resnet", "pretrained_weights": tmp_path / "other.pth"}
    _, context = resolve(run_folder.target(**other), ONE)
    assert context.inputs.mean == (0.5, 0.5, 0.5) and context.crop == 160


def test_finetuning_normalizes_as_its_start_was_trained(run_folder, tmp_path):
    config = replace(FinetuneConfig(), {"arch": ARCH, "output_dir": tmp_path / "fresh"})
    assert with_input_settings(config, RGB8).regularization.normalization[0] == (
        0.485,
        0.456,
        0.406,
    )
    trained = torch.load(run_folder.weights) | {
        "config": f"global_crops_size: 32\nmean: {MEAN}\nstd: {STD}\n"
    }
    torch.save(trained, tmp_path / "start.pth")
    config = replace(config, {"pretrained_weights": tmp_path / "start.pth"})
    found = with_input_settings(config, RGB8).regularization.normalization
    assert [list(values) for values in found] == [MEAN, STD]


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_an_extracted_file_carries_its_settings(ending, run_folder, tmp_path, capsys):
    """A student of 32 px, taken out of its run and evaluated in a fresh folder."""
    backbone = create_model(ARCH).state_dict()
    options = f"arch: {ARCH}\ninput_size: 32\nmean: {MEAN}\nstd: {STD}\neval_crop_ratio: 1.0\n"
    torch.save({"model": backbone, "config": options}, tmp_path / "checkpoint.pth")
    words = ["--prefix", "model", "--remove_prefix", "--output", f"{tmp_path}/student.{ending}"]
    assert main(["weights", "extract", f"{tmp_path}/checkpoint.pth", *words]) == 0
    words = [f"{tmp_path}/student.{ending}", "--output", f"{tmp_path}/again.{ending}"]
    assert main(["weights", "convert", *words]) == 0
    expected = InputSettings(32, 1.0, mean=tuple(MEAN), std=tuple(STD))
    for name in ("student", "again"):
        file = tmp_path / f"{name}.{ending}"
        assert input_settings(file) == expected
        create_model(ARCH).load_state_dict(formats.read(file))  # as with any other file
        fresh = run_folder.target(
            output_dir=tmp_path / "fresh", arch=ARCH, data_path=str(run_folder.data),
            pretrained_weights=file,
        )  # fmt: skip
        _, context = resolve(fresh, ONE)
        assert (context.resize, context.crop, list(context.inputs.mean)) == (32, 32, MEAN)
        context.index("val")
    assert "enlarged" not in capsys.readouterr().out
    bare = dataclasses.replace(context, resize=256, crop=224)
    bare.index("val")
    assert "are upsampled 8 times, to 256 px" in (said := capsys.readouterr().out)
    assert "--crop_size 32 keeps their size" in said


@pytest.fixture
def broken(run_folder, tmp_path) -> Path:
    """Whole pretraining weights with one NaN in each network."""
    state = torch.load(run_folder.weights)
    for network in state.values():
        network["backbone.norm.weight"][3] = torch.nan
        network["head.mlp.0.bias"] = torch.zeros(1)
    torch.save(state | {"loss": {"center": torch.zeros(4)}}, tmp_path / "broken.pth")
    return tmp_path / "broken.pth"


def test_weights_that_are_not_finite_are_refused_everywhere(run_folder, broken, tmp_path, capsys):
    out = tmp_path / "out"
    common = ["--output_dir", out, "--device", "cpu", "--num_workers", "0"]
    common += ["--arch", ARCH, "--data_path", run_folder.data]
    weights = ["--pretrained_weights", broken]
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    head = tmp_path / "head.pth"
    torch.save({"weight": torch.full((12, 80), torch.inf), "bias": torch.zeros(12)}, head)
    teacher = ["--teacher_model", ARCH, "--teacher_path", broken, "--input_size", "32"]
    photo = ["attention", tmp_path / "photo.png", out, "--output_dir", out, "--arch", ARCH]
    training = ["--batch_size_per_gpu", "4", "--global_crops_size", "32", "--out_dim", "4"]
    commands = {
        "knn": ["knn", *common, *weights],
        "linear": ["linear", *common, *weights],
        "evaluate": ["evaluate", *common, *weights],
        "head": ["evaluate", *common, "--pretrained_weights", run_folder.weights, "--head", head],
        "embed": ["embed", *common, *weights],
        "attention": [*photo, "--device", "cpu", *weights],
        "finetune": ["finetune", *common, *weights, "--input_size", "32"],
        "distill": ["distill", *common, *teacher],
        "init_from": ["pretrain", *common, *training, "--init_from", broken],
        "export": ["weights", "export", broken, "--output", tmp_path / "a.safetensors"],
        "convert": ["weights", "convert", broken, "--output", tmp_path / "b.pth"],
        "extract": ["weights", "extract", broken, "--prefix", "teacher", "--output",
                    tmp_path / "c.pth"],
    }  # fmt: skip
    for name, words in commands.items():
        assert main(list(map(str, words))) == 2, name
        said = capsys.readouterr().err.splitlines()[-1]
        assert "NaN or infinite" in said and ("head.pth" if name == "head" else "broken") in said
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    assert not (out / "results.json").exists() and not list(tmp_path.glob("[abc].*"))


def test_features_that_are_all_equal_are_pointed_out(run_folder, tmp_path, capsys):
    """By a last norm of zeros; from the cache too."""
    state = torch.load(run_folder.weights)
    for name in ("weight", "bias"):
        state["teacher"][f"backbone.norm.{name}"].fill_(0.25 * (name == "bias"))
    torch.save(state, tmp_path / "flat.pth")
    config = KnnConfig(run_folder.target(pretrained_weights=tmp_path / "flat.pth"), (5,))
    for _ in range(2):
        knn.run(config)
        assert "train features (pretrained) are the same for all" in capsys.readouterr().err
    knn.run(KnnConfig(run_folder.target(), (5,)))
    assert "the same for all" not in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["{split}", "train"])
def test_shards_that_lie_elsewhere_are_found_as_in_training(
    ending, run_folder, tmp_path, monkeypatch
):
    knn.run(KnnConfig(run_folder.target(), (5,)))
    here, there = tmp_path / "index", tmp_path / "store"
    for split in ("train", "val"):
        shutil.copytree(run_folder.data / split, here / split)
        (there / split).mkdir(parents=True)
        for tar in (here / split).glob("*.tar"):
            tar.rename(there / split / tar.name)
    before = json.loads((run_folder.path / "results.json").read_text())["knn"]["metrics"]
    shutil.rmtree(run_folder.path / "features")
    path = run_folder.path / "config.yaml"
    text = path.read_text().replace(str(run_folder.data), str(here))
    path.write_text(f"{text}shard_url: file://{there}/{ending}\nmax_bad_fraction: 0.25\n")
    knn.run(KnnConfig(run_folder.target(), (5,)))
    assert json.loads((run_folder.path / "results.json").read_text())["knn"]["metrics"] == before
    _, context = resolve(run_folder.target(max_bad_fraction=0.5), ONE)
    assert context.loader.max_bad_fraction == 0.5
    assert resolve(run_folder.target(), ONE)[1].loader.max_bad_fraction == 0.25
    monkeypatch.chdir(tmp_path)
    other = run_folder.target(data_path=str(run_folder.data))  # not the run's
    assert resolve(other, ONE)[1].loader.shard_url is None
    assert resolve(run_folder.target(data_path="index"), ONE)[1].loader.shard_url


def test_where_val_lies_is_not_guessed(run_folder, tmp_path):
    index = ShardIndex.load(run_folder.data / "val")
    assert shards_at(index, "s3://x/everything") is None, "beside the index"
    gone = dataclasses.replace(index, root=str(tmp_path / "val"))
    with pytest.raises(InputError, match="--shard_url s3://x/everything.*write {split}"):
        shards_at(gone, "s3://x/everything")
    assert shards_at(gone, "s3://x/{split}/a") == "s3://x/val/a"
    assert shards_at(gone, "pipe:get s3://x/{split}/{shard}") == "pipe:get s3://x/val/{shard}"
