"""A validation set from a source without one: whole groups on one side, or a share of classes."""

from __future__ import annotations

import csv
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xcit_dino.cli import main
from xcit_dino.data.shards.index import ShardIndex


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """60 images of 12 patients, 3 to 7 each; a patient's images are of one class."""
    rows, counts = [], [3, 4, 5, 6, 7, 5] * 2
    for patient, count in enumerate(counts):
        for n in range(count):
            name = f"scan/{patient:02d}-{n}.png"
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), 4 * len(rows), np.uint8)).save(path)
            rows.append({"path": name, "label": "ab"[patient % 2], "patient": f"P{patient}"})
    write(tmp_path / "list.csv", rows)
    return tmp_path


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def make(*words: object) -> int:
    return main(["shards", "make", *map(str, words), "--num_workers", "1"])


def packed(folder: Path) -> dict[str, list[str]]:
    """Names of the files that were packed, by split."""
    found: dict[str, list[str]] = {}
    for split in sorted(folder.iterdir()):
        found[split.name] = []
        for shard in split.glob("*.tar"):
            with tarfile.open(shard) as tar:
                found[split.name] += [
                    Path(json.load(tar.extractfile(m))["source"]).name  # type: ignore[arg-type]
                    for m in tar
                    if m.name.endswith(".json")
                ]
    return found


def patients(names: list[str]) -> set[str]:
    return {name.partition("-")[0] for name in names}


@pytest.mark.parametrize("as_list", [True, False])
def test_a_patient_is_on_one_side(scans: Path, capsys, as_list: bool) -> None:
    words = [scans / "list.csv"] if as_list else [scans / "scan"]
    words += [scans / "out"] + ([] if as_list else ["--labels", scans / "list.csv"])
    words += ["--label_column", "label", "--group_column", "patient", "--val_fraction", 0.3]
    assert make(*words) == 0
    found = packed(scans / "out")
    assert set(found) == {"train", "val"} and sum(map(len, found.values())) == 60
    assert not patients(found["train"]) & patients(found["val"])
    assert 12 <= len(found["val"]) <= 18
    printed = capsys.readouterr().out
    count = len(patients(found["val"]))
    assert f"val: {count} of 12 values of patient, {len(found['val'])} of 60 images" in printed
    index = ShardIndex.load(scans / "out/val")
    assert index.classes == ["a", "b"]


def test_other_seeds_choose_other_patients(scans: Path) -> None:
    chosen = set()
    for seed in (0, 1, 2, 0):
        out = scans / f"out{seed}"
        words = ["--group_column", "patient", "--val_fraction", 0.3, "--seed", seed]
        assert make(scans / "list.csv", out, *words) == 0  # the last one: packed already
        chosen.add(frozenset(patients(packed(out)["val"])))
    assert len(chosen) == 3


def test_a_share_of_each_class(scans: Path) -> None:
    assert make(scans / "list.csv", scans / "out", "--val_fraction", 0.2) == 0
    counts = {
        split: Counter(ShardIndex.load(scans / "out" / split).labels.tolist())
        for split in ("train", "val")
    }
    whole = Counter("ab".index(row["label"]) for row in read(scans / "list.csv"))
    assert counts["val"] == {label: round(0.2 * count) for label, count in whole.items()}
    assert counts["train"] + counts["val"] == whole


def test_splits_that_share_a_patient_are_named(scans: Path, capsys) -> None:
    rows = read(scans / "list.csv")
    for n, row in enumerate(rows):
        row["split"] = "val" if n % 20 == 4 else "train"
    write(scans / "split.csv", rows)
    assert make(scans / "split.csv", scans / "out", "--group_column", "patient") == 0
    shared = {row["patient"] for row in rows if row["split"] == "val"}
    line = f"WARNING: {len(shared)} of 12 values of patient have images in train and val"
    assert line in capsys.readouterr().out
    for row in rows:
        row["split"] = "val" if row["patient"] in shared else "train"
    write(scans / "split.csv", rows)
    assert make(scans / "split.csv", scans / "again", "--group_column", "patient") == 0
    assert "no value of patient is in two splits" in capsys.readouterr().out
    assert make(scans / "split.csv", scans / "third", "--val_fraction", 0.2) == 2
    assert "has train and val already" in capsys.readouterr().err


def test_bad_groups_are_refused(scans: Path, capsys) -> None:
    def refused(*words: object) -> str:
        assert make(*words) == 2 and not (scans / "out").exists()
        return capsys.readouterr().err.splitlines()[-1]

    table, out, half = scans / "list.csv", scans / "out", ("--val_fraction", 0.5)
    patient = ("--group_column", "patient")
    assert "needs a list with columns" in refused(scans / "scan", out, *patient, *half)
    assert "nothing to divide; add --val_fraction" in refused(table, out, *patient)
    said = refused(table, out, "--group_column", "doctor", *half)
    assert "--group_column doctor" in said and "no such column" in said and "patient" in said
    assert "leaves val without images" in refused(table, out, "--val_fraction", 0.001)
    assert "one split only" in refused(table, out, *half, "--split", "train")
    rows = read(table)
    rows[7]["patient"] = ""
    write(scans / "list.csv", rows)
    assert "1 images have no value" in refused(table, out, *patient, *half)
