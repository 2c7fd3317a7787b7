"""``shards check``: finds all deliberate damage, nothing in intact shards, and counts steps."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from xcit_dino.cli import main
from xcit_dino.data.pack.shard_writer import Sample, write_shard
from xcit_dino.data.shards import check as check_module
from xcit_dino.data.shards.check import check
from xcit_dino.data.shards.config import CheckConfig
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.data.shards.index_writer import write_index
from xcit_dino.data.shards.preflight import preflight
from xcit_dino.data.shards.verify import Finding, verify_shards
from xcit_dino.errors import InputError


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), np.uint8)
    return simplejpeg.encode_jpeg(pixels, quality=80)


def shards(folder: Path, labels: tuple[int, ...] = (0, 1, 2) * 4, per_shard: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for first in range(0, len(labels), per_shard):
        numbers = range(first, min(first + per_shard, len(labels)))
        samples = [Sample(f"{n:06d}", "jpg", jpeg(n), labels[n], {}) for n in numbers]
        parts.append(write_shard(folder, f"shard-{first // per_shard:06d}.tar", samples))
    write_index(folder, parts, ["a", "b", "c"])
    return folder


def problems(folder: Path, **options: Any) -> list[tuple[str, str, str]]:
    """(shard, key, reason) of check.jsonl after a check, which must say by its code if any."""
    code = check(CheckConfig(dst=str(folder), **({"num_workers": 1} | options)))
    path = folder / "check.jsonl"
    assert code == int(path.exists())
    lines = path.read_text().splitlines() if path.exists() else []
    return [(i["shard"], i["key"], i["reason"]) for i in map(json.loads, lines)]


def test_whole_shards_have_no_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = shards(tmp_path / "d")
    assert problems(folder) == []
    out = capsys.readouterr().out
    assert "12 images" in out and "3 of 3 shards have one" in out
    assert "3 classes of 4 to 4 images (median 4)" in out
    assert problems(folder, num_workers=2) == []


def test_a_shard_that_was_written_again_names_the_way_out(tmp_path: Path):
    """As after ``tar --sort=name``: whole, but not the tar of the index."""
    folder = shards(tmp_path / "d", (0, 1, 2, 0))
    other = shards(tmp_path / "other", (0, 1, 2, 0, 1), per_shard=5)
    (other / "shard-000000.tar").replace(folder / "shard-000000.tar")
    found = [reason for _, _, reason in problems(folder)]
    assert any("5 samples, which are not the 4 of the index" in reason for reason in found)
    assert not any("decoded" in reason for reason in found) and "--rebuild" in " ".join(found)
    assert problems(folder, rebuild=True) == []


def test_train_and_val_are_both_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shards(tmp_path / "train")
    shards(tmp_path / "val", (0, 1, 2))
    assert check(CheckConfig(dst=str(tmp_path), num_workers=1)) == 0
    assert capsys.readouterr().out.count("duplicate keys") == 2


def patch(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def test_damage_is_found_and_named(tmp_path: Path):
    folder = shards(tmp_path / "d")
    index = ShardIndex.load(folder)
    shard, offset, size = index.locate(5)
    patch(folder / index.shards[shard], offset, b"\0" * size)  # one image wiped out
    os.truncate(folder / index.shards[2], int(index.offsets[10]) + 30)  # the last two cut off
    found = problems(folder)
    assert {f[:2] for f in found} >= {
        ("shard-000001.tar", "000005"), ("shard-000001.tar", ""), ("shard-000002.tar", ""),
    }  # fmt: skip
    assert ("shard-000001.tar", "", "checksum differs from the index's") in found
    undecodable = [f for f in found if "decoded" in f[2] or "shard is truncated" in f[2]]
    assert len(undecodable) == 3
    (folder / index.shards[0]).unlink()
    assert ("shard-000000.tar", "", "cannot be opened: No such file or directory") in problems(
        folder
    )


def test_an_exchanged_index_array_is_found(tmp_path: Path):
    folder = shards(tmp_path / "d")
    labels = np.load(folder / "index.labels.npy")
    np.save(folder / "index.labels.npy", labels[::-1].copy())
    assert ("index.labels.npy", "", "checksum differs from index.json's") in problems(folder)


def test_labels_out_of_range_and_missing_ones(tmp_path: Path):
    folder = shards(tmp_path / "d", (0, 1, 2, 3, -1))
    assert {(key, reason) for _, key, reason in problems(folder)} == {
        ("000003", "label 3 out of range: there are 3 classes"), ("000004", "no label"),
    }  # fmt: skip


def test_labels_of_sets_without_class_names(tmp_path: Path):
    members = [("a.jpg", jpeg(0)), ("a.cls", b"7"), ("b.jpg", jpeg(1)), ("c.jpg", jpeg(2))]
    foreign(tmp_path / "0.tar", [*members, ("c.cls", b"2147483647")])
    reasons = {key: reason for _, key, reason in problems(tmp_path)}
    assert reasons.keys() == {"b", "c"}
    assert reasons["b"] == "no label" and "unreadable label" in reasons["c"]
    foreign(tmp_path / "0.tar", [("a.jpg", jpeg(0)), ("b.jpg", jpeg(1))])
    assert problems(tmp_path, rebuild=True) == [] and not (tmp_path / "check.jsonl").exists()


def foreign(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_foreign_shards_get_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """img2dataset's layout: images of several formats, captions, no labels."""
    webp, png = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(webp, "WEBP")
    Image.new("RGB", (8, 8)).save(png, "PNG")
    for number in range(2):
        key = f"{number:05d}0000"
        members = [(f"{key}1.jpg", jpeg(1)), (f"{key}1.json", b"{}"), (f"{key}1.txt", b"a cat")]
        members += [(f"{key}2.webp", webp.getvalue()), (f"{key}2.txt", b"")]
        members += [(f"{key}3.png", png.getvalue())]
        foreign(tmp_path / f"{number:05d}.tar", members)
    assert problems(tmp_path) == []
    index = ShardIndex.load(tmp_path)
    assert index.shards == ["00000.tar", "00001.tar"] and index.counts.tolist() == [3, 3]
    assert index.sha256 == [None, None] and index.classes is None
    assert "0 of 2 shards have one" in capsys.readouterr().out
    first = index.checksum
    assert problems(tmp_path, rebuild=True, num_workers=2) == []
    assert ShardIndex.load(tmp_path).checksum == first
    assert problems(tmp_path, rebuild=True, hash=True) == []
    assert None not in ShardIndex.load(tmp_path).sha256


