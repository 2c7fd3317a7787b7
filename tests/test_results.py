"""Results go into results.json and, beside the options, into TensorBoard, at once."""

from __future__ import annotations

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from xcit_dino.eval.results import write_result
from xcit_dino.train.board import HPARAMS, Board
from xcit_dino.train.provenance import read_results


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
