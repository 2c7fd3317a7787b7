"""Distillation: losses against the formulas, the teacher's images, whole runs, extraction."""

import dataclasses
import json
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F

from xcit_dino.cli import main
from xcit_dino.errors import InputError
from xcit_dino.eval.context import resolve_input_settings
from xcit_dino.inputs import InputSettings
from xcit_dino.models.weights.load import input_settings
from xcit_dino.models.zoo import create_model
from xcit_dino.options import replace
from xcit_dino.supervised.config import DistillConfig, TeacherConfig, distill_config
from xcit_dino.supervised.distill import DistillationLoss, Teacher, build_teacher, distill
from xcit_dino.train.state import Checkpoints, load_checkpoint, newest_checkpoint

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TINY = {
    "arch": "xcit_pico_6_p8",
    "input_size": 32,
    "batch_size_per_gpu": 32,
    "epochs": 1,
    "model_ema_decay": 0.5,
    "eval_every": 0,
    "num_workers": 0,
    "device": "cpu",
    "precision": "fp32",
    "teacher_model": "xcit_pico_6_p16",
}


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    model = create_model("xcit_pico_6_p16", num_classes=12)
    torch.save({"model": model.state_dict()}, path)
    return path


def tiny(shards, folder, teacher_file, **options) -> DistillConfig:
    values = {"data_path": shards, "output_dir": folder, "teacher_path": teacher_file}
    return replace(DistillConfig(), TINY | values | options)


# -- loss


def by_hand(kind, s, t, labels, alpha, tau):
    """The formulas, one probability at a time."""
    B, C = s.shape
    base = -sum((labels[b] * F.log_softmax(s[b], 0)).sum() for b in range(B)) / B
    p = [torch.exp(x / tau) / torch.exp(x / tau).sum() for x in s]
    q = [torch.exp(x / tau) / torch.exp(x / tau).sum() for x in t]
    kl = sum((q[b] * (q[b] / p[b]).log()).sum() for b in range(B))
    back = sum((p[b] * (p[b] / q[b]).log()).sum() for b in range(B))
    if kind == "hard":
        distance = -sum(F.log_softmax(s[b], 0)[int(t[b].argmax())] for b in range(B)) / B
    elif kind == "soft":
        distance = kl * tau**2 / (B * C)
    else:
        distance = (kl + back) / 2 * tau**2 / B
    return (1 - alpha) * base + alpha * distance


@pytest.mark.parametrize(
    ("kind", "alpha", "tau"),
    [
        ("hard", 0.5, 1.0),  # which has no temperature
        ("hard", 0.3, 1.0),
        ("soft", 0.5, 1.0),
        ("soft", 0.3, 2.5),
        ("symmetric", 0.5, 1.0),
        ("symmetric", 0.3, 2.5),
    ],
)
def test_loss_is_the_formula(kind, alpha, tau):
    torch.manual_seed(0)
    s, t, images = torch.randn(4, 5), 3 * torch.randn(4, 5), torch.zeros(4, 3, 8, 8)
    labels = torch.rand(4, 5).softmax(1)
    loss = DistillationLoss(lambda _: t, TeacherConfig("x", None, 0, kind, alpha, tau))  # type: ignore
    found = loss(images, s.requires_grad_(), labels)
    expected = by_hand(kind, s, t, labels, alpha, tau)
    torch.testing.assert_close(found, expected)
    (ours,), (theirs,) = (torch.autograd.grad(x, s) for x in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_symmetric_is_passls():
    """DistillationWrapper.py: mean over all cells of target * log(target / x) * C, both ways."""
    torch.manual_seed(0)
    s, t = torch.randn(6, 7), torch.randn(6, 7)
    p, q = s.softmax(1), t.softmax(1)
    cells = q * (q / p).log() * 7 + p * (p / q).log() * 7
    loss = DistillationLoss(None, TeacherConfig(distillation_type="symmetric"))  # type: ignore
    torch.testing.assert_close(loss.distance(s, t), cells.mean() / 2)


def test_half_precision_students_meet_the_teacher_in_fp32():
    torch.manual_seed(0)
    s, t, labels = torch.randn(4, 5), torch.randn(4, 5), torch.rand(4, 5).softmax(1)
    loss = DistillationLoss(lambda _: t, TeacherConfig(distillation_type="soft"))  # type: ignore
    found = loss(torch.zeros(1), s.bfloat16(), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(torch.zeros(1), s.bfloat16().float(), labels))


# -- teacher


class Seen(torch.nn.Module):
    """Gives back what it is shown."""

    def forward(self, images):
        return images


def test_the_teacher_gets_its_own_normalization_and_size():
    pixels = torch.rand(2, 3, 16, 16)
    stack = [torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD)]
    images = (pixels - stack[0]) / stack[1]
    own = InputSettings(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    teacher = Teacher(Seen(), InputSettings(), own)
    torch.testing.assert_close(teacher(images), 2 * pixels - 1, rtol=1e-5, atol=1e-5)
    larger = Teacher(Seen(), InputSettings(), dataclasses.replace(own, size=24))
    expected = F.interpolate(2 * pixels - 1, (24, 24), mode="bicubic", antialias=True)
    torch.testing.assert_close(larger(images), expected, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in teacher.parameters()) and not larger.network.training
    with torch.autocast("cpu", torch.bfloat16):
        assert teacher(images).dtype == torch.float32


def test_a_timm_teacher_from_a_file(tmp_path):
    """Its own mean, std and size come from timm."""
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=12).eval()
    torch.save(network.state_dict(), tmp_path / "teacher.pth")
    config = TeacherConfig("resnet10t", tmp_path / "teacher.pth", teacher_size=32)
    teacher, facts = build_teacher(config, 12, InputSettings())
    own = network.pretrained_cfg
    pixels = torch.rand(2, 3, 32, 32)
    stack = [torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD, own["mean"], own["std"])]
    expected = network((pixels - stack[2]) / stack[3])
    found = teacher((pixels - stack[0]) / stack[1])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert facts["teacher"] == "resnet10t" and len(facts["teacher_weights"]) == 16
    config = TeacherConfig("resnet10t", tmp_path / "teacher.pth")
    assert build_teacher(config, 12, InputSettings())[0].size == 176


