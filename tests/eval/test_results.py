"""Results are written to results.json and, next to the options, to TensorBoard, immediately."""

from __future__ import annotations

import json
import multiprocessing

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from xcit_dino.errors import InputError, RunError
from xcit_dino.eval.results import write_result
from xcit_dino.provenance import digest, read_results, record_result
from xcit_dino.train.run.reader import read_run
from xcit_dino.train.run.tensorboard_log import HPARAMS, Board


def test_each_evaluation_is_in_tensorboard_when_it_ends(tmp_path):
    (tmp_path / "config.yaml").write_text("arch: demo\nlr: 0.5\nseed: 3\n")
    board = Board(tmp_path, 0)  # the run goes on
    write_result(tmp_path, "knn", {"top1_k20": 40.0}, {})
    write_result(tmp_path, "knn/random", {"top1_k20": 10.0}, {})
    write_result(tmp_path, "linear", {"top1": 50.0}, {})
    board.add(1, {"loss": 2.0})
    board.close()
    final = EventAccumulator(str(tmp_path / HPARAMS)).Reload()
    assert [(tag, final.Scalars(tag)[0].value) for tag in sorted(final.Tags()["scalars"])] == [
        ("final/knn", 40.0),
        ("final/linear", 50.0),
    ]
    assert EventAccumulator(str(tmp_path)).Reload().Scalars("loss/loss")[0].value == 2.0


def test_weights_from_elsewhere_have_no_options_to_show(tmp_path):
    write_result(tmp_path, "knn", {"top1_k20": 40.0}, {})
    assert list(read_results(tmp_path)) == ["knn"] and not (tmp_path / HPARAMS).exists()


def test_another_protocol_is_another_result(tmp_path):
    small, large = {"crop": 32, "network": "teacher"}, {"crop": 64, "network": "teacher"}
    write_result(tmp_path, "knn", {"top1_k20": 40.0}, small)
    write_result(tmp_path, "knn", {"top1_k20": 63.8}, large)
    found = read_results(tmp_path)
    assert found["knn"]["metrics"] == {"top1_k20": 63.8}
    assert found[f"knn@{digest(small)}"]["metrics"] == {"top1_k20": 40.0}
    write_result(tmp_path, "knn", {"top1_k20": 41.0}, small)  # measured again
    found = read_results(tmp_path)
    assert found.keys() == {"knn", f"knn@{digest(large)}"}
    assert [e["protocol"]["crop"] for e in read_run(tmp_path).entries("knn")] == [32, 64]


def test_another_network_is_another_result(tmp_path):
    for network, top1 in (("model", 67.8), ("model_ema", 12.0)):
        write_result(tmp_path, "evaluate", {"top1": top1}, {"network": network, "weights": "w"})
    found = {e["protocol"]["network"]: e["metrics"] for e in read_run(tmp_path).entries("evaluate")}
    assert found == {"model_ema": {"top1": 12.0}, "model": {"top1": 67.8}}


def test_files_of_earlier_versions_are_read_and_kept(tmp_path):
    old = {"knn": {"metrics": {"top1_k20": 3.0}, "protocol": {"crop": 8}}, "linear": {"top1": 2}}
    (tmp_path / "results.json").write_text(json.dumps(old))
    write_result(tmp_path, "knn", {"top1_k20": 4.0}, {"crop": 16})
    write_result(tmp_path, "linear", {"top1": 5.0}, {"crop": 16})
    found = read_results(tmp_path)
    assert found[f"knn@{digest({'crop': 8})}"] == old["knn"] and old["linear"] in found.values()
    assert read_run(tmp_path).top1("knn") == 4.0


def add_results(folder, worker):
    for number in range(8):
        record_result(folder, f"knn/{worker}-{number}", {"top1_k20": number}, {"worker": worker})


def test_results_that_come_at_once_are_all_kept(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=add_results, args=(tmp_path, n)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(read_results(tmp_path)) == 32
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", ".results.lock"}


def test_a_damaged_file_loses_no_new_result(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"knn": {"metr')
    with pytest.raises(InputError, match=r"results\.json: is damaged"):
        read_results(tmp_path)
    write_result(tmp_path, "knn", {"top1_k20": 4.0}, {})
    assert list(read_results(tmp_path)) == ["knn"]
    assert (tmp_path / "results.json.damaged").read_text() == '{"knn": {"metr'
    assert "set aside as results.json.damaged" in capsys.readouterr().err


def test_a_result_that_cannot_be_stored_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="the result above is not stored.*--output_dir"):
        write_result(tmp_path / "file" / "run", "knn", {"top1_k20": 4.0}, {})
