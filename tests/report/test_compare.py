"""Runs compared: ranked only where the protocols are equal; otherwise the fields that differ."""

from __future__ import annotations

import math

import pytest

from xcit_dino.cli import main
from xcit_dino.provenance import record_result
from xcit_dino.report.compare import differences, rank
from xcit_dino.train.run.reader import read_run, read_runs

PROTOCOL = {"crop": 224, "temperature": 0.07, "val_images": 10_000, "weights": "a", "arch": "x"}


def make(folder, top1, **protocol):
    record_result(folder, "knn", {"top1_k20": top1, "top5_k20": 90.0}, PROTOCOL | protocol)
    return folder


def test_the_better_of_equal_protocols(tmp_path, capsys):
    a, b = make(tmp_path / "a", 50.0), make(tmp_path / "b", 60.0, weights="b", arch="y")
    (ranking,) = rank([read_run(a), read_run(b)])
    assert ranking.best == 1 and not ranking.differences
    assert ranking.error == pytest.approx(math.sqrt((50 * 50 + 60 * 40) / 10_000))
    assert main(["report", "compare", str(a), str(b)]) == 0
    output = capsys.readouterr().out
    assert "60.00 best" in output and "lead 10.00 ± 0.7" in output


def test_different_protocols_are_refused_and_the_field_named(tmp_path, capsys):
    a, b = make(tmp_path / "a", 50.0), make(tmp_path / "b", 60.0, crop=32)
    assert main(["report", "compare", str(a), str(b)]) == 2
    output = capsys.readouterr()
    assert "crop 224 / 32" in " ".join(output.out.split()) and "best" not in output.out
    assert "nothing can be ranked: the protocols differ in crop" in output.err


def test_damaged_results_are_named(tmp_path, capsys):
    a, b = make(tmp_path / "a", 50.0), make(tmp_path / "b", 60.0)
    (b / "config.yaml").write_text("arch: x\n")
    (b / "results.json").write_text((b / "results.json").read_text()[:50])
    assert main(["report", "compare", str(a), str(b)]) == 2
    assert f"{b / 'results.json'}: is damaged" in capsys.readouterr().err


def test_one_comparable_evaluation_is_enough(tmp_path):
    a, b = make(tmp_path / "a", 50.0), make(tmp_path / "b", 60.0, crop=32)
    for folder, top1 in ((a, 70.0), (b, 70.0)):
        record_result(folder, "linear", {"top1": top1}, {"crop": 224})
    assert main(["report", "compare", str(a), str(b)]) == 0
    assert [r.verdict[:10] for r in rank([read_run(a), read_run(b)])] == ["not ranked", "equal"]


def test_a_missing_or_nested_field_differs():
    found = differences(
        [{"a": 1, "recipe": {"lr": 1, "seed": 0}}, {"recipe": {"lr": 2, "seed": 1}}]
    )
    assert found == {"a": [1, None], "recipe.lr": [1, 2]}


def test_runs_of_one_name_go_by_their_paths(tmp_path):
    folders = [make(tmp_path / place / "run", 50.0) for place in ("here", "there")]
    assert [run.name for run in read_runs(folders)] == [str(folder) for folder in folders]
    assert [run.name for run in read_runs(folders[:1])] == ["run"]


def test_nothing_in_common_and_too_few_runs(tmp_path, capsys):
    a, b = make(tmp_path / "a", 50.0), tmp_path / "b"
    record_result(b, "linear", {"top1": 3.0}, {})
    assert main(["report", "compare", str(a), str(b)]) == 2
    assert "no evaluation in two" in capsys.readouterr().err
    assert main(["report", "compare", str(a)]) == 2
    assert main(["report", "compare"]) == 2
    assert "two run folders" in capsys.readouterr().err


def test_an_averaged_network_is_not_ranked_against_a_raw_one(tmp_path, capsys):
    a = make(tmp_path / "a", 48.8, network="model")
    b = make(tmp_path / "b", 12.0, network="model_ema")
    assert main(["report", "compare", str(a), str(b)]) == 2
    output = capsys.readouterr()
    assert "network model / model_ema" in " ".join(output.out.split()) and "lead" not in output.out
    assert differences([{"network": "teacher"}, {"network": "student"}])


def test_a_file_of_an_unspecified_network_is_ranked_with_a_note(tmp_path):
    a = make(tmp_path / "a", 50.0, network="teacher")
    b = make(tmp_path / "b", 60.0, network="model")
    (ranking,) = rank([read_run(a), read_run(b)])
    assert ranking.best == 1
    assert ranking.verdict == "lead 10.00 ± 0.7 points (network teacher / model)"


def test_results_of_one_protocol_find_each_other(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, top1, crop in ((a, 50.0, 224), (a, 55.0, 96), (b, 58.0, 96), (b, 60.0, 224)):
        make(folder, top1, crop=crop)
    wide, narrow = rank([read_run(a), read_run(b)])
    assert (narrow.title, narrow.top1) == ("k-NN, k = 20 (crop 224)", [50.0, 60.0])
    assert (wide.title, wide.top1) == ("k-NN, k = 20 (crop 96)", [55.0, 58.0])
    make(b, 70.0, crop=32)
    *_, newest = rank([read_run(a), read_run(b)])
    assert newest.differences == {"crop": [96, 32]}, "newest results without a match"


def test_the_number_of_images_may_stand_beside_the_protocol_or_with_another_result(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, top1 in ((a, 50.0), (b, 60.0)):
        record_result(folder, "linear", {"top1": top1}, {"val_index": "v"})
    assert verdicts(a, b) == ["lead 10.00 points, ± not known"]
    record_result(b, "knn", {"top1_k20": 1.0}, PROTOCOL | {"val_index": "v"})
    assert verdicts(a, b)[1] == "lead 10.00 ± 0.7 points"
    record_result(a, "linear", {"top1": 50.0}, {"val_index": "v"}, val_images=100)
    assert verdicts(a, b)[1] == "lead 10.00 ± 7.0 points"


def verdicts(*folders):
    return [ranking.verdict for ranking in rank(read_runs(folders))]