def test_a_teacher_finetuned_here_sees_what_it_learned_from(tmp_path):
    """Not what timm's own weights of that name want."""
    arch, run = "timm/vit_tiny_patch16_224", tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("input_size: 32\n")
    torch.save({}, run / "checkpoints" / "old.pth")  # as versions before this one left it
    torch.save({"config": "input_size: 48\nmean: [0.1, 0.2, 0.3]"}, tmp_path / "moved.pth")
    torch.save({}, tmp_path / "downloaded.pth")

    def found(path):
        settings = resolve_input_settings(arch, path)
        return settings.mean, settings.std, settings.size

    assert found(run / "checkpoints" / "old.pth") == (MEAN, STD, 32)
    assert found(tmp_path / "moved.pth") == ((0.1, 0.2, 0.3), STD, 48)
    assert found(tmp_path / "downloaded.pth") == ((0.5,) * 3, (0.5,) * 3, 224)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"teacher_model": "regnety_160"}, "1000 classes, and the data 12"),
        ({"teacher_model": "regnety_161"}, "did you mean"),
        ({"teacher_model": "xcit_pico_6_p16"}, "--teacher_path is missing"),
        ({"teacher_model": "xcit_pico_6_p8", "file": True}, "xcit_pico_6_p16"),
    ],
)
def test_teachers_that_cannot_be(options, words, teacher_file, demo_shards, tmp_path):
    path = teacher_file if options.pop("file", False) else None
    with pytest.raises(InputError, match=words):
        distill(tiny(demo_shards, tmp_path / "run", path, **options))
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_classes_is_refused(teacher_file):
    with pytest.raises(InputError, match="classifies 12 classes, but the model 10"):
        build_teacher(TeacherConfig("xcit_pico_6_p16", teacher_file), 10, InputSettings())


# -- whole runs


def test_a_run_resumes_extracts_and_needs_its_teachers_file_no_more(
    demo_shards, teacher_file, tmp_path
):
    whole = tmp_path / "whole"
    distill(tiny(demo_shards, whole, teacher_file))
    cut, copy = tmp_path / "cut", tmp_path / "copy.pth"
    copy.write_bytes(teacher_file.read_bytes())
    distill(tiny(demo_shards, cut, copy, max_steps=1))
    copy.unlink()
    distill(tiny(demo_shards, cut, copy))
    path = newest_checkpoint(cut)
    state, expected = load_checkpoint(path), load_checkpoint(newest_checkpoint(whole))
    assert state["step"] == expected["step"] == 3
    for network in ("Student", "Teacher", "model_ema"):
        for name, value in expected[network].items():
            assert torch.equal(state[network][name], value), name
    frozen = torch.load(teacher_file)["model"]
    for name, value in frozen.items():
        assert torch.equal(state["Teacher"][name], value), name

    student = tmp_path / "student.pth"
    words = ["--prefix", "Student", "--remove_prefix", "true", "--output", str(student)]
    assert main(["weights", "extract", str(path), *words]) == 0
    model = create_model("xcit_pico_6_p8", num_classes=12)
    model.load_state_dict(torch.load(student))

    results = json.loads((cut / "results.json").read_text())
    assert results["distill"]["protocol"]["teacher"] == "xcit_pico_6_p16"
    assert results["distill"]["protocol"]["distillation"] == "hard"
    assert results["distill/ema"]["protocol"]["network"] == "model_ema"
    other = json.loads((whole / "results.json").read_text())
    assert results["distill"]["metrics"] == other["distill"]["metrics"]


def test_a_run_goes_on_with_the_same_view_of_its_teacher(demo_shards, teacher_file, tmp_path):
    """The teacher learned from 16 pixels of its own mean; its run is deleted on the way."""
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    (teacher / "checkpoints").mkdir(parents=True)
    path = teacher / "checkpoints" / "checkpoint-00000001.pth"
    options = "input_size: 16\nmean: [0.1, 0.2, 0.3]\n"
    torch.save(torch.load(teacher_file) | {"config": options}, path)
    distill(tiny(demo_shards, run, path, max_steps=1))
    shutil.rmtree(teacher)
    distill(tiny(demo_shards, run, path, max_steps=2))
    newest = newest_checkpoint(run)
    kept = input_settings(newest, "teacher")
    assert (kept.size, kept.mean) == (16, (0.1, 0.2, 0.3))
    assert load_checkpoint(newest)["facts"]["teacher_size"] == 16
    old = load_checkpoint(newest)  # as versions left it that did not keep the settings
    del old["facts"]["teacher_input"]
    for name in (newest, newest.with_suffix(".json")):
        name.unlink()
    with Checkpoints(run) as checkpoints:
        checkpoints.save(old)
    with pytest.raises(InputError, match="other options .teacher_size 16 -> 0"):
        distill(tiny(demo_shards, run, path))


def test_recipes():
    config = distill_config(["--arch", "xcit_small_12_p8_224_dist"])
    assert config.model.arch == "xcit_small_12_p8"
    assert config.teacher.teacher_model == "regnety_160.deit_in1k"
