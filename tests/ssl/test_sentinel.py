"""Collapse diagnostics against plain formulas; alarms with hysteresis; runs made to collapse."""

import math
import re

import pytest
import torch

from bench.trials import collapse
from xcit_dino.data.pack.demo import make
from xcit_dino.data.shards.config import DemoConfig
from xcit_dino.errors import RunError
from xcit_dino.options import options
from xcit_dino.ssl.config import PretrainConfig, pretrain_config
from xcit_dino.ssl.diagnostics import KINDS, Alarms, health, patience

HEALTHY = {
    "loss": 3.0, "teacher_entropy": 2.5, "kl": 0.5, "information": 0.4, "mean_entropy": 0.8,
    "prototypes_used": 0.3, "feature_std": 0.6, "effective_rank": 8.0, "center_norm": 1.0,
}  # fmt: skip
UNIFORM = HEALTHY | {"information": 0.001, "mean_entropy": 1.0, "teacher_entropy": 5.54, "kl": 0.0}
SINGLE = HEALTHY | {
    "information": 0.001, "mean_entropy": 0.02, "teacher_entropy": 0.0, "prototypes_used": 0.03,
}  # fmt: skip
FLAT = HEALTHY | {"effective_rank": 1.1}


def test_signs_are_their_formulas():
    torch.manual_seed(0)
    targets = torch.softmax(3 * torch.randn(2, 5, 12), -1)
    features = torch.randn(10, 6)
    found = health(torch.tensor(4.0), targets, features)
    rows = targets.reshape(10, 12).double()
    entropy = -(rows * rows.log()).sum(1).mean()
    mean = rows.mean(0)
    mean_entropy = -(mean * mean.log()).sum()
    unit = features / features.norm(dim=1, keepdim=True)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(unit.T, correction=0).double())
    expected = {
        "loss": 4.0,
        "teacher_entropy": entropy,
        "kl": 4.0 - entropy,
        "information": (mean_entropy - entropy) / math.log(10),
        "mean_entropy": mean_entropy / math.log(12),
        "prototypes_used": len(set(rows.argmax(1).tolist())) / 10,
        "feature_std": unit.std(0, correction=0).mean() * math.sqrt(6),
        "effective_rank": eigenvalues.sum() ** 2 / eigenvalues.square().sum(),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-4), name


def test_signs_of_the_extremes():
    one_hot = torch.eye(8).expand(2, 8, 8)
    best = health(torch.tensor(0.0), one_hot, torch.eye(16))
    assert float(best["information"]) == pytest.approx(1.0)
    assert float(best["prototypes_used"]) == 1.0
    assert float(best["effective_rank"]) == pytest.approx(15.0)
    flat = health(torch.tensor(math.log(8)), torch.full((2, 8, 8), 1 / 8), torch.ones(16, 16))
    assert float(flat["information"]) == pytest.approx(0.0, abs=1e-6)
    assert float(flat["mean_entropy"]) == pytest.approx(1.0)
    assert float(flat["feature_std"]) == 0.0 and float(flat["kl"]) == pytest.approx(0.0, abs=1e-6)
    single = health(torch.tensor(0.0), torch.eye(8)[[3] * 16].unflatten(0, (2, 8)), torch.eye(16))
    assert float(single["mean_entropy"]) == float(single["information"]) == 0.0


@pytest.mark.parametrize(
    ("line", "name", "words"),
    [
        (UNIFORM, "uniform", r"entropy 5\.54 of ln K = 5\.55.*--teacher_temp"),
        (SINGLE, "single_mode", r"has 1\.1 distinct outputs.*--center_momentum 0\.9"),
        (FLAT, "dimensional", r"effective rank 1\.10.*--lr"),
    ],
)
def test_an_alarm_waits_names_the_kind_and_ends(line, name, words, capsys):
    alarms = Alarms(256, patience=100, stop=False)
    changes = {step: alarms.observe(step, line) for step in range(10, 120, 10)}
    assert {step: c for step, c in changes.items() if c} == {110: {f"alarm_{name}": 1.0}}
    assert capsys.readouterr().err.count("collapse") == 1
    assert not any(alarms.observe(step, line) for step in range(120, 400, 10))  # said once
    changes = {step: alarms.observe(step, HEALTHY) for step in range(400, 520, 10)}
    assert {step: c for step, c in changes.items() if c} == {500: {f"alarm_{name}": 0.0}}
    with pytest.raises(RunError, match=words):
        stopping = Alarms(256, patience=100, stop=True)
        for step in range(10, 120, 10):
            stopping.observe(step, line)


