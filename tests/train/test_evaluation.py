"""Evaluations during training: they come after the checkpoint and never end a training; and
lines of the log that are the same whether a run was cut off or not."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time

import pytest
import torch

from tests import trainings
from tests.test_faults_inside import two_ranks
from tests.trainings import CONFIGS, config, train
from tests.victims import at_step, ended, final_bits, lines, said, same
from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.loader import ImageLoader
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import Stopped
from xcit_dino.provenance import read_results
from xcit_dino.ssl.diagnostics import Alarms
from xcit_dino.ssl.pretrain import pretrain, pretrain_with_knn
from xcit_dino.supervised import validation
from xcit_dino.train import signals
from xcit_dino.train.config import RunConfig
from xcit_dino.train.evaluation import MARK
from xcit_dino.train.run.log import RunLog
from xcit_dino.train.run.metrics import read_metrics
from xcit_dino.train.state import load_checkpoint, newest_checkpoint
from xcit_dino.train.watchdog import is_evaluation, phase_of

ALL = pytest.mark.parametrize("name", CONFIGS)
OF_THE_MACHINE = {"images_per_s", "data_wait", "memory_gib", "time"}


def logged(folder):
    """All lines of the metrics, without what the machine's speed decides."""
    lines = read_metrics(folder)
    return [{k: v for k, v in line.items() if k not in OF_THE_MACHINE} for line in lines]


# -- what is averaged belongs to the state


@ALL
def test_lines_of_a_run_that_was_cut_off_in_a_window(name, shards, tmp_path):
    """Windows of 3 steps, cut after 1, 4 and 5 (an epoch's end): the same numbers to the bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(name, shards, whole, log_every=3)
    for steps in (1, 4, 5, 0):
        train(name, shards, cut, log_every=3, max_steps=steps)
    assert logged(cut) == logged(whole)
    assert [line["step"] for line in lines(cut)] == [3, 6, 9, 10]


def test_two_ranks_cut_off_in_a_window(shards, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run, steps in ((whole, 3), (cut, 2), (cut, 3)):
        assert [ended(r) for r in two_ranks(run, shards, log_every=3, max_steps=steps)] == [0, 0]
    assert logged(cut) == logged(whole)
    train("pretrain", shards, cut, epochs=4, log_every=3, max_steps=6)  # on one rank: the mean's
    assert [line["step"] for line in lines(cut)] == [3, 6]


def test_alarms_go_on_counting(shards, tmp_path):
    """They ring after so many steps, whatever happened between."""
    line = dict.fromkeys(("teacher_entropy", "kl", "loss", "center_norm", "effective_rank"), 5.0)
    line |= {"information": 0.01, "mean_entropy": 0.9, "prototypes_used": 0.5, "feature_std": 0.5}
    whole = Alarms(64, patience=10, stop=False)
    assert whole.observe(5, line) == {}
    resumed = Alarms(64, patience=10, stop=False, saved=json.loads(json.dumps(whole.state())))
    assert resumed.observe(15, line) == whole.observe(15, line) == {"alarm_uniform": 1.0}


# -- speed


def test_speed_is_that_of_the_steps(tmp_path):
    """Neither the evaluation nor steps of an earlier try count."""
    run = RunConfig(output_dir=tmp_path, epochs=2, log_every=4)
    metrics = {"loss": torch.tensor(1.0), "skipped": torch.tensor(0.0)}
    with RunLog(run, 0, 20, global_batch=8) as log:
        log.step(1, metrics, {}, waited=0.0)
        log.step(2, metrics, {}, waited=0.0)
        saved = log.state()
    with RunLog(run, 2, 20, global_batch=8, saved=saved) as log:
        with log.untimed():
            time.sleep(0.5)
        time.sleep(0.02)
        log.step(3, metrics, {}, waited=0.0)
        line = log.step(4, metrics, {}, waited=0.01)
    assert 16 / 0.3 < line["images_per_s"] < 16 / 0.02 and line["data_wait"] > 0.01 / 0.3


# -- evaluations that fail


class Cut(BaseException):
    """The process ends."""


def failing(monkeypatch, name, error, times=99):
    """Let a training's evaluations between steps raise; the steps at which they were called."""
    calls = []

    def evaluate(*_):
        calls.append(len(calls))
        if len(calls) <= times:
            raise error
        return {"knn_top1": 50.0} if name == "pretrain" else {"": {"top1": 50.0}}

    if name == "pretrain":
        monkeypatch.setitem(
            trainings.RUN, name, lambda options: pretrain(options, evaluate=evaluate)
        )
    else:
        monkeypatch.setattr(validation, "accuracies", evaluate)
    return calls


