"""Images in the columns of Parquet and Arrow files: every one with its label, or one line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from xcit_dino.cli import main
from xcit_dino.data.shards.index import ShardIndex

NAMES = ["zebra", "ant", "bee"]
IMAGES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(number: int) -> bytes:
    """An image that tells its number."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def table(numbers: range | list[int], labels: list[Any] | None = None, **more: Any) -> pa.Table:
    """As Hugging Face's datasets stores images with a ``ClassLabel``."""
    labels = [n % 3 for n in numbers] if labels is None else labels
    cells = [{"bytes": png(n), "path": f"{n}.png"} for n in numbers]
    found = pa.table({"image": pa.array(cells, IMAGES), "label": labels} | more)
    features = {
        "image": {"_type": "Image"},
        "label": {"names": NAMES, "_type": "ClassLabel"},
        **{name: {"dtype": "string", "_type": "Value"} for name in more},
    }
    return found.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )


def save_to_disk(found: pa.Table, folder: Path, files: int = 1, split: str | None = None) -> None:
    """As ``datasets.Dataset.save_to_disk`` does it: Arrow streams and two JSON files."""
    folder.mkdir(parents=True)
    size = -(-len(found) // files)
    for n in range(files):
        path = folder / f"data-{n:05d}-of-{files:05d}.arrow"
        with pa.ipc.new_stream(str(path), found.schema) as stream:
            stream.write_table(found.slice(n * size, size), max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_split": split}))
    (folder / "dataset_info.json").write_text("{}")


def make(src: Path, dst: Path, *options: str) -> int:
    return main(["shards", "make", str(src), str(dst), "--num_workers", "1", *options])


def packed(folder: Path) -> dict[int, str | int]:
    """``{number that the pixels tell: class, or the number of the label}``."""
    index, found = ShardIndex.load(folder), {}
    for sample in range(index.num_samples):
        shard, offset, size = index.locate(sample)
        with open(index.path(shard), "rb") as file:
            file.seek(offset)
            raw = file.read(size)
        number, label = int(np.asarray(Image.open(io.BytesIO(raw)))[0, 0, 0]), index.labels[sample]
        assert raw == png(number)  # byte for byte
        found[number] = index.classes[label] if index.classes and label >= 0 else int(label)
    return found


def named(numbers: range) -> dict[int, str]:
    return {n: NAMES[n % 3] for n in numbers}


def test_a_data_set_saved_to_disk_with_its_splits_and_its_order_of_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save_to_disk(table(range(7), text=["x"] * 7), tmp_path / "src" / "train", files=2)
    save_to_disk(table(range(7, 10), text=["x"] * 3), tmp_path / "src" / "validation")
    save_to_disk(table(range(10, 12), text=["x"] * 2), tmp_path / "src" / "test")
    (tmp_path / "src" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert make(tmp_path / "src", tmp_path / "dst") == 0
    assert packed(tmp_path / "dst" / "train") == named(range(7))
    assert packed(tmp_path / "dst" / "val") == named(range(7, 10))
    assert ShardIndex.load(tmp_path / "dst" / "val").classes == NAMES  # not in alphabetical order
    out = capsys.readouterr().out
    assert "splits by the names of the files: validation -> val" in out
    assert "images: column image; labels: column label; not read: text" in out
    assert "skipped: 2 rows of the split test, because there is a val" in out
    assert not (tmp_path / "dst" / ".packing").exists()
    with tarfile.open(tmp_path / "dst" / "train" / "shard-000000.tar") as shard:
        metas = [json.load(shard.extractfile(m)) for m in shard if m.name.endswith("json")]  # type: ignore[arg-type]
    sources = {meta["source"] for meta in metas}
    assert "train/data-00001-of-00002.arrow/00000002/6.png" in sources and len(sources) == 7


def test_one_saved_split_fills_its_folder(tmp_path: Path):
    save_to_disk(table(range(4)), tmp_path / "src", split="train")
    assert make(tmp_path / "src", tmp_path / "dst") == 0
    assert packed(tmp_path / "dst" / "train") == named(range(4))


def test_parquet_files_of_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "src" / "data").mkdir(parents=True)
    (tmp_path / "src" / ".cache").mkdir()
    for name, numbers in (("train-00000-of-00002", range(5)), ("train-00001-of-00002", range(5, 8)),
                          ("test-00000-of-00001", range(8, 10))):  # fmt: skip
        path = tmp_path / "src" / "data" / f"{name}.parquet"
        pq.write_table(table(numbers), path, row_group_size=2)
    pq.write_table(table([99]), tmp_path / "src" / ".cache" / "train-0.parquet")
    (tmp_path / "src" / "README.md").write_text("x")
    assert make(tmp_path / "src", tmp_path / "dst", "--num_workers", "2") == 0
    assert packed(tmp_path / "dst" / "train") == named(range(8))
    assert packed(tmp_path / "dst" / "val") == named(range(8, 10))
    assert "test -> val" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.dictionary])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_plain_columns(kind: Any, suffix: str, tmp_path: Path):
    """Bytes and words, without any metadata; Arrow's own file format beside its streams."""
    words = pa.array(["owl", "cat", "owl"])
    words = words.dictionary_encode() if kind is pa.dictionary else words
    kind = pa.binary() if kind is pa.dictionary else kind
    found = pa.table({"jpg": pa.array([png(n) for n in range(3)], kind), "class": words})
    src = tmp_path / f"birds.{suffix}"
    if suffix == "parquet":
        pq.write_table(found, src)
    else:
        with pa.ipc.new_file(str(src), found.schema) as file:
            file.write_table(found)
    assert make(src, tmp_path / "dst") == 0
    assert packed(tmp_path / "dst") == {0: "owl", 1: "cat", 2: "owl"}


