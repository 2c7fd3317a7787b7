"""Recipes: one for every model and kind of images, each readable, and each the run its comments
say."""

import pytest

from tests.native_sets import make_set
from tests.victims import TINY
from xcit_dino.errors import InputError
from xcit_dino.models.zoo import list_models
from xcit_dino.options import read_yaml, replace
from xcit_dino.slurm.stages import launch_config
from xcit_dino.ssl.config import PretrainConfig, pretrain_config, recipe_path
from xcit_dino.ssl.pretrain import pretrain
from xcit_dino.supervised.detect.config import detect_config
from xcit_dino.supervised.segment.config import segment_config
from xcit_dino.train.config import CONFIGS

RECIPES = sorted((CONFIGS / "pretrain").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_reads_and_names_every_source(path):
    values = read_yaml(path)
    config = replace(PretrainConfig(), values, source=str(path))
    if path.stem.startswith("xcit_"):
        assert config.model.arch == path.stem
    if path.stem != "default":
        for line in path.read_text().splitlines():
            if line and not line.startswith(("#", "arch:")):
                assert "[dino]" in line or "[vissl]" in line or "[ours]" in line, line


CONTINUED = sorted((CONFIGS / "continue").glob("*.yaml"))
SOURCES = ("[dino]", "[dinov2]", "[dinov2#204]", "[vissl]", "[ours]")


@pytest.mark.parametrize("path", CONTINUED, ids=lambda p: p.stem)
def test_a_recipe_for_continuing_is_gentler_than_dinos_and_names_every_source(path):
    config = pretrain_config(["--config", str(path), "--init_from", "timm/resnet18"])
    usual = PretrainConfig()
    assert config.model.arch == "timm/resnet18" and not config.remarks()
    assert config.optim.lr <= usual.optim.lr / 10 and config.optim.layer_decay < 1
    assert config.dino.momentum_teacher > usual.dino.momentum_teacher
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            assert any(source in line for source in SOURCES), line


DISTILLED = sorted((CONFIGS / "distill_ssl").glob("*.yaml"))


@pytest.mark.parametrize("path", DISTILLED, ids=lambda p: p.stem)
def test_a_recipe_for_distillation_names_no_teacher_and_every_source(path):
    """A teacher is the user's choice; without one the recipe is refused in a line."""
    with pytest.raises(InputError, match="--objective distill: names no teacher"):
        pretrain_config(["--config", str(path)])
    config = pretrain_config(["--config", str(path), "--teacher_model", "timm/resnet18"])
    assert config.objective.objective == "distill" and not config.remarks()
    for line in path.read_text().splitlines():
        if line and not line.startswith(("#", "objective:")):
            assert any(source in line for source in ("[dino]", "[deit]", "[ours]")), line


TASKS = sorted([*(CONFIGS / "segment").glob("*.yaml"), *(CONFIGS / "detect").glob("*.yaml")])


@pytest.mark.parametrize("path", TASKS, ids=lambda p: p.stem)
def test_a_recipe_for_masks_or_boxes_is_taken_and_names_every_source(path):
    task, arch = path.parent.name, "xcit_" + path.stem.partition("xcit_")[2]
    make = {"segment": segment_config, "detect": detect_config}[task]
    config = make(["--config", str(path), "--batch_size_per_gpu", "1"])
    assert config.model.arch == arch and not config.remarks()
    assert not config.ineffective().keys() & read_yaml(path).keys()
    assert config.run.batch_size_per_gpu == 1 and make(["--config", str(path)]).run.seed == 0
    words = ["--stages", f"pretrain,{task}", "--arch", arch, "--data_path", "shards/mine"]
    launch = launch_config([*words, f"--{task}.config", str(path), f"--{task}.epochs", "3"])
    (stage,) = (stage for stage in launch.stages if stage.name == task)
    assert stage.config.run.epochs == 3 and stage.config.optim == config.optim
    assert stage.config.model.drop_path_rate == config.model.drop_path_rate
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            assert "[xcit]" in line or "[ours]" in line, line


def test_published_models_have_recipes_for_masks_and_boxes():
    sizes = ("tiny_12", "small_12", "small_24", "medium_24")
    for size in (f"xcit_{size}_p{patch}" for size in sizes for patch in (8, 16)):
        for name in (f"segment/fpn_{size}", f"segment/upernet_{size}", f"detect/mask_rcnn_{size}"):
            assert (CONFIGS / f"{name}.yaml") in TASKS


@pytest.mark.parametrize("name", list_models())
def test_every_model_has_a_recipe(name):
    assert pretrain_config(["--arch", name]).model.arch == name
    if "pico" not in name:
        assert recipe_path(name).stem == name


@pytest.mark.parametrize("spelling", ["xcit_small_12_p8_224", "xcit_small_12_p8_384_dist"])
def test_published_spellings_pick_the_same_recipe(spelling):
    assert recipe_path(spelling).stem == "xcit_small_12_p8"


def test_the_default_recipe_is_dinos_defaults():
    assert pretrain_config(["--arch", "timm/resnet50"]) == replace(
        PretrainConfig(), {"arch": "timm/resnet50"}
    )


def test_vissl_recipes_follow_its_linear_rule():
    """Peak learning rates of VISSL's files: 0.00025 x batch / 256, to rounding."""
    for name, batch, peak in (
        ("small_12_p16", 1024, 0.001),
        ("medium_24_p8", 960, 0.0009375),
        ("large_24_p16", 1120, 0.00109),
        ("large_24_p8", 512, 0.0005),
    ):
        lr = pretrain_config(["--arch", f"xcit_{name}"]).optim.lr
        assert lr * batch / 256 == pytest.approx(peak, rel=5e-3)


KINDS = {  # recipe -> a set that it is for
    "satellite": (13, "uint16"), "microscopy": (4, "uint16"), "xray": (1, "uint16"),
    "grayscale": (1, "uint8"),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_recipe_for_a_kind_of_images_names_every_source_and_trains(name, tmp_path, capsys):
    path = CONFIGS / "images" / f"{name}.yaml"
    config = pretrain_config(["--config", str(path)])
    assert not config.remarks()
    sources = ("[dino]", "[vissl]", "[ssl4eo]", "[celldino]", "[ours]")
    for line in path.read_text().splitlines():
        assert not line or line.startswith("#") or any(source in line for source in sources), line
    small = TINY | {"data_path": make_set(tmp_path / "set", *KINDS[name], train=8, val=4)}
    small |= {"output_dir": tmp_path / "run", "max_steps": 1, "warmup_teacher_temp_epochs": 0}
    pretrain(replace(config, small))
    assert "are off" not in capsys.readouterr().out  # it asks for nothing without meaning here