@ALL
def test_a_failing_evaluation_ends_no_training(name, shards, tmp_path, monkeypatch, capsys):
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(name, shards, whole)
    failing(monkeypatch, name, RuntimeError("no\nmemory"), times=1)
    train(name, shards, run)
    said = capsys.readouterr().err
    assert "step 5: the evaluation failed; training continues (RuntimeError: no memory)" in said
    assert same(final_bits(run), final_bits(whole))
    found = [line["step"] for line in read_metrics(run) if {"knn_top1", "val_top1"} & set(line)]
    assert found == [10] and not (run / MARK).exists()


@ALL
def test_one_that_ends_the_process_is_got_past(name, shards, tmp_path, monkeypatch, capsys):
    """Killed in it twice, then left out; the checkpoint before it is whole each time."""
    calls = failing(monkeypatch, name, Cut(), times=2)
    for _ in range(2):
        with pytest.raises(Cut):
            train(name, shards, tmp_path)
        assert load_checkpoint(newest_checkpoint(tmp_path))["step"] == 5
    train(name, shards, tmp_path)
    assert "step 5: 2 attempts died in its evaluation" in capsys.readouterr().err
    assert load_checkpoint(newest_checkpoint(tmp_path))["step"] == 10
    assert len(calls) == 3 and not (tmp_path / MARK).exists()


@ALL
def test_what_a_stop_left_out_is_evaluated_later(name, shards, tmp_path, monkeypatch):
    """The signal comes in the epoch's last step."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    calls = failing(monkeypatch, name, None, times=0)
    train(name, shards, whole)
    room = "ssl.pretrain" if name == "pretrain" else "supervised.train"
    module = sys.modules[f"xcit_dino.{room}"]
    inner = module.train_step

    def train_step(trainer, *rest):
        if trainer.state.step == 3:
            signals.request("SIGTERM")
        return inner(trainer, *rest)

    monkeypatch.setattr(module, "train_step", train_step)
    with pytest.raises(Stopped, match="after step 5"):
        train(name, shards, run)
    assert len(calls) == 2, "none before it leaves"
    monkeypatch.setattr(module, "train_step", inner)
    train(name, shards, run)
    assert logged(run) == logged(whole)


def break_images(shards, split, count):
    """Spoil the first images of a split."""
    index = ShardIndex.load(shards / split)
    with open(index.path(0), "r+b") as file:
        for sample in range(count):
            file.seek(index.locate(sample)[1])
            file.write(b"no image")


def test_broken_validation_images_are_left_out_of_the_online_k_nn(shards, tmp_path, capsys):
    mine = tmp_path / "shards"
    shutil.copytree(shards, mine)
    break_images(mine, "val", 3)
    pretrain_with_knn(config("pretrain", mine, tmp_path / "run", knn_every=1, epochs=1))
    assert f"k-NN: 3 of 10 images of {mine / 'val'} cannot be read" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "knn_top1" in line] == [5]


@pytest.mark.parametrize("place", ["both", "training", "nowhere"])
def test_online_k_nn_with_shards_elsewhere(place, shards, tmp_path, capsys):
    """The index alone lies in --data_path; validation shards are beside those for training, or
    beside their index, or cannot be found: then there is no accuracy, and training continues."""
    mine, other = tmp_path / "index", tmp_path / "moved"
    shutil.copytree(shards, mine)
    (other / "train").parent.mkdir()
    shutil.move(mine / "train", other / "train")
    shutil.copytree(other / "train", mine / "train", ignore=shutil.ignore_patterns("*.tar"))
    if place != "training":
        shutil.copytree(mine / "val", other / "val")
        for shard in (mine / "val").glob("*.tar"):
            shard.unlink()
    url = str(other / "train")
    if place != "both":
        url = str(tmp_path / "elsewhere")
        shutil.move(other / "train", url)
    options = {"shard_url": url, "knn_every": 1, "epochs": 1}
    pretrain_with_knn(config("pretrain", mine, tmp_path / "run", **options))
    found = [line for line in read_metrics(tmp_path / "run") if "knn_top1" in line]
    words = capsys.readouterr()
    assert len(found) == (place != "nowhere") and "no picture" not in words.out
    assert ("the evaluation failed; training continues" in words.err) == (place == "nowhere")


def blind(rank):
    """Let one rank's evaluations fail to read their images."""
    from xcit_dino.data import loader as images
    from xcit_dino.train.distributed import dist

    inner = images.ImageLoader.__iter__

    def read(loader):
        if dist.rank() == rank:
            raise OSError("Stale file handle")
        return inner(loader)

    images.ImageLoader.__iter__ = read


