"""The guard against forgetting: its measures against plain ones, and what follows from them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.victims import TINY, final_bits, same
from xcit_dino.errors import RunError
from xcit_dino.options import replace
from xcit_dino.ssl import forgetting
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.forgetting import Judge, linear_cka, nearest, neighbors_kept
from xcit_dino.ssl.pretrain import pretrain, pretrain_with_knn
from xcit_dino.train.run.metrics import read_metrics
from xcit_dino.train.run.rollback import RollBack
from xcit_dino.train.state import all_checkpoints

RNG = np.random.default_rng(0)


def plain_neighbors(features: np.ndarray, k: int) -> list[set[int]]:
    rows = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -2)
    return [set(np.argsort(-row)[:k].tolist()) for row in cosines]


def test_neighbors_kept_is_the_plain_count():
    start, now = (RNG.standard_normal((60, d)).astype(np.float32) for d in (8, 5))
    now[:, :5] += 2 * start[:, :5]
    pairs = zip(plain_neighbors(start, 10), plain_neighbors(now, 10), strict=True)
    expected = np.mean([len(a & b) / 10 for a, b in pairs])
    assert 0.2 < expected < 0.9
    assert neighbors_kept(start, now) == pytest.approx(expected, abs=1e-9)
    assert neighbors_kept(start, 3 * start) == 1.0
    assert neighbors_kept(start[:4], now[:4]) == 1.0, "all others of four"


def test_copies_of_an_image_do_not_count_it_as_its_own_neighbor():
    features = np.repeat(RNG.standard_normal((2, 6)).astype(np.float32), 15, axis=0)
    found = nearest(features, 10)
    assert found.shape == (30, 10) and not (found == np.arange(30)[:, None]).any()


def test_cka_is_hsic_of_linear_kernels():
    one, two = (RNG.standard_normal((40, d)).astype(np.float32) for d in (7, 4))
    two[:, :4] += one[:, :4]
    center = np.eye(40) - 1 / 40
    kernels = [center @ (x.astype(float) @ x.T) @ center for x in (one, two)]

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.trace(a @ b))

    expected = hsic(*kernels) / np.sqrt(hsic(kernels[0], kernels[0]) * hsic(kernels[1], kernels[1]))
    assert linear_cka(one, two) == pytest.approx(expected, rel=1e-9)
    rotation = np.linalg.qr(RNG.standard_normal((7, 7)))[0].astype(np.float32)
    assert linear_cka(one, 5 * one @ rotation + 3) == pytest.approx(1, abs=1e-5)


def test_a_judge_warns_once_until_it_is_better(capsys):
    judge = Judge("warn", 0.5)
    kept = [1.0, 0.8, 0.4, 0.3, 0.6, 0.4]
    assert [judge(n, {"neighbors_kept": x}) for n, x in enumerate(kept)] == [0, 1, 1, 1, 4, 4]
    lines = capsys.readouterr().err.splitlines()
    assert [line[:16] for line in lines] == ["WARNING: step 2:", "WARNING: step 5:"]
    assert "40% of each image's nearest neighbors" in lines[0] and "--lr" in lines[0]


def test_a_judge_looks_at_the_other_data_where_they_are_given():
    judge = Judge("stop", 0.5, [{"step": 0, "knn_other_top1": 60.0, "neighbors_kept_other": 1.0}])
    judge(1, {"neighbors_kept": 0.1, "neighbors_kept_other": 0.9, "knn_other_top1": 31.0})
    with pytest.raises(RunError, match=r"fell from 60\.0 to 29\.0 %.*is that of step 1:"):
        judge(2, {"neighbors_kept": 1.0, "neighbors_kept_other": 0.9, "knn_other_top1": 29.0})
    with pytest.raises(RollBack) as back:
        Judge("rollback", 0.95, judge.metrics)(3, {"neighbors_kept_other": 0.9})
    assert back.value.until == 0


# -- in a run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to start from."""
    folder = tmp_path_factory.mktemp("start") / "run"
    pretrain(config(shards, folder, epochs=1))
    return folder


def config(shards: Path, folder: Path, **options: Any) -> PretrainConfig:
    return replace(PretrainConfig(), TINY | {"data_path": shards, "output_dir": folder} | options)


def kept(run: Path) -> dict[int, float]:
    return {x["step"]: x["neighbors_kept"] for x in read_metrics(run) if "neighbors_kept" in x}


def test_a_run_measures_what_is_left(shards, start, tmp_path):
    pretrain(config(shards, tmp_path / "run", init_from=start))
    found = kept(tmp_path / "run")
    assert list(found) == [0, 5, 10, 15, 20] and found[0] == 1.0
    line = next(x for x in read_metrics(tmp_path / "run") if "feature_cka" in x)
    assert line["feature_cka"] == pytest.approx(1)
    # the last value, from the two files
    saved = np.load(tmp_path / "run" / "start_features.npz")
    assert saved["features"].shape[0] == 20
    pretrain(config(shards, tmp_path / "off", init_from=start, forgetting_every=0))
    assert not kept(tmp_path / "off")
    assert same(final_bits(tmp_path / "run"), final_bits(tmp_path / "off")), "it disturbs nothing"