def test_class_names_of_foreign_shards(tmp_path: Path):
    foreign(tmp_path / "0.tar", [("0.jpg", jpeg(0)), ("0.cls", b"1")])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert problems(tmp_path) == []
    (tmp_path / "classes.txt").unlink()
    assert problems(tmp_path, rebuild=True) == []
    assert ShardIndex.load(tmp_path).classes == ["cat", "dog"]


def test_duplicate_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    twice = [("a.jpg", jpeg(0)), ("b.jpg", jpeg(1)), ("a.jpg", jpeg(2))]
    foreign(tmp_path / "0.tar", twice)
    foreign(tmp_path / "1.tar", [("b.jpg", jpeg(0))])
    assert problems(tmp_path) == [("0.tar", "a", "duplicate key")]
    assert "1 in a shard, 1 across shards" in capsys.readouterr().out


def test_a_sample_is_spread_over_all_shards(tmp_path: Path):
    index = ShardIndex.load(shards(tmp_path / "d"))
    finding = verify_shards(index, sample=3, num_workers=1)
    assert finding.decoded == 3 and finding.bad == []
    assert verify_shards(index, sample=99, num_workers=1).decoded == 12


def test_a_read_only_folder_still_gets_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = shards(tmp_path / "d", (0, 7))

    def refuse(path: Path, pieces: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(check_module, "write_atomic", refuse)
    assert check(CheckConfig(dst=str(folder), num_workers=1)) == 1
    assert "cannot be written: Permission denied" in " ".join(capsys.readouterr().out.split())


def advice(num_samples: int, **options: Any) -> str:
    config = CheckConfig(dst="x", **options)
    finding = Finding(decoded=100, seconds=0.2)  # 500 a second
    return "\n".join(preflight(num_samples, 100_000, finding, config))


def test_preflight_counts_steps_and_says_what_starves():
    text = advice(1_281_167, nodes=4, gpus=8, batch_size_per_gpu=32)
    assert "global batch of 1,024, 1,251 steps per epoch" in text  # 1,281,167 = 1251 x 1024 + 143
    assert "143 samples dropped" in text and "STARVES" not in text
    assert "at most 1 GPUs in all or --batch_size_per_gpu 12" in advice(100, nodes=2, gpus=4)
    text = advice(10_000, gpus=8, workers=4, images_per_second=3000)  # 3.2 ms a sample and core
    assert "2,400.0 MB/s" in text and "--num_workers 10 would do" in text


def test_input_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    foreign(tmp_path / "texts" / "0.tar", [("a.txt", b"")])
    cases = [
        ([str(tmp_path / "none")], "no such folder"),
        ([str(tmp_path / "empty")], "shards make SRC"),
        ([str(tmp_path / "texts")], "hold no images"),
        (["s3://bucket/x"], "where they lie"),
        ([str(tmp_path), "--sample", "0"], "--sample"),
        ([str(tmp_path), "--nodes", "-1"], "--nodes"),
    ]
    for arguments, words in cases:
        assert main(["shards", "check", *arguments]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(InputError):
        ShardIndex.load(tmp_path / "texts")


@pytest.mark.parametrize("cases", [150, pytest.param(3_000, marks=pytest.mark.faults)])
def test_mutated_shards_are_reported_and_never_crash(cases: int, tmp_path: Path):
    folder = shards(tmp_path / "d", (0, 1, 2, 0), per_shard=4)
    index, path = ShardIndex.load(folder), folder / "shard-000000.tar"
    good, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(cases):
        data = bytearray(good)
        at = int(rng.integers(len(data) - 10240))
        data[at : at + int(rng.integers(1, 600))] = rng.bytes(int(rng.integers(0, 600)))
        path.write_bytes(data)
        if bytes(data) != good:
            assert verify_shards(index, None, 1).bad
