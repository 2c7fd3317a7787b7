"""Distillation without labels: targets and loss against plain ones, whole runs, refusals."""

import copy
import dataclasses
import os

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from bench.reference import plain_distillation_loss, plain_standardized
from tests import trainings, victims
from xcit_dino.data.batch import Batch
from xcit_dino.data.config import CropsConfig
from xcit_dino.errors import InputError, RunError
from xcit_dino.eval.config import ReportConfig
from xcit_dino.inputs import IMAGENET_MEAN, IMAGENET_STD, InputSettings
from xcit_dino.models.tokens import Tokens, tokens_of, widths_of
from xcit_dino.models.zoo import create_model
from xcit_dino.options import replace
from xcit_dino.report import report
from xcit_dino.ssl.config import ObjectiveConfig, PretrainConfig, pretrain_config
from xcit_dino.ssl.diagnostics import Alarms
from xcit_dino.ssl.distillation import distillation_loss, frozen_teacher, standardize
from xcit_dino.ssl.pretrain import pretrain, pretrain_with_knn, train_step
from xcit_dino.ssl.schedule import DinoHyperparameters
from xcit_dino.ssl.trainer import set_up
from xcit_dino.train.distributed import dist, fsdp
from xcit_dino.train.run.metrics import read_metrics
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
    want = plain_distillation_loss(predicted, targets, 0.7)
    torch.testing.assert_close(found, want)
    leaves = [each for group in predicted for each in group]
    for ours, plain in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(ours, plain)


def teacher_for(name, path, **options):
    crops = CropsConfig(global_crops_size=32, local_crops_size=16)
    config = ObjectiveConfig("distill", name, path, **options)
    return frozen_teacher(config, crops, [crops], InputSettings(), torch.float32)


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
    want = [plain_standardized(x) for x in (grid.mean((2, 3)), grid.permute(0, 2, 3, 1))]
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


# -- on several ranks


RANKS = victims.TINY | {"drop_path_rate": 0.0, "clip_grad": 0.01, "norm_last_layer": False}
KINDS = {"plain": {}, "groups": {"group_backward": True}, "sharded": {"fsdp": True}}
NOW = DinoHyperparameters(1e-2, 0.2, 0.9, 0.05, freeze_last_layer=False)


class Views:
    """Stands in for the augmentation: gives views that are ready."""

    def __call__(self, batch):
        return batch.global_crops.flatten(0, 1), batch.local_crops.flatten(0, 1)


def stepped(world, options):
    """Loss, student and teacher after three steps of four images, split over the ranks; in the
    first the backbone is frozen."""
    trainer = set_up(replace(PretrainConfig(), RANKS | options), world, torch.float32, "", 4)
    trainer.augment = Views()
    nothing, images = np.zeros(0, np.int64), slice(world.rank, None, world.size)
    losses = []
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        crops = [
            torch.randn(n, 4, 3, side, side, generator=generator)[:, images]
            for n, side in ((2, 16), (3, 8))
        ]
        batch = Batch(number, 0, 0, nothing, nothing, torch.zeros(0), *crops)
        now = dataclasses.replace(NOW, freeze_backbone=number == 0)
        metrics = train_step(trainer, [batch], now)
        losses.append(dist.all_reduce_mean(metrics["loss"]))
    state = fsdp.full_tensors(trainer.state.state_dict(), everywhere=True)
    return torch.stack(losses), copy.deepcopy((state["student"], state["teacher"]))


def worker(rank, port, folder, teacher):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # so that only real differences show
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = dist.init("cpu")
    found = {}
    for objective in ("distill", "dino+distill"):
        options = {"objective": objective, "teacher_model": "xcit_pico_6_p4"}
        options |= {"teacher_path": teacher}
        for kind, own in KINDS.items():
            found[objective, kind] = stepped(world, options | own)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.shutdown()


