"""Watching a run from its folder alone, while it is being written and until it ends."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from xcit_dino.cli import main
from xcit_dino.slurm import attempts, launched
from xcit_dino.slurm.runstate import RunState
from xcit_dino.slurm.tools.monitor import view


def add(folder, name, **line):
    folder.mkdir(exist_ok=True)
    with open(folder / name, "a") as file:
        file.write(json.dumps(line) + "\n")


def begun(folder, steps=20):
    add(folder, "tries.jsonl", event="start", step=0, total_steps=40, time="2026-01-01T00:00:00Z")
    (folder / "config.yaml").write_text("arch: xcit_pico_6_p8\nepochs: 4\n")
    for step in range(1, steps + 1):
        time = f"2026-01-01T00:00:{step:02d}+00:00"  # a step a second
        add(folder, "metrics.jsonl", step=step, time=time, loss=9.0 - step / 10, lr=1e-3)
    add(folder, "metrics.jsonl", step=steps, knn_top1=44.0)
    return folder


def text_of(state):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    with console.file:
        console.print(view(state, 100))
        return console.export_text()


def test_a_run_that_goes_on(tmp_path):
    state = RunState(begun(tmp_path / "run"))
    state.refresh()
    text = text_of(state)
    for words in ("epoch 2.0/4", "step 20/40", "eta 0:00:20", "loss", "7.000", "or was killed"):
        assert words in text, words
    assert "44.0 at step 20" in text and "█" in text and not state.ended
    add(state.folder, "metrics.jsonl", step=20, alarm_single_mode=1.0)
    state.refresh()
    assert "alarm: single mode collapse" in text_of(state)
    add(state.folder, "metrics.jsonl", step=22, alarm_single_mode=0.0)
    state.refresh()
    assert state.alarms() == []


def test_only_what_is_new_is_read_and_a_restart_is_noticed(tmp_path):
    state = RunState(begun(tmp_path / "run"))
    state.refresh()
    with open(state.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "lo')
    state.refresh()
    assert state.newest("step") == 20
    with open(state.folder / "metrics.jsonl", "a") as file:
        file.write('ss": 1.5}\n')
    state.refresh()
    assert state.newest("loss") == 1.5 and len(state.lines) == 22
    (state.folder / "metrics.jsonl").write_text('{"step": 3, "loss": 2.5}\n')
    state.refresh()
    assert [line["step"] for line in state.lines] == [3]


def test_it_is_over_when_the_try_has_ended_and_no_stage_waits(tmp_path):
    folder = begun(tmp_path / "run")
    add(folder, "tries.jsonl", event="end", step=40, reason="done", time="2026-01-01T01:00:00Z")
    state = RunState(folder)
    state.refresh()
    assert state.ended and "ended at step 40: done" in text_of(state)
    launched.write_launch(folder, {"stages": {"pretrain": {}, "knn": {}}})
    attempts.save(folder, attempts.Record("pretrain", state="done"))
    attempts.save(folder, attempts.Record("knn", state="running"))
    state.refresh()
    assert not state.ended and "pretrain done · knn running" in text_of(state)


def test_the_command_shows_once_and_refuses_what_is_no_run(tmp_path, capsys):
    assert main(["watch", str(begun(tmp_path / "run"))]) == 0
    assert "step 20/40" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert main(["watch", str(tmp_path / "empty")]) == 2
    assert main(["watch", str(tmp_path / "none")]) == 2
    assert "no such run folder" in capsys.readouterr().err


@pytest.mark.parametrize("every", ["0", "nan"])
def test_absurd_intervals_are_refused(every, capsys):
    assert main(["watch", "run", "--every", every]) == 2
