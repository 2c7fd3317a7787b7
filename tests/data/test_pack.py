"""Packing: every kind of source, the same bytes every time, interruptions, hostile files."""

from __future__ import annotations

import base64
import errno
import gzip
import hashlib
import io
import json
import math
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import simplejpeg
from PIL import Image

from xcit_dino.cli import main
from xcit_dino.data.pack import image_file, shard_job
from xcit_dino.data.pack import make as make_module
from xcit_dino.data.pack.make import make
from xcit_dino.data.pack.mat_file import read_mat
from xcit_dino.data.pack.shard_writer import Sample, write_shard
from xcit_dino.data.shards.config import MakeConfig
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError
from xcit_dino.files import file_sha256

# A stand-in for the devkit's meta.mat, written by SciPy (savemat, compressed): synsets with
# ILSVRC2012_ID 1-6 and the WordNet ids below, in an order that is not alphabetical.
META_MAT = """
TUFUTEFCIDUuMCBNQVQtZmlsZSBQbGF0Zm9ybTogcG9zaXgsIENyZWF0ZWQgb246IE1vbiBOb3YgMjMgMTU6MTU6MDMgMjAy
NgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABSU0PAAAAXAEAAHic42NgYLjA
w8DABqQ5gJiJAQJYoXyQOCMUswNxcWVecWpJMVCehUEQKt4BxJ4+wWFBzkYGhkbxni4gA8L9IDQclOcXpRQjC6Tn5BejCOSV
5sYnZ2TmpBSl5oEFUDgwM/JSS+IzUjPTM0qgWkqKEjPz4jNzE9NTixn4gIIWDAj/sKH5hxEJgwAnVBwCPtiD9Dsg6WfBop8T
Sb8AlJ9naAABUHF0d2Azhx3NHBC/JCMzL13BgGz9iQqQYKUsHCDuN8CjHwaQ9WPzNzn2kq0/YIoDhfY7UBr/Rjj8QVr8G47G
Pzn6KY5/Dorj3wSHP0iLf6PR+CdHP8XxL0Bx/Bvi8Adp8W88Gv/k6Kc4/kUojn9jHP4gLf5NRuOfHP0Ux78E+fFvCQU4/IHN
HDY0c0D8gkRge7cEM/yx6WdE0c/IkE5p+GFp/2DTz4SmXwCu/YM9sjmU1sOUpCMABqds7g8AAABRAAAAeJzjY2BguADEbEDM
AcSMDBDAisRngtIgseTUnJxiIM0HxAZI+ljw6AMBASAvMQmiLwFJHx+aPpAeZiR9PFB7YIAZSsPkYfYyIZkDAgAIRgU1
"""
# Likewise, in small, Flowers102's setid.mat (trnid 2 5, valid 1, tstid 3 4) and imagelabels.mat
# (labels 1 1 2 1 2).
SETID_MAT = """
TUFUTEFCIDUuMCBNQVQtZmlsZSBQbGF0Zm9ybTogcG9zaXgsIENyZWF0ZWQgb246IE1vbiBOb3YgMjMgMTU6NDY6MzAgMjAy
NgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABSU0PAAAALAAAAHic42NgYLAA
YjYg5gBibgYIYIXyGYGYCUqDxEqK8jJTgDQLEDIBRQA23QKmDwAAACkAAAB4nONjYGCwAGI2IOYAYm4GCGCF8hmRMEisLDEn
MwVIszAwgcUANawCjA8AAAAsAAAAeJzjY2BgsABiNiDmAGJuBghghfIZgZgJSoPESopLMlOANAsQMgMxADdCAq0=
"""
LABELS_MAT = """
TUFUTEFCIDUuMCBNQVQtZmlsZSBQbGF0Zm9ybTogcG9zaXgsIENyZWF0ZWQgb246IE1vbiBOb3YgMjMgMTU6NDY6MzAgMjAy
NgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABSU0PAAAALwAAAHic42NgYHAA
YjYg5gBiTgYIYIXyGaFsRqianMSk1JxiBgYmmDgjEyOIDQBTjQMB
"""
WNIDS = ["n10000000", "n10000002", "n10000004", "n10000001", "n10000003", "n99999999"]


