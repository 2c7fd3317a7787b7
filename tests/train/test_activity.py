"""Whether a run is active: by its record and its owner's heartbeat, in the same words for all."""

from __future__ import annotations

import json
import os
import re
import time

import pytest

from tests.report.test_report import written
from xcit_dino.cli import main
from xcit_dino.provenance import now
from xcit_dino.train.run.activity import WATCH, activity
from xcit_dino.train.run.lock import LOCK, held
from xcit_dino.train.run.metrics import read_metrics, read_tries


@pytest.fixture
def run(tmp_path):
    """A run that has started and logged step 12 of 40."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("arch: xcit_pico_6_p8\nepochs: 4\n")
    start = {"event": "start", "step": 0, "total_steps": 40, "time": now()}
    (folder / "tries.jsonl").write_text(json.dumps(start) + "\n")
    (folder / "metrics.jsonl").write_text(
        json.dumps({"step": 12, "loss": 3.0, "time": now()}) + "\n"
    )
    return folder


def found(folder):
    return activity(folder, read_tries(folder), read_metrics(folder))


def left(folder, seconds):
    """An owner that last touched its file so long ago."""
    (folder / LOCK).write_text(json.dumps({"host": "node7", "pid": 4321, "job": "", "since": ""}))
    os.utime(folder / LOCK, (time.time() - seconds,) * 2)


def test_by_the_heartbeat_of_the_owner(run):
    left(run, WATCH - 10)
    assert found(run).state == "running"
    assert found(run).text.startswith("active: process 4321 on node7, step 12 of 40, last update")
    left(run, WATCH + 10)
    assert found(run).state == "dead"
    assert "no heartbeat of process 4321 on node7 for 0:00:45" in found(run).text
    (run / LOCK).write_text("")  # released, but no end on record
    assert found(run).state == "unknown"


def test_while_the_lock_is_held_and_after_the_end(run):
    with held(run):
        assert found(run).state == "running" and f"process {os.getpid()} on" in found(run).text
    with open(run / "tries.jsonl", "a") as file:
        file.write(json.dumps({"event": "end", "step": 40, "reason": "done"}) + "\n")
    assert found(run).state == "ended" and found(run).text == "ended at step 40: done"


def test_a_long_silence_of_a_live_run_is_said(run):
    left(run, 1)
    line = {"step": 13, "loss": 3.0, "time": "2026-01-01T00:00:00+00:00"}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert found(run).state == "running" and found(run).stale
    assert "nothing logged for long: evaluating, or hung" in found(run).text


@pytest.mark.parametrize("seconds", [1, 100])
def test_the_report_and_watch_say_the_same(run, seconds, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    left(run, seconds)
    assert main(["watch", str(run)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    words = re.split(r" for \d|, last update", found(run).text)[0]  # the seconds pass
    assert "process 4321 on node7" in words
    assert words in said
    _, page = written(run)
    assert f"the end: this run is {words}" in page.text
    assert page.text.count(words) == 2, "among what is absent, and as the end of the attempt"
