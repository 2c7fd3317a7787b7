"""Warnings about options that do not fit the data: each where it is due, and only there."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from tests.native_sets import make_set
from tests.victims import TINY
from xcit_dino.data.pack.demo import make
from xcit_dino.data.shards.config import DemoConfig
from xcit_dino.data.shards.describe import Description, describe, shorter_side
from xcit_dino.options import replace
from xcit_dino.slurm.stages import launch_config
from xcit_dino.slurm.tools.dry_run import preview
from xcit_dino.ssl.config import PretrainConfig, pretrain_config
from xcit_dino.ssl.fit import misfits
from xcit_dino.ssl.pretrain import pretrain
from xcit_dino.train.config import CONFIGS

FITTING = {
    "arch": "xcit_pico_6_p4", "global_crops_size": 32, "local_crops_number": 0, "out_dim": 64,
    "batch_size_per_gpu": 10, "epochs": 10, "warmup_epochs": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 images of 32 pixels in 12 classes."""
    folder = tmp_path_factory.mktemp("fit")
    make(DemoConfig(dst=folder, train=100, val=10))
    return folder


def lines(shards: Path, processes: int = 1, **options: Any) -> list[str]:
    config = replace(PretrainConfig(), FITTING | options)
    return misfits(config, str(shards / "train"), processes)


def test_options_that_fit_are_silent(shards):
    assert lines(shards) == []


@pytest.mark.parametrize(
    ("due", "words", "not_due"),
    [
        ({"global_crops_size": 48}, "--global_crops_size 48: nearly all .* at most 32 pixels",
         {"global_crops_size": 40}),
        ({"stage_scales": (1.0, 2.0), "stage_shares": (0.5, 0.5)}, "--global_crops_size 64: nearly",
         {"stage_scales": (0.5, 1.0), "stage_shares": (0.5, 0.5)}),
        ({"out_dim": 128}, r"--out_dim 128: more prototypes than images \(100\); take --out_dim 64",
         {"out_dim": 100}),
        ({"out_dim": 128}, "--out_dim 128",
         {"out_dim": 128, "objective": "distill", "teacher_model": "xcit_pico_6_p4"}),
        ({"warmup_epochs": 3.4}, "--warmup_epochs 3.4 with --epochs 10: .* 34% of the run; .*"
         "--warmup_epochs 1", {"warmup_epochs": 3.3}),
        ({"batch_size_per_gpu": 64, "accum_iter": 2}, r"fewer images \(100\) than .* of 128",
         {"batch_size_per_gpu": 50, "accum_iter": 2}),
        ({"global_crops_size": 8}, "--global_crops_size 8: 2 x 2 patches of 4 pixels .*"
         "--global_crops_size 32", {"global_crops_size": 12}),
        ({"local_crops_number": 1, "local_crops_size": 36}, "--local_crops_size 36: larger than "
         "--global_crops_size 32; take --local_crops_size 32",
         {"local_crops_number": 0, "local_crops_size": 36}),
    ],
)  # fmt: skip
def test_an_option_that_does_not_fit_is_one_line(due, words, not_due, shards):
    (line,) = lines(shards, **due)
    assert re.search(words, line) and "\n" not in line
    assert lines(shards, **not_due) == []


def test_a_global_batch_counts_all_processes(shards):
    assert lines(shards, batch_size_per_gpu=50, processes=2) == []
    assert "global batch of 150" in lines(shards, batch_size_per_gpu=50, processes=3)[0]


def test_data_that_cannot_be_read_from_here_are_not_spoken_of(shards, tmp_path):
    config = replace(PretrainConfig(), FITTING | {"out_dim": 128})
    assert misfits(config, str(tmp_path / "nowhere")) == []
    assert misfits(config, "s3://bucket/shards") == []
    (tmp_path / "index.json").write_text("{}")
    assert misfits(config, str(tmp_path)) == []


def test_a_run_and_a_dry_run_print_the_same_lines(shards, tmp_path, capsys):
    options = TINY | {"data_path": shards, "output_dir": tmp_path / "run", "global_crops_size": 64}
    options |= {"max_steps": 1, "out_dim": 128, "knn_every": 0}
    pretrain(replace(PretrainConfig(), options))
    printed = capsys.readouterr().err.splitlines()
    warned = [line.removeprefix("WARNING: ") for line in printed if line.startswith("WARNING")]
    assert [line.split(":")[0] for line in warned] == ["--out_dim 128", "--global_crops_size 64"]
    words = [f"--{name}={value}" for name, value in options.items() if name != "knn_every"]
    preview(launch_config([*words, "--knn_every=0", "--ngpus=0"]), "local")
    printed = capsys.readouterr().out.splitlines()
    assert [line[7:].strip() for line in printed if line.startswith("WARNING")] == warned


@pytest.mark.parametrize("name", ["pretrain/quickstart", "pretrain/xcit_pico_6_p4", "rehearsal"])
def test_our_own_recipes_are_silent_on_the_built_in_images(name, monkeypatch):
    demo = Description(DemoConfig.train, sides=(DemoConfig.size,) * 100)
    monkeypatch.setattr("xcit_dino.ssl.fit.describe", lambda folder: demo)
    config = pretrain_config(["--config", str(CONFIGS / f"{name}.yaml")])
    assert misfits(config, "shards/demo/train", processes=2) == []


@pytest.mark.parametrize("path", sorted((CONFIGS / "pretrain").glob("*_p16.yaml")), ids=str)
def test_published_recipes_are_silent_on_imagenet(path, monkeypatch):
    imagenet = Description(1_281_167, sides=tuple(sorted(range(150, 650, 5))), classes=1000)
    monkeypatch.setattr("xcit_dino.ssl.fit.describe", lambda folder: imagenet)
    assert misfits(pretrain_config(["--config", str(path)]), "shards/train", processes=16) == []


def test_a_set_is_described_as_its_index_and_its_images_have_it(shards, tmp_path):
    found = describe(shards / "train")
    assert (found.images, found.channels, found.dtype, found.classes) == (100, 3, "uint8", 12)
    assert set(found.sides) == {32} and len(found.sides) == 100
    assert found.text.startswith("100 images, shorter sides of 32 pixels, 3 channels of uint8")
    found = describe(make_set(tmp_path, 5, "uint16", train=8, val=4, size=24) / "train")
    assert (found.images, found.channels, found.dtype, found.classes) == (8, 5, "uint16", 4)
    assert set(found.sides) == {24}


def test_shares_of_the_sides():
    data = Description(5, sides=(10, 20, 30, 40, 1000))
    assert [data.side(share) for share in (0, 0.5, 0.9, 1)] == [10, 30, 1000, 1000]
    assert "shorter sides of 30 pixels (80 % between 10 and 1000)" in data.text


def test_the_shorter_side_of_every_kind_of_file():
    pixels = np.zeros((20, 30, 3), np.uint8)
    assert shorter_side(simplejpeg.encode_jpeg(pixels)) == 20
    for form in ("PNG", "TIFF", "WEBP"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, form)
        assert shorter_side(file.getvalue()) == 20
    file = io.BytesIO()
    np.save(file, np.zeros((9, 7, 13), np.uint16))
    assert shorter_side(file.getvalue()) == 7
    assert shorter_side(b"") == shorter_side(b"no image") == 0
