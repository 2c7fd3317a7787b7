"""Distillation without labels: targets and loss against plain ones, whole runs, refusals."""

import pytest
import timm
import torch
import torch.nn.functional as F

from bench.reference import plain_distillation_loss
from tests import victims
from xcit_dino.data.config import CropsConfig
from xcit_dino.inputs import IMAGENET_MEAN, IMAGENET_STD, InputSettings
from xcit_dino.models.tokens import Tokens, tokens_of, widths_of
from xcit_dino.models.zoo import create_model
from xcit_dino.options import replace
from xcit_dino.ssl.config import ObjectiveConfig, PretrainConfig
from xcit_dino.ssl.distillation import distillation_loss, frozen_teacher, standardize
from xcit_dino.ssl.pretrain import pretrain
from xcit_dino.train.state import load_checkpoint, newest_checkpoint

BOTH = pytest.mark.parametrize("objective", ["distill", "dino+distill"])


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """Weights of another architecture, with a classifier that nobody needs."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"model": create_model("xcit_pico_6_p4", num_classes=5).state_dict()}, path)
    return path


def tiny(shards, folder, teacher_file, **options) -> PretrainConfig:
    values = victims.TINY | {"data_path": shards, "output_dir": folder, "epochs": 2}
    values |= {"objective": "distill", "teacher_model": "xcit_pico_6_p4"}
    return replace(PretrainConfig(), values | {"teacher_path": teacher_file} | options)


# -- whole runs


@BOTH
def test_a_run_resumes_bit_for_bit(objective, shards, teacher_file, tmp_path):
    for folder, stops in (("whole", [0]), ("cut", [3, 7, 0])):
        for stop in stops:
            options = {"objective": objective, "max_steps": stop}
            pretrain(tiny(shards, tmp_path / folder, teacher_file, **options))
    victims.assert_nothing_lost(tmp_path / "cut", tmp_path / "whole")
    state = load_checkpoint(newest_checkpoint(tmp_path / "whole"))
    heads = {name.split(".")[0] for name in state["student"]}
    assert heads == {"backbone", "projector"} | ({"head"} if objective != "distill" else set())
    assert ("loss" in state) == (objective != "distill")
    assert {name.split(".")[0] for name in state["teacher"]} == heads - {"projector"}
    lines = victims.lines(tmp_path / "whole")
    assert ("teacher_entropy" in lines[0]) == ("dino_loss" in lines[0]) == ("loss" in state)
    assert "feature_std" in lines[0]


# -- targets and loss


def test_the_loss_is_the_plain_one_value_and_gradients():
    torch.manual_seed(0)
    grids, predicted, targets = [(4, 2), (2, 3)], [], []  # views: two large ones, three small ones
    for (side, teacher_side), views in zip(grids, (2, 3), strict=True):
        ours = torch.randn(views * 2, 8).double(), torch.randn(views * 2, side, side, 6).double()
        predicted.append(tuple(each.requires_grad_() for each in ours))
        targets.append((
            3 * torch.randn(views * 2, 8).double(),
            5 + torch.randn(views * 2, teacher_side, teacher_side, 6).double(),
        ))  # fmt: skip
    fixed = [Tokens(*(standardize(each) for each in group)) for group in targets]
    found = distillation_loss([Tokens(*each) for each in predicted], fixed, 0.7, num_rows=10)
    want = plain_distillation_loss(
        [tuple(t.split(2)[v] for t in g) for g in predicted for v in range(len(g[0]) // 2)],
        [tuple(t.split(2)[v] for t in g) for g in targets for v in range(len(g[0]) // 2)],
        0.7,
    )  # fmt: skip
    torch.testing.assert_close(found, want.float(), rtol=1e-5, atol=1e-6)
    leaves = [each for group in predicted for each in group]
    for ours, plain in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-7)


def teacher_for(name, path, **options):
    crops = CropsConfig(global_crops_size=32, local_crops_size=16)
    config = ObjectiveConfig("distill", name, path, **options)
    return frozen_teacher(config, crops, InputSettings(), torch.float32)


def test_the_teacher_sees_every_crop_in_its_own_mean_and_size(tmp_path):
    """A convolutional network of timm's, whose grid has a cell of 32 pixels."""
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0", num_classes=3).eval()
    torch.save(network.state_dict(), tmp_path / "teacher.pth")
    teacher, facts = teacher_for(
        "timm/tf_efficientnet_lite0", tmp_path / "teacher.pth", teacher_size=64
    )
    assert [teacher.size_for(side) for side in (32, 16)] == [64, 32]
    pixels = torch.rand(4, 3, 32, 32)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    images = F.interpolate(2 * pixels - 1, (64, 64), mode="bicubic", antialias=True)
    with torch.no_grad():
        grid = network.forward_features(images)
    found = teacher.targets((pixels - mean) / std)
    want = F.layer_norm(grid.mean((2, 3)), (1280,)), F.layer_norm(grid.permute(0, 2, 3, 1), (1280,))
    torch.testing.assert_close(found.pooled, want[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.patches, want[1], rtol=1e-3, atol=1e-3)
    assert facts["teacher"] == "tf_efficientnet_lite0" and len(facts["teacher_checksum"]) == 16
    assert teacher.widths == (1280, 1280)


@pytest.mark.parametrize(
    ("name", "grid"),
    [("timm/test_vit", 4), ("timm/mobilenetv3_small_050", 2), ("xcit_pico_6_p8", 8)],
)
def test_tokens_are_the_networks_output_and_its_grid(name, grid):
    """Class token left out of the grid, and rows before columns."""
    network = create_model(name, num_classes=0).eval()
    images = torch.randn(2, 3, 64, 64)
    pooled, patches = tokens_of(network, images)
    torch.testing.assert_close(pooled, network(images))
    assert patches.shape[:3] == (2, grid, grid)
    widths = widths_of(network, 64)
    assert widths == (pooled.shape[1], patches.shape[3]) and not network.training
    images[:, :, 32:] = 0  # the lower half: the upper rows of the grid change least
    moved = (tokens_of(network, images).patches - patches).abs().mean((0, 3))
    if grid > 2:
        assert moved[-1].mean() > moved[0].mean()
