"""Near-duplicates: planted copies are found, and nothing else; of each, one stays."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from xcit_dino.cli import main
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError
from xcit_dino.eval.knn import Search
from xcit_dino.eval.retrieval import duplicates, near
from xcit_dino.eval.retrieval.config import DuplicatesConfig
from xcit_dino.eval.retrieval.near import Pair


def picture(seed: int, side: int = 64) -> Image.Image:
    """Random shapes at several scales, as different from each other as photographs."""
    numbers = np.random.default_rng(seed)
    total = np.zeros((side, side, 3))
    for cells, weight in ((3, 60), (5, 50), (8, 30)):
        noise = numbers.integers(0, 255, (cells, cells, 3), np.uint8)
        layer = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
        total += weight * (np.asarray(layer) / 127.5 - 1)
    return Image.fromarray((128 + total).clip(0, 255).astype(np.uint8))


def copies(image: Image.Image) -> dict[str, Image.Image]:
    """Copies as people make them."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=30)
    side = image.width
    cropped = image.crop((side // 16, 0, side, side - side // 16))
    return {
        "recompressed": Image.open(buffer),
        "cropped": cropped.resize(image.size, Image.Resampling.BICUBIC),
        "brighter": ImageEnhance.Brightness(image).enhance(0.7),
    }


def gray(image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
    return near.thumbnail(pixels)


# -- pictures --------------------------------------------------------------------------------------


def test_a_whole_thumbnail_correlates_as_numpy_says():
    thumbnails = torch.cat([gray(picture(seed)) for seed in range(4)])
    pairs = torch.tensor([[0, 1], [0, 2], [1, 3], [2, 2]])
    small = thumbnails.double().view(4, 16, 2, 16, 2).mean((2, 4)).view(4, -1).numpy()
    expected = [np.corrcoef(small[a], small[b])[0, 1] for a, b in pairs.tolist()]
    np.testing.assert_allclose(near.correlations(thumbnails, pairs), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["recompressed", "cropped", "brighter"])
def test_copies_correlate_and_others_do_not(kind):
    originals = [picture(seed) for seed in range(6)]
    thumbnails = torch.cat([*map(gray, originals), *(gray(copies(i)[kind]) for i in originals)])
    pairs = torch.tensor([[a, 6 + b] for a in range(6) for b in range(6)])
    scores = near.correlations(thumbnails, pairs).reshape(6, 6)
    assert scores.diagonal().min() > 0.95
    assert scores[~np.eye(6, dtype=bool)].max() < 0.7


def test_crops_are_averages_over_areas():
    """A crop of 26 pixels at (2, 4), against plain sums over its 16 x 16 areas."""
    thumbnail = gray(picture(1)).double()[0]
    expected = np.empty((16, 16))
    fine = thumbnail.repeat_interleave(16, 0).repeat_interleave(16, 1)  # 16 to a pixel
    for y in range(16):
        for x in range(16):
            top, left = 2 * 16 + 26 * y, 4 * 16 + 26 * x
            expected[y, x] = fine[top : top + 26, left : left + 26].mean()
    found = near._shrink(26, 2).double() @ thumbnail @ near._shrink(26, 4).double().t()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_flat_pictures_are_equal_only_where_they_are():
    thumbnails = torch.stack([torch.full((32, 32), v, dtype=torch.uint8) for v in (0, 1, 90)])
    pairs = torch.tensor([[0, 1], [0, 2]])
    assert near.correlations(thumbnails, pairs).tolist() == [1, 0]


def test_values_of_other_types_are_stretched():
    pixels = torch.from_numpy(np.array(picture(3))).permute(2, 0, 1)[None]
    other = near.thumbnail(pixels.float() * 11 - 4000)
    assert near.correlations(torch.cat([near.thumbnail(pixels), other]),
                             torch.tensor([[0, 1]]))[0] > 0.999  # fmt: skip


# -- pairs -----------------------------------------------------------------------------------------


def test_a_cluster_larger_than_the_search_is_found_whole():
    """20 equal images among 40: all their 190 pairs."""
    features = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    features[:20] = features[0] + 1e-3 * features[:20]
    pictures = [gray(picture(0 if row < 20 else row)) for row in range(40)]
    search = Search(features)
    found = near.near_duplicates(
        search, features, near.neighborhood(search, features, 5), torch.cat(pictures), 0.94
    )
    assert {(p.first, p.second) for p in found} == {(a, b) for b in range(20) for a in range(b)}
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert all(p.cosine == pytest.approx(unit[p.first] @ unit[p.second], abs=1e-5) for p in found)
    assert len(near.leave_out(found, np.arange(40))) == 19


def test_of_a_chain_every_second_one_stays():
    chain = [Pair(1.0 - n / 100, n, n + 1, 0.9) for n in range(5)]
    dropped = near.leave_out(chain, np.arange(6))
    assert sorted(dropped) == [1, 3, 5] and dropped[3] == chain[2]
    assert sorted(near.leave_out(chain, np.array([1, 0, 2, 4, 3, 5]))) == [0, 2, 3, 5]


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """12 + 5 images in shards: copies of 0 and 1 inside train, of 2 in val, 3 in both classes."""
    folder = tmp_path / "images"
    for seed in range(9):
        save(picture(seed), folder / "train" / "ab"[seed % 2] / f"{seed}.jpg")
    for seed in range(100, 104):
        save(picture(seed), folder / "val" / "ab"[seed % 2] / f"{seed}.jpg")
    save(copies(picture(0))["cropped"], folder / "train/a/0-cropped.jpg")
    save(copies(picture(1))["brighter"], folder / "train/a/1-brighter.jpg")
    save(picture(1), folder / "train/b/1-again.jpg")
    save(copies(picture(2))["recompressed"], folder / "val/a/2-recompressed.jpg")
    assert (
        main(["shards", "make", str(folder), str(tmp_path / "shards"), "--num_workers", "1"]) == 0
    )
    return tmp_path


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=92)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_planted_copies_are_found_and_left_out(planted: Path, run_folder, capsys, monkeypatch):
    """All images are candidates here: what is tested is the confirmation, and the lists."""
    monkeypatch.setattr(near, "K", 16)
    target = run_folder.target(data_path=str(planted / "shards"))
    duplicates.run(DuplicatesConfig(target=target, outliers=3, examples=4))
    folder = run_folder.path / "duplicates"
    found = {frozenset((r["path"], r["path_2"])) for r in rows_of(folder / "pairs.csv")}
    expected = [
        ("a/0.jpg", "a/0-cropped.jpg"), ("b/1.jpg", "a/1-brighter.jpg"),
        ("b/1.jpg", "b/1-again.jpg"), ("b/1-again.jpg", "a/1-brighter.jpg"),
        ("a/2.jpg", "a/2-recompressed.jpg"),
    ]  # fmt: skip
    assert found == {frozenset(pair) for pair in expected}
    out = rows_of(folder / "duplicates.csv")
    leaks = [r for r in out if r["why"] == "leak"]
    assert [(r["path"], r["split"], r["of"], r["of_split"]) for r in leaks] == [
        ("a/2.jpg", "train", "a/2-recompressed.jpg", "val")
    ]
    assert len(out) == 4 and {r["split"] for r in out} == {"train"}
    entry = json.loads((run_folder.path / "results.json").read_text())["duplicates"]
    assert set(entry["seconds"]) == {"thumbnails", "neighbors", "comparison"}
    total = sum(part["wall"] for part in entry["seconds"].values())
    assert entry["wall_seconds"] == pytest.approx(total, abs=0.06)
    metrics = entry["metrics"]
    assert metrics == {
        "images": 17, "pairs": 5, "left_out": 4, "other_label": 2, "leaked_val": 1,
        "leaked_train": 1,
    }  # fmt: skip
    assert len(rows_of(folder / "outliers.csv")) == 3
    with Image.open(folder / "pairs.png") as drawn:
        assert drawn.width == 4 * (2 * 132 + 12)
    assert "leaks: 1 images of val are in train too" in capsys.readouterr().out
    # the list is what `shards make` takes, and afterwards nothing is left to find
    words = f"shards make {planted}/images {planted}/clean --num_workers 1"
    assert main([*words.split(), "--exclude", str(folder / "duplicates.csv")]) == 0
    assert ShardIndex.load(planted / "clean/train").num_samples == 8
    target = run_folder.target(data_path=str(planted / "clean"))
    duplicates.run(DuplicatesConfig(target=target, examples=0))
    assert rows_of(folder / "pairs.csv") == [] and not (folder / "pairs.png").exists()


def test_one_set_without_val(planted: Path, run_folder, capsys):
    target = run_folder.target(data_path=str(planted / "shards/train"))
    duplicates.run(DuplicatesConfig(target=target, examples=0))
    assert "only train is searched" in capsys.readouterr().out
    metrics = json.loads((run_folder.path / "results.json").read_text())["duplicates"]["metrics"]
    assert metrics["pairs"] == 4 and "leaked_val" not in metrics


def test_a_folder_of_something_else_is_refused(planted: Path, run_folder):
    target = run_folder.target(data_path=str(planted / "shards"))
    with pytest.raises(InputError, match="not of duplicates; choose a folder of its own"):
        duplicates.run(DuplicatesConfig(dst=planted / "images", target=target))


def test_a_higher_threshold_finds_fewer_pairs(planted: Path, run_folder, monkeypatch):
    monkeypatch.setattr(near, "K", 16)
    target = run_folder.target(data_path=str(planted / "shards"))
    found = {}
    for threshold in (0.94, 0.9999):
        duplicates.run(DuplicatesConfig(target=target, threshold=threshold, examples=0))
        rows = rows_of(run_folder.path / "duplicates" / "pairs.csv")
        found[threshold] = {(row["path"], row["path_2"]) for row in rows}
        assert all(float(row["correlation"]) >= threshold for row in rows)
    assert {frozenset(pair) for pair in found[0.9999]} == {frozenset(("b/1.jpg", "b/1-again.jpg"))}
    assert found[0.9999] < found[0.94]
