"""Did it learn? The verdict's numbers against brute force, and the page of a run without labels."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import ARCH
from tests.report.test_report import Page, make_run
from xcit_dino.eval import neighbors
from xcit_dino.eval.config import ReportConfig
from xcit_dino.models.zoo import create_model
from xcit_dino.options import read_yaml
from xcit_dino.report import epochs, images, learned, report
from xcit_dino.report.learned import Pair, clearly, effective_rank, match, too_few, verdict
from xcit_dino.train.run.reader import Run, read_run
from xcit_dino.train.state import Checkpoints


@pytest.fixture
def unlabeled_run(tmp_path, unlabeled):
    """Two kept checkpoints of a network, at steps 10 and 20 of 40, on 8 images without labels."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        f"arch: {ARCH}\ndata_path: {unlabeled}\nglobal_crops_size: 32\nlocal_crops_size: 16\n"
        "local_crops_number: 2\nepochs: 4\nout_dim: 64\n"
    )
    start = {"event": "start", "step": 0, "total_steps": 40, "time": "2026-01-01T00:00:00+00:00"}
    (folder / "tries.jsonl").write_text(json.dumps(start) + "\n")
    line = {"step": 20, "loss": 3.9, "kl": 1.5, "teacher_entropy": 2.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with Checkpoints(folder) as checkpoints:
        for seed, step in ((1, 10), (2, 20)):
            torch.manual_seed(seed)
            state = {f"backbone.{k}": v for k, v in create_model(ARCH).state_dict().items()}
            checkpoints.save({"step": step, "teacher": state, "student": state}, permanent=True)
    return folder


def test_the_report_of_a_run_without_labels(unlabeled_run):
    report.run(ReportConfig((unlabeled_run,)))
    text = (unlabeled_run / "report.html").read_text()
    page = Page(text)
    body = page.text.partition("xcit-dino report")[2]
    first = text.index('id="did-it-learn-"')
    assert first < text.index('id="training"'), "the answer comes first"
    assert "Too few steps to judge. 20 steps" in body
    assert "No sign of learning." not in body  # nothing that sounds final, so early
    assert f"Loss 3.50, of uniform outputs {math.log(64):.2f} (ln 64)" in body.replace(
        "loss", "Loss"
    )
    assert "The most similar of all 8 training images" in body
    assert body.count("random weights") == 6 and body.count("trained") >= 6  # a row per query
    assert not any(words in body for words in ("same class", "classified", "Confusions"))
    assert "epoch 1, step 10" in body and "epoch 2, step 20" in body
    assert page.count("div", "frame") == 3  # the card and two checkpoints


def test_what_is_computed_is_bounded(unlabeled_run, monkeypatch):
    found = images.Images(read_run(unlabeled_run))
    network = found.network
    tokens = (32 // 8) ** 2
    cost = sum(p.numel() for p in network.parameters()) * tokens
    monkeypatch.setattr(images, "COMPUTED", 77.5 * cost)
    assert found.affordable(network) == 77
    monkeypatch.setattr(images, "COMPUTED", 1.0)
    monkeypatch.setattr(images, "FEWEST", 5)
    assert found.embed(network).samples.tolist() == [0, 1, 3, 5, 7]
    monkeypatch.setattr(epochs, "MOST_FRAMES", 1)
    assert epochs.through_epochs(found) == {}


def test_cosines_are_relative_to_the_mean():
    rows = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32) + 100
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert (unit @ unit.T).min() > 0.999  # what a random network gives
    centered = unit - unit.mean(0)
    centered /= np.linalg.norm(centered, axis=1, keepdims=True)
    similar = centered @ centered.T - 2 * np.eye(30)
    found, cosines = learned.nearest(rows, [4, 9])
    assert cosines == pytest.approx(-np.sort(-similar[[4, 9]], 1)[:, : learned.SHOWN], abs=2e-4)
    assert found[:, 0].tolist() == similar[[4, 9]].argmax(1).tolist()
    assert neighbors.centered_rows(rows) == pytest.approx(centered, abs=1e-4)


def test_effective_rank_by_eigenvalues():
    rows = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32) * [5, 3, 1, 1, 1]
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(np.cov(unit.T))
    assert effective_rank(rows) == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-4)


def test_crops_of_one_image_are_matched_by_what_tells_them_apart():
    """Two crops of each image have the same first channel; a network that sees only the other two
    matches by chance."""
    generator = torch.Generator().manual_seed(0)
    crops = torch.randn(80, 3, 4, 4, generator=generator)
    crops[40:, 0] = crops[:40, 0]
    assert match(Channels(slice(0, 1)), crops) == 1
    assert match(Channels(slice(1, 3)), crops) < 0.2


class Channels(nn.Module):
    """Some channels, flat."""

    def __init__(self, kept: slice):
        super().__init__()
        self.kept = kept

    def forward(self, images):
        return images[:, self.kept].flatten(1)


@pytest.mark.parametrize(
    ("matched", "word"),
    [
        ((0.9, 0.3, 100), "It learned."),
        ((0.35, 0.3, 100), "No sign of learning."),  # two standard errors are 0.13
        (None, "The network differs from a random one."),
    ],
)
def test_the_verdict(tmp_path, matched, word):
    rows = np.random.default_rng(0).normal(size=(2, 40, 8)).astype(np.float32)
    run = read_run(make_run(tmp_path / "run"))
    said, reasons = verdict(run, Pair(np.arange(40), *rows), matched)
    assert said == word and "ffective rank of the features" in reasons
    assert ("90% are recognized" in reasons) == (word == "It learned.")
    line = rows[0] * 0 + 1 + 1e-3 * rows[0, :1] * np.arange(1, 41, dtype=np.float32)[:, None]
    assert verdict(run, Pair(np.arange(40), line, rows[1]), matched)[0].endswith("collapsed.")
    assert clearly(0.6, 0.4, 100) and not clearly(0.6, 0.5, 100)


@pytest.mark.parametrize(
    ("step", "words"),
    [(30, "still rising, until step 100"), (300, "below 500 steps say little"), (900, "")],
)
def test_too_few_steps(tmp_path, step, words):
    config = {"epochs": 10, "warmup_epochs": 1}
    tries = [{"event": "start", "step": 0, "total_steps": 1000}]
    lines = too_few(Run(tmp_path, config, [{"step": step}], tries, {}))
    assert bool(lines) == bool(words) and words in "".join(text for _, text in lines)


def test_where_an_accuracy_answers_nothing_is_computed(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    assert "knn/random" in run.results and read_yaml(run.folder / "config.yaml")
    assert learned.did_it_learn(images.Images(run)) == {}
    for entry in run.entries("knn"):
        entry["protocol"]["crop"] = 64
    assert not learned.beside_random(run), "of another protocol it answers nothing"