def test_numbers_are_labels_and_rows_without_an_image_or_a_label_are_listed(tmp_path: Path):
    found = pa.table({"image": [png(0), None, png(2), png(3)], "label": [4, 4, None, 7]})
    pq.write_table(found, tmp_path / "x.parquet")
    assert make(tmp_path / "x.parquet", tmp_path / "dst") == 0
    assert packed(tmp_path / "dst") == {0: 4, 3: 7}
    lines = (tmp_path / "dst" / "quarantine.jsonl").read_text().splitlines()
    listed = {item["source"]: item["reason"] for item in map(json.loads, lines)}
    assert listed == {"x.parquet/00000001": "no image in it", "x.parquet/00000002": "no label"}


def test_images_that_lie_beside_the_table(tmp_path: Path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.png").write_bytes(png(5))
    cells = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": "gone.png"}]
    pq.write_table(pa.table({"image": pa.array(cells, IMAGES)}), tmp_path / "src" / "t.parquet")
    assert make(tmp_path / "src" / "t.parquet", tmp_path / "dst") == 0
    assert packed(tmp_path / "dst") == {5: -1}
    assert "gone.png is not there" in (tmp_path / "dst" / "quarantine.jsonl").read_text()


def test_a_table_of_names_is_a_list_of_images_and_of_labels(tmp_path: Path):
    folder = tmp_path / "src"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.png").write_bytes(png(n))
    names = {"file_name": [f"{n}.png" for n in range(3)], "label": ["b", "a", "b"]}
    expected = {0: "b", 1: "a", 2: "b"}
    pq.write_table(pa.table(names), folder / "list.parquet")
    assert make(folder / "list.parquet", tmp_path / "as_list") == 0
    assert make(folder, tmp_path / "as_labels", "--labels", str(folder / "list.parquet")) == 0
    (folder / "list.parquet").rename(folder / "metadata.parquet")
    assert make(folder, tmp_path / "as_metadata") == 0
    for dst in ("as_list", "as_labels", "as_metadata"):
        assert packed(tmp_path / dst) == expected


def test_options_that_choose_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    left, right = ([png(n + shift) for n in range(3)] for shift in (0, 10))
    found = pa.table({"left": left, "right": right, "label": [0, 1, 0], "target": [5, 5, 6]})
    src = tmp_path / "x.parquet"
    pq.write_table(found, src)
    assert make(src, tmp_path / "a") == 2
    assert "left, right hold images; choose with --image_key" in capsys.readouterr().err
    assert make(src, tmp_path / "a", "--image_key", "left") == 2
    assert "label, target could each be the label; choose with" in capsys.readouterr().err
    chosen = ("--image_key", "right", "--label_column", "target")
    assert make(src, tmp_path / "a", *chosen) == 0
    assert packed(tmp_path / "a") == {10: 5, 11: 5, 12: 6}
    assert make(src, tmp_path / "b", *chosen[:2], "--labels", "none", *chosen[2:]) == 0
    assert packed(tmp_path / "b") == {10: -1, 11: -1, 12: -1}
    assert make(src, tmp_path / "c", "--image_key", "up") == 2
    assert "--image_key up: .* no such column" or capsys.readouterr().err
    assert make(src, tmp_path / "c", "--image_key", "label") == 2
    assert "holds int64, not the bytes of images" in capsys.readouterr().err


@pytest.mark.parametrize("columns, message", [
    ({"url": ["http://x/1.jpg"], "caption": ["x"]}, "addresses of images, not images; download"),
    ({"image": [[[0, 0], [0, 0]]], "label": [0]}, "cast_column('image', datasets.Image())"),
    ({"caption": ["x"]}, "no column holds the bytes of images; it has caption"),
], ids=["urls", "arrays", "text"])  # fmt: skip
def test_tables_without_images_are_refused(
    columns: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "src").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "src" / "x.parquet")
    assert make(tmp_path / "src", tmp_path / "dst") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()


