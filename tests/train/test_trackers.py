"""Trackers: the same lines as metrics.jsonl, one run over all attempts; a server that fails, hangs
or is not there stops no training."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from tests import trainings
from xcit_dino.errors import InputError
from xcit_dino.eval.results import write_result
from xcit_dino.train.run import trackers
from xcit_dino.train.run.metrics import read_metrics
from xcit_dino.train.run.trackers import Mirror, check_installed, read_ids

mlflow = pytest.importorskip("mlflow")


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A client of MLflow on a file store of its own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")  # taken back after what the tracker sets
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    yield trackers.mlflow_client()
    mlflow.set_tracking_uri(None)


def curve(client, run: Path, name: str) -> dict[int, float]:
    history = client.get_metric_history(read_ids(run)["mlflow"], name)
    assert len({value.step for value in history}) == len(history), "a step twice"
    return {value.step: value.value for value in history}


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_two_attempts_are_one_run_with_the_lines_of_the_log(name, shards, store, tmp_path):
    run = tmp_path / "run"
    trainings.train(name, shards, run, logger=("tensorboard", "mlflow"), max_steps=4)
    first = read_ids(run)["mlflow"]
    trainings.train(name, shards, run, logger=("mlflow",))
    assert read_ids(run)["mlflow"] == first
    lines = {line["step"]: line["loss"] for line in read_metrics(run) if "loss" in line}
    assert curve(store, run, "loss") == lines and len(lines) == 10
    found = store.get_run(first)
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    assert found.data.params["arch"] == trainings.config(name, shards, run).model.arch
    write_result(run, "knn", {"top1_k20": 33.0, "top5_k20": 70}, {"k": 20})
    assert store.get_run(first).data.metrics["final/knn/top1_k20"] == 33.0


def test_without_a_server_or_a_database_lines_go_to_mlruns(shards, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    try:
        trainings.train("pretrain", shards, tmp_path / "run", logger=("mlflow",), max_steps=2)
        assert len(curve(trackers.mlflow_client(), tmp_path / "run", "loss")) == 2
        assert (tmp_path / "mlruns").is_dir()
    finally:
        mlflow.set_tracking_uri(None)


def test_what_a_killed_attempt_logged_is_not_logged_again(shards, store, tmp_path):
    run = tmp_path / "run"
    trainings.train("pretrain", shards, run, logger=("mlflow",), max_steps=5)
    expected = curve(store, run, "loss")
    mirror = Mirror("mlflow", run, {})
    for step in (5, 6):  # as after a resume from step 4
        mirror.add(step, {"epoch": step / 5, "loss": -1.0})
    mirror.close()
    assert curve(store, run, "loss") == expected | {6: -1.0}


def test_wandb_writes_its_offline_files(shards, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    trainings.train("pretrain", shards, run, logger=("wandb",), max_steps=3)
    first = read_ids(run)["wandb"]
    trainings.train("pretrain", shards, run, logger=("wandb",))
    assert read_ids(run)["wandb"] == first
    files = sorted((run / "wandb").glob(f"offline-run-*-{first}/run-{first}.wandb"))
    assert len(files) == 2 and all(file.stat().st_size > 1000 for file in files)


def test_a_server_that_is_not_there_stops_nothing(shards, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        mlflow.set_tracking_uri(f"http://127.0.0.1:{free.getsockname()[1]}")
    trainings.train("pretrain", shards, tmp_path / "run", logger=("mlflow",))
    mlflow.set_tracking_uri(None)
    assert len(read_metrics(tmp_path / "run")) == 10
    assert "--logger mlflow: " in (words := capfd.readouterr().err)
    assert words.count("training continues without it") == 1


def test_a_server_that_never_answers_delays_nothing(tmp_path, monkeypatch, capfd):
    class Deaf:
        def start(self, *_: object) -> str:
            time.sleep(60)
            return ""

    monkeypatch.setitem(trackers.KINDS, "mlflow", Deaf)
    monkeypatch.setattr(trackers, "PENDING", 5)
    began = time.monotonic()
    mirror = Mirror("mlflow", tmp_path, {})
    for step in range(100):
        mirror.add(step, {"loss": 1.0})
    mirror.close(wait=0.2)
    assert time.monotonic() - began < 10
    assert capfd.readouterr().err.count("does not answer") == 1


def test_a_server_that_fails_in_the_middle(tmp_path, monkeypatch, capfd):
    logged = []

    class Failing:
        def start(self, *_: object) -> str:
            return "id"

        def log(self, step: int, *_: object) -> None:
            if step == 3:
                raise ConnectionError("gone")
            logged.append(step)

    monkeypatch.setitem(trackers.KINDS, "mlflow", Failing)
    mirror = Mirror("mlflow", tmp_path, {})
    for step in range(9):
        mirror.add(step, {"loss": 1.0})
    mirror.close()
    assert logged == [0, 1, 2]
    assert capfd.readouterr().err.count("gone; training continues without it") == 1


def test_a_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_installed(["tensorboard"])
    with pytest.raises(InputError, match=r"--logger wandb: .*pip install 'xcit-dino\[wandb\]'"):
        check_installed(["tensorboard", "wandb"])
