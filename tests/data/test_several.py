"""Images with several labels each: tables of all usual forms, packed, checked, read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xcit_dino.cli import main
from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.data.targets.several import target_table

LABELS = {"a": ["cat", "dog"], "b": [], "c": ["dog"], "d": ["bird", "cat"]}
JOINED = "image,finding\na.png,{}\nb.png,\nc.png,dog\nd.png,{}\n"
TABLES = {
    "bars": JOINED.format("cat|dog", "bird|cat"),
    "commas": JOINED.format('"cat, dog"', '"bird,cat"'),
    "spaces": JOINED.format("cat dog", "bird cat"),
    "tabs": JOINED.format("cat;dog", "bird;cat").replace(",", "\t"),
    "columns": "path,bird,cat,dog,split\na.png,0,1,1,train\nb.png,0,0,0,train\nc.png,0,0,1,train\n"
    "d.png,1,1,0,train\n",
    "rows": "image,label\na.png,cat\na.png,dog\nb.png,\nc.png,dog\nd.png,cat\nd.png,bird\n",
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate([*LABELS, "e"]):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(folder / f"{name}.png")
    return folder


def make(photos: Path, table: Path, *words: object) -> int:
    command = ["shards", "make", photos, photos.parent / "out", "--multi_labels", table, *words]
    return main([*map(str, command), "--num_workers", "1", "--shuffle", "false"])


@pytest.mark.parametrize("form", TABLES)
def test_every_form_of_a_table(photos: Path, tmp_path: Path, capsys, form: str) -> None:
    table = tmp_path / "labels.csv"
    table.write_text(TABLES[form])
    assert make(photos, table) == 0
    printed = capsys.readouterr().out
    assert "4 images with several labels of 3 classes" in printed
    assert "skipped: 1 images that --multi_labels does not name" in printed
    assert "1 images have none of the labels" in printed
    index = ShardIndex.load(tmp_path / "out")
    assert index.targets == "labels" and index.target_classes == ["bird", "cat", "dog"]
    found, known = target_table(index, LoaderConfig())
    expected = [[name in labels for name in ("bird", "cat", "dog")] for labels in LABELS.values()]
    assert np.array_equal(found, expected) and known.all()
    assert main(["shards", "check", str(tmp_path / "out"), "--num_workers", "1"]) == 0
    assert "labels of 3 classes" in capsys.readouterr().out
    main(["shards", "check", str(tmp_path / "out"), "--rebuild", "true", "--num_workers", "1"])
    again = ShardIndex.load(tmp_path / "out")
    assert again.targets == "labels" and again.target_classes == index.target_classes


def test_patients_stay_on_one_side(photos: Path, tmp_path: Path, capsys) -> None:
    table = tmp_path / "labels.csv"
    rows = "a.png,cat|dog,1\nb.png,,1\nc.png,dog,2\nd.png,cat|bird,2\n"
    table.write_text(f"image,finding,patient\n{rows}")
    assert make(photos, table, "--group_column", "patient", "--val_fraction", 0.5) == 0
    assert "val: 1 of 2 values of patient, 2 of 4 images" in capsys.readouterr().out
    for split in ("train", "val"):
        index = ShardIndex.load(tmp_path / "out" / split)
        assert index.target_classes == ["bird", "cat", "dog"] and index.num_samples == 2


def test_values_are_packed_by_columns(photos: Path, tmp_path: Path, capsys) -> None:
    table = tmp_path / "values.csv"
    rows = "a.png,3,1.5,x\nb.png,4,-2e3,y\nc.png,5,,z\nd.png,6,0,w\n"
    table.write_text(f"image,age,size,note\n{rows}")
    words = ["shards", "make", photos, tmp_path / "out", "--values", table, "--num_workers", 1]
    assert main([*map(str, words), "--shuffle", "false"]) == 0
    printed = capsys.readouterr().out
    assert (
        "values of values.csv: age, size" in printed
        and "1 rows of values.csv with a gap" in printed
    )
    assert "3 images with values of age, size" in printed
    index = ShardIndex.load(tmp_path / "out")
    assert index.targets == "values" and index.target_classes == ["age", "size"]
    found, known = target_table(index, LoaderConfig())
    assert found.tolist() == [[3, 1.5], [4, -2000], [6, 0]] and known.all()
    assert main(["shards", "check", str(tmp_path / "out"), "--num_workers", "1"]) == 0
    assert "values of age, size, 0 images without" in capsys.readouterr().out
    words[3] = tmp_path / "age"
    assert main([*map(str, words), "--label_column", "age"]) == 0
    assert ShardIndex.load(tmp_path / "age").target_classes == ["age"]
    words[3] = tmp_path / "note"
    assert main([*map(str, words), "--label_column", "note"]) == 2
    assert "not every cell of note is a number" in capsys.readouterr().err


def test_columns_that_are_not_read_are_named(photos: Path, tmp_path: Path, capsys) -> None:
    """Such as CheXpert's, where -1 is uncertain, and measurements below a limit."""
    table = tmp_path / "labels.csv"
    table.write_text("path,age,edema,mass\na.png,50,1,1.0\nb.png,60,0,-1.0\nc.png,,1,\n")
    assert make(photos, table) == 0
    printed = capsys.readouterr().out
    assert "labels of labels.csv: 1 (edema)" in printed
    assert "columns not read: age (50), mass (-1.0)\n" in printed
    table.write_text("path,age,size\na.png,50,1\nb.png,60,<5\n")
    words = ["shards", "make", photos, tmp_path / "v", "--values", table, "--num_workers", 1]
    assert main([*map(str, words)]) == 0
    assert "columns not read: size (<5)\n" in capsys.readouterr().out
    words[3] = tmp_path / "w"
    assert main([*map(str, words), "--label_column", "age"]) == 0
    assert "not read" not in capsys.readouterr().out


def test_an_image_has_one_row_of_values(photos: Path, tmp_path: Path, capsys) -> None:
    table = tmp_path / "values.csv"
    words = ["shards", "make", photos, tmp_path / "v", "--values", table, "--num_workers", 1]
    for rows, shown in (("a.png,3\na.png,4\n", "3 and 4"), ("a.png,\na.png,4\n", "a gap and 4")):
        table.write_text(f"path,age\n{rows}b.png,5\n")
        assert main([*map(str, words)]) == 2
        error = capsys.readouterr().err
        assert f"a.png has two rows, {shown}; keep one row for each image" in error
    table.write_text("path,age\na.png,3\na.png,3.0\nb.png,5\n")
    assert main([*map(str, words)]) == 0


def test_bad_tables_are_refused(photos: Path, tmp_path: Path, capsys) -> None:
    table = tmp_path / "labels.csv"

    def refused(text: str, *words: object) -> str:
        table.write_text(text)
        assert make(photos, table, *words) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "its first line must name the columns" in refused("a.png,cat\n")
    assert "its first line must name the columns" in refused("")
    assert "name it with --label_column" in refused("image,x,y\na.png,cat,1 2\n")
    assert "has no such column" in refused(TABLES["bars"], "--label_column", "z")
    assert "names none of the images" in refused("image,label\nz.png,cat\n")
    same = refused(TABLES["bars"], "--label_column", "finding", "--group_column", "finding")
    assert "--group_column names it too" in same
    both = refused(TABLES["bars"], "--boxes", table)
    assert "--boxes and --multi_labels: an image has one target" in both
    assert "leave one of them out" in refused(TABLES["bars"], "--labels", table)
    assert make(photos, tmp_path / "none.csv") == 2
    assert make(photos, table, "--label_column", "finding") == 0