def test_fractions_of_an_epoch_and_unlabeled_data(unlabeled, start, tmp_path):
    options = {"init_from": start, "forgetting_every": 0.5, "epochs": 2, "batch_size_per_gpu": 2}
    pretrain_with_knn(config(unlabeled, tmp_path / "run", **options))
    assert list(kept(tmp_path / "run")) == [0, 2, 4, 6, 8]


def test_resuming_measures_the_same(shards, start, tmp_path):
    for folder, stops in (("whole", (0,)), ("parts", (3, 11, 0))):
        for stop in stops:
            options = {"init_from": start, "max_steps": stop, "on_forgetting": "rollback"}
            pretrain(config(shards, tmp_path / folder, forgetting_threshold=0.0, **options))
    assert kept(tmp_path / "whole") == kept(tmp_path / "parts")
    assert same(final_bits(tmp_path / "whole"), final_bits(tmp_path / "parts"))


def forget(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Measurements after these steps, once each, find little left."""
    inner, left = forgetting.Drift.__call__, list(steps)

    def drift(self: Any, backbone: Any, step: int) -> dict[str, float]:
        found = inner(self, backbone, step)
        if step in left:
            left.remove(step)
            found["neighbors_kept"] = 0.2
        else:
            found["neighbors_kept"] = 0.9
        return found

    monkeypatch.setattr(forgetting.Drift, "__call__", drift)


def test_roll_back_restores_what_is_known(shards, start, tmp_path, monkeypatch, capfd):
    forget(monkeypatch, 10)
    pretrain(config(shards, tmp_path / "run", init_from=start, on_forgetting="rollback"))
    words = capfd.readouterr().err
    assert re.search(r"step 10: .*20% of each image.*back to checkpoint-00000005.pth, now 0.5",
                     words)  # fmt: skip
    lines = {x["step"]: x["lr"] for x in read_metrics(tmp_path / "run") if "lr" in x}
    pretrain(config(shards, tmp_path / "off", init_from=start, forgetting_every=0))
    whole = {x["step"]: x["lr"] for x in read_metrics(tmp_path / "off") if "lr" in x}
    ratio = {step: lines[step] / whole[step] for step in whole if whole[step]}
    assert all(r == pytest.approx(1 if step <= 5 else 0.5) for step, r in ratio.items())
    assert list(kept(tmp_path / "run")) == [0, 5, 10, 15, 20]


def test_a_stopped_run_goes_on_elsewhere(shards, start, tmp_path, monkeypatch):
    forget(monkeypatch, 10)
    run, options = tmp_path / "run", {"on_forgetting": "stop", "forgetting_every": 1.0}
    with pytest.raises(RunError, match="The last good checkpoint is that of step 5"):
        pretrain(config(shards, run, init_from=start, **options))
    good = run / "checkpoints" / "checkpoint-00000005.pth"
    pretrain(config(shards, tmp_path / "on", init_from=good, epochs=2, **options))


def test_roll_back_to_the_starting_weights(shards, start, tmp_path, monkeypatch, capfd):
    forget(monkeypatch, 5)
    options = {"init_from": start, "on_forgetting": "rollback", "epochs": 2}
    pretrain(config(shards, tmp_path / "run", **options))
    assert "back to checkpoint-00000000.pth" in capfd.readouterr().err
    assert final_bits(tmp_path / "run")["rollbacks"] == 1


def test_a_roll_back_that_does_not_help_leads_further_back(
    shards, start, tmp_path, monkeypatch, capfd
):
    """The student is far away when its average shows it: 15, half of 15, a quarter of 15."""
    forget(monkeypatch, 20, 20, 20)
    options = {"init_from": start, "on_forgetting": "rollback", "saveckp_freq": 1}
    pretrain(config(shards, tmp_path / "run", **options))
    found = re.findall(
        r"step (\d+): the starting.*back to checkpoint-(\d+).pth, now ([.\d]+)",
        capfd.readouterr().err,
    )
    assert found == [
        ("20", "00000015", "0.5"), ("20", "00000005", "0.25"), ("20", "00000000", "0.125")
    ]  # fmt: skip
    assert final_bits(tmp_path / "run")["step"] == 20


def test_the_good_checkpoint_stays_until_a_later_one_is_good(shards, start, tmp_path, monkeypatch):
    """With measurements rarer than checkpoints, more than --keep_checkpoints may follow it."""
    forget(monkeypatch, 20)
    options = {"init_from": start, "on_forgetting": "rollback", "forgetting_every": 4}
    with pytest.MonkeyPatch.context() as inside:
        inside.setattr("xcit_dino.train.run.rollback.MAX_ROLLBACKS", 0)
        with pytest.raises(RunError, match="despite 0 roll-backs: change: a lower --lr"):
            pretrain(config(shards, tmp_path / "run", keep_checkpoints=1, **options))
    found = [path.name for path in all_checkpoints(tmp_path / "run" / "checkpoints")]
    assert found == ["checkpoint-00000000.pth"], "what was forgotten is given up"


def test_lost_features_of_the_start_end_no_run(shards, start, tmp_path, capfd):
    options = {"init_from": start, "on_forgetting": "stop", "epochs": 2}
    pretrain(config(shards, tmp_path / "run", max_steps=5, **options))
    (tmp_path / "run" / "start_features.npz").write_bytes(b"damaged")
    pretrain(config(shards, tmp_path / "run", **options))
    assert "forgetting is not measured" in capfd.readouterr().err
    assert final_bits(tmp_path / "run")["step"] == 10