def test_tables_of_other_columns_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, column in (("a", "image"), ("b", "img")):
        (tmp_path / "src" / name).mkdir(parents=True)
        pq.write_table(pa.table({column: [png(1)]}), tmp_path / "src" / name / "x.parquet")
    assert make(tmp_path / "src", tmp_path / "dst") == 2
    assert "has other columns than" in capsys.readouterr().err
    assert make(tmp_path / "src" / "b", tmp_path / "dst") == 0


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_damaged_tables_are_refused_in_one_line(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Every tenth byte changed, one at a time, or a cut end: packed, or one line."""
    if suffix == "parquet":
        pq.write_table(table(range(3)), tmp_path / "whole.parquet")
    else:
        save_to_disk(table(range(3)), tmp_path / "whole")
    whole = next(tmp_path.rglob(f"*.{suffix}")).read_bytes()
    rng = np.random.default_rng(0)
    for case in range(40):
        data = bytearray(whole)
        if case < 5:
            del data[int(rng.integers(len(data))) :]
        else:
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        src = tmp_path / f"x.{suffix}"
        src.write_bytes(bytes(data))
        code = make(src, tmp_path / f"dst{case}")
        err = capsys.readouterr().err
        assert code in (0, 2), err
        assert code == 0 or err.splitlines()[-1].startswith("xcit-dino: "), err


def test_without_pyarrow_the_extra_is_named(tmp_path: Path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    code = (
        "import sys; sys.modules['pyarrow'] = None; from xcit_dino.cli import main; "
        f"sys.exit(main(['shards', 'make', {str(tmp_path / 'x.parquet')!r}, 'dst']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=tmp_path, env=os.environ)  # fmt: skip
    assert done.returncode == 2 and "pip install 'xcit-dino[parquet]'" in done.stderr


def test_row_groups_are_not_held_whole(tmp_path: Path):
    """A row group of 64 MB takes far less memory than that."""
    cells = [os.urandom(1 << 20) for _ in range(64)]
    pq.write_table(pa.table({"image": cells}), tmp_path / "x.parquet", compression="none")
    del cells
    code = (
        "import resource, sys; from pathlib import Path; "
        "from xcit_dino.data.columns.arrow import find_columns, open_schema, rows; "
        "import pyarrow.parquet; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        f"assert sum(len(x) for x, in rows(Path({str(tmp_path / 'x.parquet')!r}), ['image'])) "
        "== 64 << 20; "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40_000, done.stdout