@pytest.fixture(scope="module")
def on_two_ranks(teacher_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    port = 20_000 + os.getpid() % 20_000
    arguments = [(rank, port, str(folder), str(teacher_file)) for rank in (0, 1)]
    ranks = [victims.SERVER.Process(target=worker, args=each) for each in arguments]
    for rank in ranks:
        rank.start()
    assert [victims.ended(rank) for rank in ranks] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.slow
@BOTH
def test_two_ranks_learn_what_one_does(objective, on_two_ranks, teacher_file):
    """With all tokens' gradients averaged, synchronized batch-norm, and in shards."""
    torch.set_default_dtype(torch.float64)
    try:
        options = {"objective": objective, "teacher_model": "xcit_pico_6_p4"}
        options |= {"teacher_path": teacher_file}
        want = stepped(dist.World(0, 1, torch.device("cpu")), options)
    finally:
        torch.set_default_dtype(torch.float32)
    for rank in on_two_ranks:
        for kind in KINDS:
            got = pytree.tree_leaves(rank[objective, kind])
            for a, b in zip(got, pytree.tree_leaves(want), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=f"{kind} {a} {b}")


# -- k-NN, alarms, refusals


def test_the_frozen_teacher_is_measured_once_like_the_student(shards, teacher_file, tmp_path):
    """A student that begins as its teacher has the same accuracy before the first step."""
    options = {"arch": "xcit_pico_6_p4", "init_from": str(teacher_file), "knn_every": 1}
    for stop in (3, 0):
        pretrain_with_knn(tiny(shards, tmp_path / "run", teacher_file, max_steps=stop, **options))
    lines = read_metrics(tmp_path / "run")
    frozen = [line for line in lines if "knn_frozen_top1" in line]
    assert [line["step"] for line in frozen] == [0]
    for name in ("top1", "top5"):
        assert frozen[0][f"knn_frozen_{name}"] == frozen[0][f"knn_{name}"]
    assert [line["step"] for line in lines if "knn_top1" in line] == [0, 5, 10]
    report.run(ReportConfig((tmp_path / "run",), pictures=False))
    text = (tmp_path / "run" / "report.html").read_text()
    for word in ("Beside the teacher", "frozen teacher: xcit_pico_6_p4", "starting weights"):
        assert word in text


def test_alarms_without_prototypes_judge_the_features_alone():
    alarms = Alarms(0, patience=10, stop=True)
    line = {"loss": 0.3, "feature_std": 0.5, "effective_rank": 9.0}
    for step in range(0, 40, 10):
        assert alarms.observe(step, line) == {}
    alarms.observe(40, line | {"effective_rank": 1.1})
    with pytest.raises(RunError, match="dimensional collapse: .*Change: a lower --lr"):
        alarms.observe(50, line | {"effective_rank": 1.1})


def test_another_teacher_under_a_run_is_refused(shards, teacher_file, tmp_path):
    run = tmp_path / "run"
    file = tmp_path / "teacher.pth"
    file.write_bytes(teacher_file.read_bytes())
    pretrain(tiny(shards, run, file, max_steps=2))
    other = create_model("xcit_pico_6_p4", num_classes=5).state_dict()
    torch.save({"model": other}, file)
    before = trainings.files(run)
    with pytest.raises(InputError, match="--teacher_path: the frozen teacher changed.*restore"):
        pretrain(tiny(shards, run, file))
    assert trainings.files(run) == before
    moved = tmp_path / "moved.pth"
    moved.write_bytes(teacher_file.read_bytes())  # the same weights elsewhere
    pretrain(tiny(shards, run, moved, may_change=("teacher_path",), max_steps=3))
    assert load_checkpoint(newest_checkpoint(run))["step"] == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"teacher_model": None}, "--objective distill: names no teacher; add --teacher_model"),
        ({"teacher_model": "timm/resnet19"}, "--teacher_model timm/resnet19: .*did you mean"),
        ({"teacher_model": "xcit_pico_6_p8"}, "xcit_pico_6_p4|does not fit"),
        ({"teacher_size": 18}, "--teacher_size 18: xcit_pico_6_p4 .*take --teacher_size 16"),
        ({"teacher_path": "nan"}, "NaN or infinite"),
        ({"teacher_path": None}, "--teacher_path is missing"),
        ({"teacher_path": "gray", "teacher_model": "xcit_pico_6_p4"}, "takes images of 1 channels"),
    ],
)
def test_teachers_that_cannot_be(options, words, shards, teacher_file, tmp_path):
    weights = torch.load(teacher_file)["model"]
    spoilt = {"nan": dict(weights), "gray": dict(weights)}
    first = "patch_embed.proj.0.0.weight"
    spoilt["nan"][first] = spoilt["nan"][first] * torch.nan
    spoilt["gray"][first] = spoilt["gray"][first][:, :1]
    if (name := options.get("teacher_path")) in spoilt:
        torch.save({"model": spoilt[name]}, tmp_path / name)
        options = options | {"teacher_path": tmp_path / name}
    with pytest.raises(InputError, match=words):
        pretrain(tiny(shards, tmp_path / "run", teacher_file, **options))
    assert not (tmp_path / "run").exists()


def test_options_of_the_other_objective_are_refused():
    words = "--objective distill --teacher_model timm/resnet18".split()
    for idle in ("--out_dim 7", "--teacher_temp 0.05", "--distill_weight 2", "--new_head true"):
        with pytest.raises(InputError, match=f"{idle.split()[0]}: has no effect"):
            pretrain_config([*words, *idle.split()])
    assert pretrain_config([*words, "--momentum_teacher", "0.9", "--global_crops_number", "1"])