def test_ranks_agree_where_an_evaluation_fails_on_one(shards, tmp_path):
    run, entry = tmp_path / "run", "xcit_dino.ssl.pretrain:pretrain_with_knn"
    options = {"entry": entry, "knn_every": 1, "epochs": 2}
    assert [ended(r, 100) for r in two_ranks(run, shards, blind, 1, **options)] == [0, 0]
    words = said(run)
    for step in (5, 10):
        assert (
            f"step {step}: the evaluation failed; training continues (RankFailed: rank 1: " in words
        )
    assert "Stale file handle" in words
    assert [line["step"] for line in lines(run)] == list(range(1, 11))


def fail():
    raise OSError("this rank alone")


def at_step_of_rank(rank, step):
    if os.environ["RANK"] == str(rank):
        at_step(step, fail)


def test_a_rank_that_fails_waits_for_nobody(shards, tmp_path):
    """The other one notices that it is gone."""
    run = tmp_path / "run"
    codes = [ended(r, 100) for r in two_ranks(run, shards, at_step_of_rank, 1, 3)]
    assert all(codes) and "this rank alone" in said(run)


def test_an_average_of_the_first_weights_is_no_result(shards, tmp_path, capsys):
    """0.99996 to the power of 10 steps: the average has hardly begun. Above a half it is shown."""
    train("finetune", shards, tmp_path / "early", model_ema_decay=0.99996)
    words = capsys.readouterr().out
    assert "after 10 steps 100% of the average is still the initial weights" in words
    assert "a decay of 0.5 suits" in words and "averaged weights" not in words
    assert set(read_results(tmp_path / "early")) == {"finetune"}
    assert not any("val_ema_top1" in line for line in read_metrics(tmp_path / "early"))
    train("finetune", shards, tmp_path / "late", model_ema_decay=0.9)  # 0.59 and 0.35
    found = [line["step"] for line in read_metrics(tmp_path / "late") if "val_ema_top1" in line]
    assert found == [10] and "finetune/ema" in read_results(tmp_path / "late")


# -- the watchdog


def test_the_watchdog_sees_an_evaluation_through_whatever_it_does(shards, tmp_path):
    """Reading images is a phase of its own in reports, but no reason to end the process."""
    seen = []

    def evaluate(*_):
        def look(frame):
            seen.append((phase_of(frame), is_evaluation(frame)))

        index = ShardIndex.load(shards / "val")
        main = threading.main_thread().ident
        inner = ImageLoader._tasks

        def tasks(loader, slots):
            look(sys._current_frames()[main])
            yield from inner(loader, slots)

        ImageLoader._tasks = tasks
        try:
            list(ImageLoader(index, LoaderConfig(num_workers=0), resize=16, crop=16))
        finally:
            ImageLoader._tasks = inner
        return {}

    pretrain(config("pretrain", shards, tmp_path, epochs=1), evaluate=evaluate)
    assert seen == [("data", True)]
    assert not is_evaluation(sys._getframe())