def jpeg(seed: int, size: tuple[int, int] = (24, 32)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    return simplejpeg.encode_jpeg(pixels, quality=80)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 7, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def class_files(prefix: str = "", classes: str = "abc", each: int = 4) -> dict[str, bytes]:
    names = [f"{prefix}{c}/{n}.jpg" for c in classes for n in range(each)]
    return {name: jpeg(seed) for seed, name in enumerate(names)}


def to_folder(files: dict[str, bytes], folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def to_tar(files: dict[str, bytes], path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def packed(src: Path | str, dst: Path, **options: Any) -> ShardIndex:
    """Pack in this process into ``dst`` and open the only split."""
    make(MakeConfig(src=str(src), dst=dst, **({"num_workers": 1} | options)))
    folders = [path.parent for path in dst.rglob("index.json")]
    assert len(folders) == 1
    return ShardIndex.load(folders[0])


def contents(index: ShardIndex) -> dict[str, tuple[bytes, int]]:
    """``{source name: (image, label)}``, read with tarfile from what was packed."""
    found = {}
    for shard in range(len(index.shards)):
        with tarfile.open(index.path(shard)) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        for name, data in members.items():
            if name.endswith(".json"):
                key = name.removesuffix(".json")
                label = int(members.get(f"{key}.cls", b"-1"))
                image = next(members[f"{key}.{e}"] for e in ("jpg", "png", "webp", "bmp")
                             if f"{key}.{e}" in members)  # fmt: skip
                found[json.loads(data)["source"]] = (image, label)
    return found


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): file_sha256(p) for p in folder.rglob("*") if p.is_file()}


def bad_of(folder: Path) -> dict[str, str]:
    lines = (folder / "quarantine.jsonl").read_text().splitlines()
    return {item["source"]: item["reason"] for item in map(json.loads, lines)}


# -- what a shard holds --------------------------------------------------------------------------


def test_originals_are_kept_and_classes_numbered_as_imagefolder_does(tmp_path: Path):
    from torchvision.datasets import ImageFolder

    files = class_files() | {"b/z.png": png(1)}
    src = to_folder(files, tmp_path / "src")
    index = packed(src, tmp_path / "dst", shard_size=5)
    reference = ImageFolder(str(src))
    expected = {
        str(Path(p).relative_to(src)): (Path(p).read_bytes(), c) for p, c in reference.samples
    }
    assert contents(index) == expected
    assert index.classes == reference.classes and index.counts.tolist() == [5, 5, 3]


def test_shards_are_what_webdatasets_own_writer_makes_and_its_reader_reads(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import webdataset
        from webdataset.tariterators import group_by_keys, tar_file_iterator

    samples = [Sample(f"{n:09d}", "jpg", jpeg(n), n, {"n": n}) for n in range(3)]
    write_shard(tmp_path, "ours.tar", samples)
    with (tmp_path / "theirs.tar").open("wb") as file:
        writer = webdataset.TarWriter(file, mtime=0, encoder=False)  # type: ignore[attr-defined]
        for s in samples:
            meta = json.dumps(s.meta, separators=(",", ":")).encode()
            writer.write({"__key__": s.key, "jpg": s.image, "cls": b"%d" % s.label, "json": meta})
        writer.close()
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()
    with (tmp_path / "ours.tar").open("rb") as file:
        members = [member | {"__url__": ""} for member in tar_file_iterator(file)]
    grouped = list(group_by_keys(members))
    read = [(s["__key__"], s["jpg"], int(s["cls"])) for s in grouped]
    assert read == [(s.key, s.image, s.label) for s in samples]


def test_shuffling_mixes_the_shards_and_follows_the_seed(tmp_path: Path):
    src = to_folder(class_files(each=20), tmp_path / "src")
    labels = {
        name: np.asarray(packed(src, tmp_path / name, **options).labels)
        for name, options in {
            "plain": {"shuffle": False}, "one": {"seed": 1}, "two": {"seed": 2},
        }.items()
    }  # fmt: skip
    assert labels["plain"].tolist() == sorted(labels["plain"])
    assert not np.array_equal(labels["one"], labels["two"])
    assert set(labels["one"][:20]) == {0, 1, 2}


def test_shards_are_cut_by_bytes_too(tmp_path: Path):
    src = to_folder(class_files(), tmp_path / "src")
    size = len(jpeg(0))
    index = packed(src, tmp_path / "dst", shard_bytes=max(2.5 * size, 1000))
    assert index.num_samples == 12
    assert (
        max(index.sizes[s : s + c].sum() for s, c in zip(index.starts, index.counts, strict=True))
        <= 2.5 * size
    )


def test_resize(tmp_path: Path):
    files = {"a/large.jpg": jpeg(0, (90, 120)), "b/small.jpg": jpeg(1, (20, 200))}
    index = packed(to_folder(files, tmp_path / "src"), tmp_path / "dst", resize=45, quality=95)
    found = contents(index)
    large = Image.open(io.BytesIO(found["a/large.jpg"][0]))
    original = Image.open(io.BytesIO(files["a/large.jpg"]))
    expected = np.asarray(original.resize((60, 45), Image.Resampling.BICUBIC), int)
    assert large.size == (60, 45) and np.abs(np.asarray(large) - expected).mean() < 4
    assert found["b/small.jpg"][0] == files["b/small.jpg"]  # never enlarged, kept as it is


# -- the same bytes ------------------------------------------------------------------------------


def test_folder_tar_gz_and_zip_on_any_number_of_processes_give_the_same_bytes(tmp_path: Path):
    files = class_files("wrapper/", each=7)
    sources = {
        "folder": to_folder(files, tmp_path / "src"),
        "tar": to_tar(dict(reversed(files.items())), tmp_path / "x.tar"),
        "gz": to_tar(files, tmp_path / "x.tgz", "w:gz"),
        "xz": to_tar(files, tmp_path / "no-suffix", "w:xz"),
        "zip": tmp_path / "x.zip",
    }
    with zipfile.ZipFile(sources["zip"], "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    for name, src in sources.items():
        packed(src, tmp_path / name, shard_size=4, num_workers=2 if name == "folder" else 1)
        assert digests(tmp_path / name) == digests(tmp_path / "folder"), name
    assert not list((tmp_path / "gz").glob(".*"))


def test_killed_and_started_again_gives_the_same_bytes(tmp_path: Path):
    """kill -9 whenever another shard has appeared, until it is through."""
    src = to_folder(class_files(each=200), tmp_path / "src")
    packed(src, tmp_path / "whole", shard_size=150)
    command = [sys.executable, "-m", "xcit_dino.cli", "shards", "make", str(src)]
    command += [str(tmp_path / "dst"), "--shard_size", "150", "--num_workers", "1"]
    kills, shards = 0, 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(tmp_path.glob("dst/shard-*.tar"))) <= shards:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills, shards = kills + 1, len(list(tmp_path.glob("dst/shard-*.tar")))
    assert kills >= 3
    assert digests(tmp_path / "dst") == digests(tmp_path / "whole")


def test_no_process_outlives_a_killed_run(tmp_path: Path):
    src = to_folder(class_files(each=300), tmp_path / "src")
    command = [sys.executable, "-m", "xcit_dino.cli", "shards", "make", str(src)]
    command += [str(tmp_path / "dst"), "--shard_size", "10", "--num_workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("dst/shard-*.tar")):
        time.sleep(0.01)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


def test_an_interrupted_run_goes_on_with_the_missing_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    src = to_folder(class_files(), tmp_path / "src")
    read, calls = shard_job.read_image, []

    def interrupted(image: Any) -> bytes:
        calls.append(image)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return read(image)

    monkeypatch.setattr(shard_job, "read_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packed(src, tmp_path / "dst", shard_size=3)
    with pytest.raises(InputError, match="has no index.json"):
        ShardIndex.load(tmp_path / "dst")
    calls.clear()
    monkeypatch.setattr(shard_job, "read_image", lambda image: calls.append(image) or read(image))
    packed(src, tmp_path / "dst", shard_size=3)
    assert len(calls) == 6  # two of four shards were there
    packed(src, tmp_path / "whole", shard_size=3)
    assert digests(tmp_path / "dst") == digests(tmp_path / "whole")
    calls.clear()
    packed(src, tmp_path / "dst", shard_size=3)
    assert not calls  # complete: nothing to do
    with pytest.raises(InputError, match="other options"):
        packed(src, tmp_path / "dst", shard_size=4)


# -- splits and labels ---------------------------------------------------------------------------


def test_train_and_val_share_their_classes(tmp_path: Path):
    files = class_files("data/train/") | class_files("data/val/", "ac", 2) | {"data/x.jpg": jpeg(9)}
    make(MakeConfig(src=str(to_folder(files, tmp_path / "s")), dst=tmp_path / "d", num_workers=1))
    train, val = (ShardIndex.load(tmp_path / "d" / split) for split in ("train", "val"))
    assert train.classes == val.classes == ["a", "b", "c"]
    assert sorted(val.labels.tolist()) == [0, 0, 2, 2] and train.num_samples == 12


def test_splits_packed_one_after_the_other(tmp_path: Path):
    for name, split, classes in (("1.tar", "train", "abc"), ("2.tar", "test", "bc")):
        src = to_tar(class_files(f"{split}/", classes), tmp_path / name)
        make(MakeConfig(src=str(src), dst=tmp_path / "d", num_workers=1))
    assert sorted(set(ShardIndex.load(tmp_path / "d" / "val").labels.tolist())) == [1, 2]
    with pytest.raises(InputError, match="class 'x' is not in the split packed before"):
        src = to_tar(class_files("test/", "xb"), tmp_path / "3.tar")
        make(MakeConfig(src=str(src), dst=tmp_path / "d", num_workers=1, split="val"))


def test_split_overrides_the_folder_names(tmp_path: Path):
    src = to_tar(class_files("test/"), tmp_path / "x.tar")
    packed(src, tmp_path / "d", split="holdout")
    assert ShardIndex.load(tmp_path / "d" / "holdout").num_samples == 12


@pytest.mark.parametrize("prefix", ["", "images/", "train/", "a/b/"])
def test_flat_images_have_no_labels(tmp_path: Path, prefix: str):
    files = {f"{prefix}{n}.jpg": jpeg(n) for n in range(3)}
    index = packed(to_tar(files, tmp_path / "x.tar"), tmp_path / "d")
    assert index.classes is None and index.labels.tolist() == [-1, -1, -1]
    assert all(label == -1 for _, label in contents(index).values())


def test_a_list_of_path_and_label(tmp_path: Path):
    files = {"x/1.jpg": jpeg(1), "y/2.jpg": jpeg(2), "3.jpg": jpeg(3)}
    folder = to_folder(files, tmp_path / "s")
    (folder / "l.csv").write_text("path,label\nx/1.jpg,dog\ny/2.jpg,cat\n3.jpg,dog\ngone.jpg,cat\n")
    rows = [{"path": n, "label": i} for n, i in (("x/1.jpg", 7), ("y/2.jpg", 3), ("3.jpg", None))]
    (folder / "l.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "flat.csv").write_text("x/1.jpg\n3.jpg\n")
    index = packed(folder / "l.csv", tmp_path / "d")
    assert index.classes == ["cat", "dog"]
    assert {n: label for n, (_, label) in contents(index).items()} == {
        "x/1.jpg": 1, "y/2.jpg": 0, "3.jpg": 1,
    }  # fmt: skip
    assert "cannot be read" in bad_of(tmp_path / "d")["gone.jpg"]
    index = packed(folder / "l.jsonl", tmp_path / "j")
    assert index.classes is None and sorted(index.labels.tolist()) == [3, 7]
    assert bad_of(tmp_path / "j") == {"3.jpg": "no label"}
    assert packed(folder / "flat.csv", tmp_path / "f").labels.tolist() == [-1, -1]


def listed(tmp_path: Path, text: str, name: str = "l.csv", **options: Any) -> dict[str, int]:
    """Labels of what a list of ``0.jpg`` to ``4.jpg`` gives."""
    folder = to_folder({f"{n}.jpg": jpeg(n) for n in range(5)}, tmp_path / "s")
    (folder / name).write_text(text)
    index = packed(folder / name, tmp_path / "d", **options)
    return {name: label for name, (_, label) in contents(index).items()}


@pytest.mark.parametrize("text", [
    "filepath,class\n0.jpg,b\n1.jpg,a\n", "label,id,path\nb,7,0.jpg\na,8,1.jpg\n",
    "\ufeffimage\tfold\tlabel\r\n0.jpg\t1\tb\r\n1.jpg\t1\ta\r\n",
])  # fmt: skip
def test_columns_of_lists_are_found_by_their_names(tmp_path: Path, text: str):
    assert listed(tmp_path, text) == {"0.jpg": 1, "1.jpg": 0}


def test_several_columns_without_a_header_need_the_labels_number(tmp_path: Path):
    text = "0.jpg,b,more\n1.jpg,a\n"
    with pytest.raises(InputError, match="2, 3 could each be the label.*--label_column 2"):
        listed(tmp_path, text)
    assert listed(tmp_path, text, label_column="2") == {"0.jpg": 1, "1.jpg": 0}


def test_numbers_in_lists_are_labels_and_never_renumbered(tmp_path: Path):
    rows = "0.jpg,10\n1.jpg,9.0\n2.jpg,-3\n3.jpg,99999999999\n4.jpg,\n"
    assert listed(tmp_path, rows) == {"0.jpg": 10, "1.jpg": 9}
    assert bad_of(tmp_path / "d") == {
        "2.jpg": "label -3 out of range", "3.jpg": "label 99999999999 out of range",
        "4.jpg": "no label",
    }  # fmt: skip


def test_words_among_numbers_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="labels are numbers, but '2x' is none"):
        listed(tmp_path, "0.jpg,1\n1.jpg,2x\n")
    (tmp_path / "map.txt").write_text("2x\n1\n")
    assert listed(tmp_path, "0.jpg,1\n1.jpg,2x\n", label_map=tmp_path / "map.txt") == {
        "0.jpg": 1, "1.jpg": 0,
    }  # fmt: skip


def test_a_file_of_numbers_labels_flat_images(tmp_path: Path):
    folder = to_folder({f"{n:02}.jpg": jpeg(n) for n in range(11)}, tmp_path / "s")
    (tmp_path / "labels.txt").write_text("".join(f"{10 - n}\n" for n in range(11)))
    index = packed(folder, tmp_path / "d", labels=tmp_path / "labels.txt")
    assert {n: label for n, (_, label) in contents(index).items()} == {
        f"{n:02}.jpg": 10 - n for n in range(11)
    }
    (tmp_path / "labels.txt").write_text("")
    with pytest.raises(InputError, match="0 labels, but there are 11 images"):
        packed(folder, tmp_path / "e", labels=tmp_path / "labels.txt")


def test_label_maps_choose_and_number_classes(tmp_path: Path):
    src = to_folder(class_files(), tmp_path / "s")
    (tmp_path / "two.txt").write_text("c\na\n")
    (tmp_path / "merge.json").write_text('{"a": 0, "b": 1, "c": 0}')
    index = packed(src, tmp_path / "d", label_map=tmp_path / "two.txt")
    assert index.classes == ["c", "a"] and np.bincount(index.labels).tolist() == [4, 4]
    index = packed(src, tmp_path / "m", label_map=tmp_path / "merge.json")
    assert index.classes == ["a/c", "b"] and np.bincount(index.labels).tolist() == [8, 4]


def imagenet(folder: Path) -> Path:
    """The ILSVRC2012 archives as people have them, in small."""
    folder.mkdir()
    inner = {}
    for wnid in WNIDS[:5]:
        tar = to_tar({f"{wnid}_{n}.JPEG": jpeg(n) for n in range(3)}, folder / "inner")
        inner[f"{wnid}.tar"] = tar.read_bytes()
    (folder / "inner").unlink()
    to_tar(inner, folder / "ILSVRC2012_img_train.tar")
    val = {f"ILSVRC2012_val_{n:08d}.JPEG": jpeg(100 + n) for n in range(1, 9)}
    to_tar(val, folder / "ILSVRC2012_img_val.tar")
    truth = b"\n".join(b"%d" % (1 + n % 5) for n in range(8)) + b"\n"
    kit = "ILSVRC2012_devkit_t12/data/"
    devkit = {
        f"{kit}ILSVRC2012_validation_ground_truth.txt": truth,
        f"{kit}meta.mat": base64.b64decode(META_MAT),
    }
    to_tar(devkit, folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz")
    return folder


def test_the_imagenet_archives(tmp_path: Path):
    src = imagenet(tmp_path / "s")
    make(MakeConfig(src=str(src), dst=tmp_path / "d", num_workers=1))
    train, val = (ShardIndex.load(tmp_path / "d" / split) for split in ("train", "val"))
    assert train.classes == val.classes == sorted(WNIDS[:5])
    assert np.bincount(train.labels).tolist() == [3] * 5
    for name, (_, label) in contents(val).items():
        number = int(name[15:23]) - 1
        assert sorted(WNIDS[:5])[label] == WNIDS[number % 5]
    for tar in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):  # one after the other
        make(MakeConfig(src=str(src / tar), dst=tmp_path / "one", num_workers=1))
    assert digests(tmp_path / "one") == digests(tmp_path / "d")


def test_kaggles_validation_labels(tmp_path: Path):
    src = imagenet(tmp_path / "s")
    (src / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    make_val = MakeConfig(src=str(src), dst=tmp_path / "d", num_workers=1)
    with pytest.raises(InputError, match="--labels"):
        make(make_val)
    rows = [
        f"ILSVRC2012_val_{n:08d},{WNIDS[n % 5]} 1 2 3 4 {WNIDS[n % 5]} 5 6 7 8" for n in range(1, 9)
    ]
    (src / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(rows))
    make(make_val)
    val = ShardIndex.load(tmp_path / "d" / "val")
    for name, (_, label) in contents(val).items():
        assert sorted(WNIDS[:5])[label] == WNIDS[int(name[15:23]) % 5]


def test_mat_files_are_read_as_scipy_wrote_them():
    synsets = read_mat(base64.b64decode(META_MAT), "meta.mat")["synsets"]
    assert [s["WNID"] for s in synsets] == WNIDS
    assert [int(s["ILSVRC2012_ID"][0, 0]) for s in synsets] == [1, 2, 3, 4, 5, 6]
    assert synsets[5]["children"].tolist() == [[1.0, 2.0]]


def test_mat_files_with_nothing_or_infinity_inside_are_refused():
    head = base64.b64decode(META_MAT)[:128]
    nothing = zlib.compress(b"")
    flags = struct.pack("<IId", 9, 8, math.inf)
    for kind, body in ((15, nothing), (14, flags + flags + flags)):
        with pytest.raises(InputError, match="x.mat is no readable .mat file"):
            read_mat(head + struct.pack("<II", kind, len(body)) + body, "x.mat")


@pytest.mark.parametrize("cases", [500, pytest.param(50_000, marks=pytest.mark.faults)])
def test_damaged_mat_files_are_refused(cases: int):
    good = base64.b64decode(META_MAT)
    rng = np.random.default_rng(0)
    for _ in range(cases):
        data = bytearray(good)
        for at in rng.integers(0, len(data), 3):
            data[at] = rng.integers(256)
        try:
            read_mat(bytes(data[: rng.integers(len(data))]), "x.mat")
        except InputError as error:
            assert "x.mat" in str(error)


def test_cifar_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)

    def batch(name: str, content: dict[str, Any]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    data = {"data": rng.integers(0, 255, (4, 3072), np.uint8), "labels": [0, 1, 9, 9]}
    monkeypatch.setattr(CIFAR10, "train_list", [batch("data_batch_1", data)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch", data)])
    name, digest = batch("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": digest})
    make(MakeConfig(src="cifar10", dst=tmp_path / "d", root=tmp_path, num_workers=1))
    train = ShardIndex.load(tmp_path / "d" / "train")
    found = contents(train)
    pixels = np.asarray(Image.open(io.BytesIO(found["b/00001.png"][0])))
    np.testing.assert_array_equal(pixels, data["data"][1].reshape(3, 32, 32).transpose(1, 2, 0))
    assert ShardIndex.load(tmp_path / "d" / "val").classes == train.classes == ["a", "b", "j"]
    with pytest.raises(InputError, match="--download"):
        make(MakeConfig(src="cifar100", dst=tmp_path / "e", root=tmp_path))


def test_flowers_and_imagenette_through_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from torchvision.datasets import Flowers102

    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    flowers = to_folder({f"jpg/image_{n:05d}.jpg": jpeg(n) for n in range(1, 6)},
                        tmp_path / "flowers-102")  # fmt: skip
    (flowers / "setid.mat").write_bytes(base64.b64decode(SETID_MAT))
    (flowers / "imagelabels.mat").write_bytes(base64.b64decode(LABELS_MAT))
    make(MakeConfig(src="flowers102", dst=tmp_path / "f", root=tmp_path, num_workers=1))
    train, val = (contents(ShardIndex.load(tmp_path / "f" / s)) for s in ("train", "val"))
    assert sorted(train.values()) == sorted([(jpeg(1), 0), (jpeg(2), 0), (jpeg(5), 1)])
    assert sorted(val.values()) == sorted([(jpeg(3), 1), (jpeg(4), 0)])
    files = {
        f"{s}/{w}/1.JPEG": jpeg(1) for s in ("train", "val") for w in ("n01440764", "n03888257")
    }
    to_folder(files, tmp_path / "imagenette2")
    make(MakeConfig(src="imagenette", dst=tmp_path / "i", root=tmp_path, num_workers=1))
    assert ShardIndex.load(tmp_path / "i" / "val").classes == ["n01440764", "n03888257"]


# -- bad and hostile files -----------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG header that promises 60000 x 60000 pixels."""
    data = bytearray(png(0))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def encoded(mode: str, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (8, 8)).save(buffer, kind)
    return buffer.getvalue()


BAD = {
    "empty.jpg": b"", "garbage.jpg": b"garbage" * 99, "cut.jpg": jpeg(0)[:-300],
    "header.jpg": jpeg(0)[:40], "bomb.png": bomb(), "text.png": b"<svg/>", "cut.png": png(0)[:-60],
}  # fmt: skip
ODD = {
    "cmyk.jpg": encoded("CMYK", "JPEG"), "grey.jpg": encoded("L", "JPEG"),
    "16bit.png": encoded("I;16", "PNG"), "alpha.png": encoded("RGBA", "PNG"),
    "palette.png": encoded("P", "PNG"), "png-in-disguise.jpeg": png(3), "upper.JPG": jpeg(4),
}  # fmt: skip


def test_bad_images_are_left_out_and_listed_and_odd_ones_kept(tmp_path: Path):
    junk = {
        ".hidden.jpg": jpeg(0),
        "__MACOSX/a.jpg": jpeg(0),
        "._a.jpg": b"",
        "Thumbs.db": b"",
        "r": b"",
    }
    src = to_folder(BAD | ODD | junk, tmp_path / "s")
    index = packed(src, tmp_path / "d", pixels="rgb8")
    assert {name: image for name, (image, _) in contents(index).items()} == ODD
    assert bad_of(tmp_path / "d").keys() == BAD.keys()
    assert "bomb" in bad_of(tmp_path / "d")["bomb.png"]
    with tarfile.open(index.path(0)) as tar:
        formats = sorted(n.partition(".")[2] for n in tar.getnames() if not n.endswith(".json"))
    assert formats == ["jpg"] * 3 + ["png"] * 4  # by content, not by name


def test_hostile_archives(tmp_path: Path):
    """Nothing is written outside DST, no link is followed, no device opened."""
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg(5))
    src = tmp_path / "in" / "x.tar"
    src.parent.mkdir()
    with tarfile.open(src, "w") as tar:
        for name, kind in {
            "../climb.jpg": tarfile.REGTYPE, "/abs.jpg": tarfile.REGTYPE,
            "a/../../b.jpg": tarfile.REGTYPE,
            "link.jpg": tarfile.SYMTYPE, "hard.jpg": tarfile.LNKTYPE, "dev.jpg": tarfile.CHRTYPE,
            "pipe.jpg": tarfile.FIFOTYPE, "good/with space 'and\n quote\".jpg": tarfile.REGTYPE,
        }.items():  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname, data = kind, str(secret), jpeg(1)
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(data))
    index = packed(src, tmp_path / "out" / "d")
    assert list(contents(index)) == ["good/with space 'and\n quote\".jpg"]
    assert len(bad_of(tmp_path / "out" / "d")) == 7
    assert {p.name for p in tmp_path.iterdir()} == {"secret.jpg", "in", "out"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"d"}


def test_zips_with_the_separator_of_windows(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        for name, data in (class_files("set/") | {"../set/a/x.jpg": jpeg(0)}).items():
            entry = zipfile.ZipInfo(name.replace("/", "\\"))
            entry.create_system = 0
            archive.writestr(entry, data)
    index = packed(tmp_path / "w.zip", tmp_path / "d")
    assert index.classes == ["a", "b", "c"] and index.num_samples == 12
    assert bad_of(tmp_path / "d") == {"../set/a/x.jpg": "its name leaves the archive"}


def test_hostile_zips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(image_file, "MAX_BYTES", 1 << 20)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("good.jpg", jpeg(0))
        archive.writestr("../climb.jpg", jpeg(1))
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("bomb.jpg", bytes((1 << 20) + 1))
    index = packed(tmp_path / "x.zip", tmp_path / "d")
    assert contents(index).keys() == {"good.jpg"}
    assert bad_of(tmp_path / "d").keys() == {"../climb.jpg", "link.jpg", "bomb.jpg"}


@pytest.mark.parametrize("kind", ["w", "w:gz"])
def test_truncated_archives_give_what_is_whole(tmp_path: Path, kind: str):
    files = {f"{n}.jpg": jpeg(n, (64, 64)) for n in range(40)}
    src = to_tar(files, tmp_path / "x", kind)
    src.write_bytes(src.read_bytes()[: int(src.stat().st_size * 0.7)])
    found = contents(packed(src, tmp_path / "d"))
    assert 0 < len(found) < 40 and bad_of(tmp_path / "d")
    assert all(files[name] == image for name, (image, _) in found.items())


@pytest.mark.parametrize("cases", [60, pytest.param(2_000, marks=pytest.mark.faults)])
def test_mutated_sources_never_crash(cases: int, tmp_path: Path):
    """Damaged tars, gzips and zips: packed, or refused in one line."""
    files = class_files("", "ab", 2)
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    to_tar(files, tmp_path / "tar")
    (tmp_path / "gz").write_bytes(gzip.compress((tmp_path / "tar").read_bytes(), mtime=0))
    rng = np.random.default_rng(0)
    for number in range(cases):
        data = bytearray((tmp_path / ("zip", "tar", "gz")[number % 3]).read_bytes())
        for _ in range(int(rng.integers(1, 8))):
            at = int(rng.integers(len(data)))
            data[at : at + 8] = rng.bytes(int(rng.integers(0, 12)))
        (tmp_path / "x").write_bytes(data)
        try:
            make(MakeConfig(src=str(tmp_path / "x"), dst=tmp_path / str(number), num_workers=1))
        except InputError as error:
            assert "\n" not in str(error)


# -- bad options ---------------------------------------------------------------------------------


def test_input_errors_are_one_line_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("no tar")
    (tmp_path / "z.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(600))
    flat = to_folder({"1.jpg": jpeg(1)}, tmp_path / "flat")
    (tmp_path / "map.json").write_text('{"a": -1}')
    to_folder({"1.jpg": b"x"}, tmp_path / "garbage")
    dst = str(tmp_path / "d")
    cases: list[tuple[list[str], str]] = [
        (["nowhere"], "no such folder"),
        (["cifar11"], "did you mean cifar10"),
        ([str(tmp_path / "empty")], "holds no images"),
        ([str(tmp_path / "text.tar")], "is no tar"),
        ([str(tmp_path / "z.zst")], "zstd"),
        ([str(tmp_path / "garbage")], "none of the images is usable"),
        ([str(flat), "--label_map", str(tmp_path / "map.json")], "number from 0"),
        ([str(flat), "--labels", str(tmp_path / "none.csv")], "cannot be read"),
        ([str(flat), "--shard_size", "0"], "--shard_size"),
        ([str(flat), "--resize", "-3"], "--resize"),
        ([str(flat), "--quality", "0"], "--quality"),
        ([str(flat), "--split", "../up"], "--split"),
        ([str(flat), "--seed", "-1"], "--seed"),
        ([str(flat), "--shard_sise", "1"], "did you mean shard_size"),
    ]
    for arguments, words in cases:
        assert main(["shards", "make", arguments[0], dst, *arguments[1:]]) == 2, arguments
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("xcit-dino: ") and words in error, arguments


def test_shards_are_not_packed_again(tmp_path: Path):
    src = to_folder(class_files(), tmp_path / "s")
    packed(src, tmp_path / "d")
    with pytest.raises(InputError, match="holds shards already"):
        make(MakeConfig(src=str(tmp_path / "d"), dst=tmp_path / "e"))
    with pytest.raises(InputError, match="shards check"):
        make(MakeConfig(src=str(tmp_path / "d" / "shard-000000.tar"), dst=tmp_path / "e"))
    with pytest.raises(InputError, match="folder of their own"):
        make(MakeConfig(src=str(src), dst=src))


def test_a_full_disk_is_said_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    src = to_folder(class_files(), tmp_path / "s")
    write, full = shard_job.write_shard, [True]

    def disk(folder: Path, name: str, samples: Any) -> Any:
        if name == "shard-000001.tar" and full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(folder, name, samples)

    monkeypatch.setattr(shard_job, "write_shard", disk)
    with pytest.raises(InputError, match="No space left on device; the same command goes on"):
        packed(src, tmp_path / "d", shard_size=5)
    full.clear()
    assert packed(src, tmp_path / "d", shard_size=5).num_samples == 12


def test_one_process_packs_at_a_time(tmp_path: Path):
    src = to_folder(class_files(), tmp_path / "s")
    with make_module._locked(tmp_path), pytest.raises(InputError, match="another process"):
        make(MakeConfig(src=str(src), dst=tmp_path))


def test_packing_is_fast_enough(tmp_path: Path):
    """At least 1,000 small files a second in one process (the machine may be busy)."""
    src = to_folder(class_files(each=300), tmp_path / "s")
    rates = []
    for attempt in range(3):
        began = time.process_time()
        packed(src, tmp_path / str(attempt))
        rates.append(900 / (time.process_time() - began))
    assert max(rates) > 1000


# -- images to leave out ---------------------------------------------------------------------------


def kept(folder: Path) -> dict[str, set[str]]:
    """Split -> the files that were packed."""
    found = {}
    for split in ("train", "val"):
        sources = set()
        for shard in (folder / split).glob("*.tar"):
            with tarfile.open(shard) as tar:
                for member in tar:
                    if member.name.endswith(".json"):
                        sources.add(json.loads(tar.extractfile(member).read())["source"])  # type: ignore[union-attr]
        found[split] = sources
    return found


@pytest.fixture
def two_splits(tmp_path: Path) -> Path:
    for seed, name in enumerate(("train/a/1", "train/a/2", "train/b/1", "val/a/1", "val/b/1")):
        path = tmp_path / "photos" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(seed))
    return tmp_path


ALL = {"train": {"a/1.jpg", "a/2.jpg", "b/1.jpg"}, "val": {"a/1.jpg", "b/1.jpg"}}
EXCLUDED = {  # a list -> what it takes away
    "one.csv": ("path,split,cosine,of\na/1.jpg,train,0.99,a/2.jpg\n", [("train", "a/1.jpg")]),
    "names.txt": ("a/2.jpg\n", [("train", "a/2.jpg")]),
    "long.txt": ("photos/train/a/2.jpg\nnowhere/x.jpg\n", [("train", "a/2.jpg")]),
    "rows.jsonl": ('{"path": "a/1.jpg", "split": "test"}\n', [("val", "a/1.jpg")]),
}


@pytest.mark.parametrize("name", EXCLUDED)
def test_images_that_a_list_names_are_left_out(name: str, two_splits: Path, capsys):
    text, gone = EXCLUDED[name]
    (two_splits / name).write_text(text)
    src, dst = str(two_splits / "photos"), two_splits / "shards"
    config = MakeConfig(src, dst, exclude=two_splits / name, num_workers=1)
    assert make(config) == 0
    assert kept(dst) == {split: all_ - {n for s, n in gone if s == split}
                         for split, all_ in ALL.items()}  # fmt: skip
    said = capsys.readouterr().out
    assert f"left out: 1 images named in {name}" in said
    assert ("1 rows of long.txt name no image (the first is nowhere/x.jpg)" in said) == (
        name == "long.txt"
    )
    notes = json.loads((dst / gone[0][0] / "packing.json").read_text())["notes"]
    assert f"left out: 1 images named in {name}" in notes
    assert ShardIndex.load(dst / "train").classes == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a/1.jpg\n", "is an image of train and val; add a column called split"),
        ("path,split\na/1.jpg,holiday\n", "column of splits holds 'holiday'"),
        ("zebra.jpg\n", "names none of the images; the first one is a/1.jpg"),
        ("path,split\na/1.jpg,val\nb/1.jpg,val\n", "names all images of a split"),
    ],
)
def test_lists_that_leave_out_nothing_or_all_are_refused(text, message, two_splits: Path):
    (two_splits / "list.csv").write_text(text)
    config = MakeConfig(
        str(two_splits / "photos"), two_splits / "shards", exclude=two_splits / "list.csv"
    )
    with pytest.raises(InputError, match=f"--exclude .*{message}"):
        make(config)
    assert not (two_splits / "shards").exists()
