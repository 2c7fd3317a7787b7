"""The features that `embed` writes, against the network; which image each row belongs to."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.eval.test_features import broken_copy
from xcit_dino.cli import main
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError
from xcit_dino.eval import embed, features
from xcit_dino.eval.config import EmbedConfig
from xcit_dino.eval.features import load_features
from xcit_dino.eval.neighbors import nearest_others
from xcit_dino.eval.target import pretrained, resolve
from xcit_dino.files import file_checksum, unfinished_folder
from xcit_dino.train.distributed.dist import init as cpu_world


def rows_of(folder):
    with (folder / "images.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_the_networks_features_and_their_images(run_folder, tmp_path):
    config = run_folder.target(baselines=True)
    embed.run(EmbedConfig(tmp_path / "out", config, split="val", examples=3))
    target, context = resolve(config, cpu_world("cpu"))
    index = context.index("val")
    expected = load_features(pretrained(target), index, "val", context)
    found = np.load(tmp_path / "out" / "features.npy")
    np.testing.assert_array_equal(found, expected.blocks["cls"])
    rows = rows_of(tmp_path / "out")
    assert [int(row["label"]) for row in rows] == index.labels.tolist()
    assert rows[0]["class"] == index.classes[index.labels[0]] and rows[5]["row"] == "5"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"features-random.npy", "features-pixels.npy", "neighbors-pixels.png"} <= names
    with Image.open(tmp_path / "out" / "neighbors.png") as picture:
        assert picture.height == 3 * 132


def test_images_without_labels_and_unreadable_ones(run_folder, unlabeled, tmp_path, capsys):
    broken = broken_copy(ShardIndex.load(unlabeled / "val"), unlabeled / "broken")
    shutil.rmtree(unlabeled / "train")
    broken.rename(unlabeled / "train")
    words = ["--output_dir", run_folder.path, "--device", "cpu"]
    words += ["--pretrained_weights", run_folder.weights, "--num_workers", 0]
    found = run_folder.path / "embeddings" / "train"
    assert main(["embed", *map(str, words)]) == 0
    words += ["--data_path", unlabeled]
    for replaced in (1, 0):  # takes the place of the one before, with a name as it was
        assert main(["embed", *map(str, words)]) == 0
        assert capsys.readouterr().out.count("in place of those of other images") == replaced
        assert not (found / "neighbours.png").exists()
        (found / "neighbors.png").rename(found / "neighbours.png")
    rows = rows_of(found)
    assert len(np.load(found / "features.npy")) == len(rows) == 7
    assert "5" not in [row["sample"] for row in rows]
    assert {(row["label"], row["class"], row["source"]) for row in rows} == {("", "", "")}
    assert all(row["key"] for row in rows)


def test_a_row_says_which_file_it_was_packed_from(run_folder, tmp_path):
    photos = tmp_path / "photos"
    for number in range(9):
        kind = "png" if number % 2 else "jpg"  # in the tar one before .json, the other behind it
        path = photos / f"{'a' * 90}é {number % 3}" / f"my photo {number}, {'x' * 90}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (20 * number, 0, 0)).save(path)
    shards = tmp_path / "packed"
    assert main(["shards", "make", str(photos), str(shards), "--shard_size", "4"]) == 0
    config = run_folder.target(data_path=str(shards))
    embed.run(EmbedConfig(tmp_path / "out", config, examples=0))
    rows = rows_of(tmp_path / "out")
    assert len({row["shard"] for row in rows}) == 3
    index = ShardIndex.load(shards)
    for row in rows:
        shard, offset, size = index.locate(int(row["sample"]))
        with open(index.path(shard), "rb") as file:
            packed = file.read()[offset : offset + size]
        assert (photos / row["source"]).read_bytes() == packed
        assert row["class"] == row["source"].partition("/")[0]


def test_accuracies_take_their_images_from_the_same_features(run_folder, tmp_path, monkeypatch):
    config = run_folder.target()
    embed.run(EmbedConfig(tmp_path / "out", config, split="val", examples=0))
    monkeypatch.setattr(features, "_compute", None)  # would be called to compute them again
    target, context = resolve(config, cpu_world("cpu"))
    index = context.index("val")
    assert len(load_features(pretrained(target), index, "val", context)) == 48


def test_the_nearest_of_a_copy_is_its_original(run_folder, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(embed, "mosaic", lambda rows: (shown.append(rows), rows[0][0])[1])
    embed.run(EmbedConfig(tmp_path / "out", run_folder.target(), split="val", examples=48))
    table = np.load(tmp_path / "out" / "features.npy").astype(np.float64)
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    similar = unit @ unit.T
    np.fill_diagonal(similar, -1)
    order = np.random.default_rng(0).choice(48, 48, replace=False)
    nearest = similar.argmax(1)
    (queries, others) = shown
    pixels = {int(n): row[0].tobytes() for n, row in zip(order, queries, strict=True)}
    for n, row in zip(order.tolist(), others, strict=True):
        assert len(row) == embed.NEIGHBORS
        equal = np.flatnonzero(similar[n] >= similar[n, nearest[n]] - 5e-7)  # a tie in float32
        assert row[0].tobytes() in {pixels[int(other)] for other in equal}


def test_another_folder_is_not_replaced(run_folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "mine" / "images.csv").write_text("y")
    with pytest.raises(InputError, match="mine: holds thesis.tex, not of embed"):
        embed.run(EmbedConfig(tmp_path / "mine", run_folder.target()))
    assert len(list((tmp_path / "mine").iterdir())) == 2
    with pytest.raises(InputError, match="thesis.tex: Not a directory"):
        embed.run(EmbedConfig(tmp_path / "mine" / "thesis.tex", run_folder.target()))


def test_nearest_others_by_brute_force_copies_included():
    numbers = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    numbers[10:25] = numbers[3]
    rows = np.array([0, 3, 24, 39])
    found, cosines = nearest_others(numbers, rows, 5)
    unit = numbers / np.linalg.norm(numbers, axis=1, keepdims=True)
    similar = unit[rows] @ unit.T
    similar[range(len(rows)), rows] = -2
    np.testing.assert_allclose(cosines, -np.sort(-similar, 1)[:, :5], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(similar, found, 1), cosines, atol=1e-6)
    assert nearest_others(numbers[:3], np.arange(3), 5)[0].shape == (3, 2)


def test_the_report_of_a_run_without_labels_shows_them(run_folder, unlabeled):
    config = run_folder.path / "config.yaml"
    config.write_text(config.read_text().replace(str(run_folder.data), str(unlabeled)))
    where = ["--output_dir", str(run_folder.path)]
    weights = ["--pretrained_weights", str(run_folder.weights), "--num_workers", "0"]
    shown = []
    for words in (["report"], ["embed", *weights], ["report"]):
        assert main([*words, *where]) == 0
        page = run_folder.path / "report.html"
        shown.append("<h2>Did it learn?" in page.read_text() if page.is_file() else False)
    assert shown == [False, False, True]
    assert "embed, if there are no labels" not in page.read_text()


def test_what_fails_leaves_nothing_and_the_folder_before_as_it_was(run_folder, tmp_path):
    dst = tmp_path / "out"
    embed.run(EmbedConfig(dst, run_folder.target(), split="val", examples=0))
    before = {path.name: path.read_bytes() for path in dst.iterdir()}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(embed, "write_names", lambda *_: (_ for _ in ()).throw(OSError("full")))
        embed.run(EmbedConfig(dst, run_folder.target(), split="val", examples=0))
    assert {path.name: path.read_bytes() for path in dst.iterdir()} == before
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".out")] == []


def test_a_run_folder_elsewhere_gives_arch_and_data(run_folder, tmp_path):
    """The remedy for a run folder that cannot be written to."""
    elsewhere = run_folder.target(
        output_dir=tmp_path / "elsewhere", pretrained_weights=run_folder.path
    )
    checkpoints = run_folder.path / "checkpoints"
    checkpoints.mkdir()
    weights = run_folder.weights.rename(checkpoints / "checkpoint-00000001.pth")
    facts = {"bytes": weights.stat().st_size, "sha256": file_checksum(weights)}
    weights.with_suffix(".json").write_text(json.dumps(facts))
    embed.run(EmbedConfig(None, elsewhere, split="val", examples=0))
    assert (tmp_path / "elsewhere" / "embeddings" / "val" / "features.npy").is_file()


def test_a_refused_folder_leaves_nothing(tmp_path):
    kept = tmp_path / "run"
    kept.mkdir()
    with pytest.raises(InputError), unfinished_folder(kept / "embeddings" / "train") as folder:
        (folder / "features.npy").touch()
        raise InputError("no weights")
    assert list(kept.iterdir()) == []
