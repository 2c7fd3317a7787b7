"""What the loop does for every kind of training."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from tests.trainings import train
from tests.victims import assert_nothing_lost
from xcit_dino.errors import RunError
from xcit_dino.supervised import train as supervised
from xcit_dino.train.nonfinite import Skips
from xcit_dino.train.run.metrics import read_metrics
from xcit_dino.train.state import load_checkpoint, newest_checkpoint


def spoil(monkeypatch: pytest.MonkeyPatch, first: int, last: int, until_rollbacks: int) -> None:
    """Infinite gradients in some steps (from 1) while the run was rolled back less."""
    inner = supervised.forward_backward

    def forward_backward(trainer, batch, step, num_micro, **options):
        loss = inner(trainer, batch, step, num_micro, **options)
        if first <= step + 1 <= last and trainer.state.rollbacks < until_rollbacks:
            for parameter in trainer.model.parameters():
                parameter.grad.mul_(float("inf"))
        return loss

    monkeypatch.setattr(supervised, "forward_backward", forward_backward)


@pytest.mark.parametrize("name", ["finetune", "distill"])
def test_supervised_trainings_roll_back_too(name, shards, tmp_path, monkeypatch, capfd):
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(name, shards, whole)
    spoil(monkeypatch, 7, 9, until_rollbacks=1)
    train(name, shards, run, max_skipped=2)
    assert "rolled back to checkpoint-00000005.pth, now 0.5" in capfd.readouterr().err
    path = newest_checkpoint(run)
    assert path is not None
    saved = load_checkpoint(path)
    assert saved["step"] == 10 and saved["rollbacks"] == 1
    rates = [{x["step"]: x["lr"] for x in read_metrics(f) if "lr" in x} for f in (whole, run)]
    assert [rates[1][step] / rates[0][step] for step in (5, 10)] == pytest.approx([1, 0.5])
    lines = [json.loads(line) for line in (run / "nonfinite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [7, 8] and len(lines[0]["keys"]) == 4


def test_a_supervised_training_stops_where_it_is_to(shards, tmp_path, monkeypatch):
    spoil(monkeypatch, 7, 99, until_rollbacks=9)
    with pytest.raises(RunError, match="the last checkpoint predates them"):
        train("finetune", shards, tmp_path / "run", max_skipped=2, on_nonfinite="stop")


@pytest.mark.parametrize(
    ("scaled", "first", "said"),
    [
        (True, "the gradient of student.head", ""),
        (True, "", ""),
        (
            True,
            "the output of student.backbone",
            "step 3 skipped: non-finite on rank 0: the output",
        ),
        (False, "the gradient of student.head", "step 3 skipped: non-finite on rank 0: the grad"),
        (False, "", "step 3 skipped: non-finite on rank 0: nothing on this rank"),
    ],
)
def test_only_gradients_that_overflow_in_fp16_are_no_news(scaled, first, said, tmp_path, capfd):
    skips = Skips(2, False, {}, lambda *_: first, lambda _: [], tmp_path, scaled)
    skips.add(3, torch.ones(()), [])
    shown = capfd.readouterr().err
    assert said in shown and bool(said) == bool(shown)
    (line,) = map(json.loads, (tmp_path / "nonfinite.jsonl").read_text().splitlines())
    assert (line["step"], line["first"]) == (3, first)
    with pytest.raises(RunError, match="2 steps in a row"):
        skips.add(4, torch.ones(()), [])


@pytest.fixture
def url(shards: Path) -> Iterator[str]:
    """The shards on a web server."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shards))) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("name", ["pretrain", "finetune", "distill"])
def test_shards_of_another_machine_train_the_same(name, shards, url, tmp_path):
    """The index lies here, the shards on a server; the validation set is read from there too."""
    indexes = tmp_path / "indexes"
    shutil.copytree(shards, indexes, ignore=shutil.ignore_patterns("*.tar"))
    train(name, shards, tmp_path / "local")
    remote = {"shard_url": f"{url}/{{split}}", "cache_dir": tmp_path / "cache"}
    train(name, indexes, tmp_path / "remote", **remote)
    assert_nothing_lost(tmp_path / "remote", tmp_path / "local")
    top1 = [
        [line["val_top1"] for line in read_metrics(tmp_path / run) if "val_top1" in line]
        for run in ("local", "remote")
    ]
    assert top1[0] == top1[1] and bool(top1[0]) == (name != "pretrain")
