"""The log of a run: one curve over all attempts, pictures and texts for TensorBoard, messages."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG

from xcit_dino.errors import RunError
from xcit_dino.progress import progress
from xcit_dino.train.config import RunConfig
from xcit_dino.train.run.log import RunLog, shown
from xcit_dino.train.run.metrics import process_seconds, read_metrics, read_tries
from xcit_dino.train.run.tensorboard_log import HPARAMS, LAYOUT, write_hparams

SCHEDULED = {"lr": 1e-3}


def go(folder, first, last, total=20, error=None, knn=None):
    """Steps first+1 to last of a training of two epochs, logged."""
    run = RunConfig(output_dir=folder, epochs=2, log_every=2)
    with RunLog(run, first, total, global_batch=8) as log:
        for step in range(first + 1, last + 1):
            metrics = {"loss": torch.tensor(10.0 - step), "skipped": torch.tensor(0.0)}
            log.step(step, metrics, SCHEDULED, waited=0.0)
        if knn:
            log.write(last, knn)
        if error:
            raise error


def test_one_curve_over_tries(tmp_path):
    (tmp_path / "config.yaml").write_text("arch: xcit_pico_6_p8\n")
    go(tmp_path, 0, 10)
    # TensorBoard sorts its files by second, host, process and then by a counter as text (10 < 9):
    # two attempts of one process within a second, as only a test makes them, may be read reversed.
    time.sleep(1)
    go(tmp_path, 6, 20)  # resumed from step 6: what came after it is written anew
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(2, 21, 2))
    assert lines[0]["loss"] == pytest.approx(8.5)  # mean over steps 1 and 2
    assert lines[-1]["epoch"] == 2.0 and lines[4]["epoch"] == 1.0
    assert {"images_per_s", "data_wait", "memory_gib", "time", "lr"} <= set(lines[0])
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in board.Scalars("loss/loss")] == list(range(2, 21, 2))
    assert "schedule/lr" in board.Tags()["scalars"]
    assert "arch: xcit_pico_6_p8" in text_of(board, "config/text_summary")
    assert "hardware" in text_of(board, "environment/text_summary")


def text_of(board, tag):
    return board.Tensors(tag)[0].tensor_proto.string_val[0].decode()


def test_tries_say_how_they_began_and_ended(tmp_path):
    go(tmp_path, 0, 10)
    with pytest.raises(RunError):
        go(tmp_path, 10, 12, error=RunError("a reason"))
    go(tmp_path, 10, 20)
    tries = read_tries(tmp_path)
    assert [line["event"] for line in tries] == ["start", "end"] * 3
    assert [line["step"] for line in tries] == [0, 10, 10, 12, 10, 20]
    assert [line.get("reason", "")[:8] for line in tries[1::2]] == ["stopped", "RunError", "done"]
    assert tries[0]["global_batch"] == 8 and tries[0]["versions"]["torch"]


def test_the_next_try_ends_one_that_was_killed(tmp_path):
    go(tmp_path, 0, 10)
    lines = (tmp_path / "tries.jsonl").read_text().splitlines()
    (tmp_path / "tries.jsonl").write_text(lines[0] + "\n")  # as after kill -9
    go(tmp_path, 6, 20)
    killed = read_tries(tmp_path)[1]
    assert killed["event"] == "end" and "killed" in killed["reason"] and killed["step"] == 10


def test_half_written_lines_are_left_out(tmp_path):
    go(tmp_path, 0, 4)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('\n{"step": 8}\n')
    with pytest.warns(UserWarning, match="damaged"):
        assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4, 8]


def test_pictures_and_arrays_go_to_tensorboard_only(tmp_path):
    picture = np.zeros((4, 6, 3), np.uint8)
    go(tmp_path, 0, 2, knn={"knn_top1": 40.0, "crops": picture, "spread": np.arange(9.0)})
    assert set(read_metrics(tmp_path)[-1]) == {"step", "time", "knn_top1"}
    board = EventAccumulator(str(tmp_path)).Reload()
    assert board.Images("crops")[0].width == 6
    assert board.Scalars("eval/knn_top1")[0].value == 40.0
    assert board.Histograms("spread")[0].histogram_value.num == 9


def test_the_layout_comes_first_and_names_what_is_logged(tmp_path):
    go(tmp_path, 0, 2)
    board = EventAccumulator(str(tmp_path)).Reload()
    assert CONFIG_SUMMARY_TAG in board.Tags()["tensors"]
    tags = {tag for charts in LAYOUT.values() for _, tags in charts.values() for tag in tags}
    logged = set(board.Tags()["scalars"])
    assert {"loss/loss", "schedule/lr", "speed/images_per_s"} <= {t[:-1] for t in tags} & logged


def test_hyperparameters_replace_those_written_before(tmp_path):
    write_hparams(tmp_path, {"lr": 0.1, "scale": [0.1, 1]}, {"knn": 40.0})
    write_hparams(tmp_path, {"lr": 0.1, "scale": [0.1, 1]}, {"knn": 50.0})
    assert len(list(tmp_path.rglob("events.*"))) == 1
    board = EventAccumulator(str(tmp_path / HPARAMS)).Reload()
    assert board.Scalars("final/knn")[0].value == 50.0
    assert "_hparams_/experiment" in board.summary_metadata


def test_words_beside_the_bar():
    line = {"epoch": 1.5, "loss": 3.21, "lr": 1e-3, "data_wait": 0.02, "knn_top1": 44.4}
    assert shown(line) == {
        "epoch": "1.50", "loss": "3.210", "lr": "1.0e-03", "wait": "2%", "knn": "44.4",
    }  # fmt: skip


def test_plain_lines_at_events_and_silent_ranks(tmp_path, capsys, monkeypatch):
    go(tmp_path, 0, 4, knn={"knn_top1": 40.0})
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("pretraining: 1/20 steps") for line in lines)
    assert any(line.startswith("first step ") for line in lines)
    assert "step 4: knn_top1 40.00" in lines and lines[-1].startswith("pretraining: 4/20 steps")
    monkeypatch.setenv("RANK", "1")
    with progress("work", 3) as bar:
        bar.advance()
        bar.note("a word")
    assert capsys.readouterr().err == ""


def test_a_published_bar_holds_the_values(tmp_path, monkeypatch):
    monkeypatch.setenv("XCIT_DINO_PROGRESS", str(tmp_path / "state"))
    go(tmp_path / "run", 0, 20)
    state = json.loads((tmp_path / "state").read_text())
    assert state["done"] == state["total"] == 20 and "epoch 2.00  loss" in state["shown"]


def test_seconds_since_the_process_began():
    assert 0 < process_seconds() < 24 * 3600