OPTION = re.compile(r"(--\w+)(?: (true|false|[\d.]+(?![\w])))?")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_an_alarm_advises_to_turn_is_there(kind):
    """Every option of the advice is one of pretraining, and takes the value that stands beside it;
    "a lower", "a higher" and "a longer" have room on that side of the default."""
    advised = OPTION.findall(kind.advice)
    assert advised
    for option, value in advised:
        default = dict(options(PretrainConfig()))[option.removeprefix("--")]
        turned = value or str(default * (0.5 if f"lower {option}" in kind.advice else 1.001))
        config = pretrain_config(["--data_path", "x", option, turned])
        assert str(dict(options(config))[option.removeprefix("--")]).lower() == turned.lower()


def test_one_good_reading_begins_anew_and_the_margin_is_wider_on_the_way_back():
    alarms = Alarms(256, patience=100, stop=False)
    for step in range(10, 1000, 10):
        assert not alarms.observe(step, HEALTHY if step % 90 == 0 else UNIFORM)
    for step in range(1000, 1110, 10):
        alarms.observe(step, UNIFORM)
    assert alarms.on == {"uniform"}
    for step in range(1110, 2000, 10):
        assert not alarms.observe(step, UNIFORM | {"information": 0.045})  # between the thresholds
    assert alarms.on == {"uniform"}


@pytest.mark.parametrize("modes, used", [(80.0, 0.3), (20.0, 0.09), (5.0, 0.5)])
def test_kinds_exclude_what_is_healthy(modes, used):
    """The second as CIFAR-10 begins, the third on four images at a time."""
    line = HEALTHY | {"modes": modes, "used": used}
    assert not [kind.name for kind in KINDS if kind.collapsed(line)]
    assert all(kind.cleared(line) for kind in KINDS)


@pytest.mark.parametrize("views", [1, 2, 4, 8])
@pytest.mark.parametrize("images", [1, 2, 3, 4, 8])
def test_few_images_and_any_number_of_views_that_agree_ring_no_alarm(views, images, capsys):
    """A perfect teacher: each image has an answer of its own, the same for all of its views."""
    answers = torch.eye(64)[:images].expand(views, -1, -1)
    features = torch.eye(16)[:images].repeat(views, 1)
    signs = {k: float(v) for k, v in health(torch.tensor(0.0), answers, features).items()}
    alarms = Alarms(64, patience=1, stop=True, views=views, images=images)
    assert all(math.isfinite(value) for value in signs.values())
    assert not alarms.observe(0, HEALTHY | signs) and not alarms.observe(10, HEALTHY | signs)
    assert ("--batch_size_per_gpu" in capsys.readouterr().err) == (images < 4)


@pytest.mark.parametrize("views", [1, 4])
def test_a_single_mode_rings_for_any_number_of_views(views):
    answers = torch.eye(64)[[3] * 8].expand(views, -1, -1)
    signs = health(torch.tensor(0.0), answers, torch.randn(8 * views, 16))
    alarms = Alarms(64, patience=1, stop=False, views=views, images=8)
    line = HEALTHY | {k: float(v) for k, v in signs.items()}
    alarms.observe(0, line)
    assert alarms.observe(10, line) == {"alarm_single_mode": 1.0}


def test_patience_is_an_epoch_within_bounds():
    assert (patience(10), patience(500), patience(10**6)) == (100, 500, 2000)


# -- real runs


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "shards"
    make(DemoConfig(folder, train=collapse.IMAGES, val=12))
    return folder


def alarms_of(images, folder, steps, changes, seed=0):
    lines = collapse.train(folder, images, steps, seed, changes)
    return {name for line in lines for name in line if name.startswith("alarm_") and line[name]}


@pytest.mark.slow
def test_a_run_without_sharpening_rings(images, tmp_path):
    changes = collapse.UNHEALTHY["no sharpening"]
    assert alarms_of(images, tmp_path, 130, changes) == {"alarm_uniform"}


@pytest.mark.faults
@pytest.mark.parametrize("kind", collapse.UNHEALTHY)
def test_runs_made_to_collapse_ring(kind, images, tmp_path):
    assert alarms_of(images, tmp_path, 300, collapse.UNHEALTHY[kind])


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", collapse.HEALTHY)
def test_healthy_runs_are_silent(kind, images, tmp_path):
    """One seed of each kind; ``bench/trials/collapse.py`` goes through many."""
    assert alarms_of(images, tmp_path, 300, collapse.HEALTHY[kind]) == set()
