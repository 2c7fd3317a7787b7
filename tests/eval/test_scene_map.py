"""Features of tiles back in the places of their scenes."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xcit_dino.cli import main
from xcit_dino.data.pack.image_file import Place
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.eval import embed
from xcit_dino.eval.config import EmbedConfig
from xcit_dino.eval.pictures.scene_map import file_names, place_of, write_maps

RANDOM = np.random.default_rng(5)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_embed_puts_every_tile_into_its_place(run_folder, tmp_path: Path):
    src = tmp_path / "src"
    (src / "north").mkdir(parents=True)
    for name, height in (("a.png", 100), ("north/a.png", 64)):
        values = RANDOM.integers(1, 255, (height, 90, 3), np.uint8)
        values[:40, :40] = 0  # no foreground in the first tile
        Image.fromarray(values).save(src / name)
    options = "--tile 32 --stride 20 --min_foreground 0.1 --labels none --num_workers 1".split()
    assert main(["shards", "make", str(src), str(tmp_path / "shards"), *options]) == 0
    config = run_folder.target(data_path=str(tmp_path / "shards"), baselines=True)
    embed.run(EmbedConfig(tmp_path / "out", config, examples=2))
    features = np.load(tmp_path / "out" / "features.npy")
    images = rows_of(tmp_path / "out" / "images.csv")
    maps = {row["scene"]: row for row in rows_of(tmp_path / "out" / "maps" / "scenes.csv")}
    corners = {"a.png": [0, 20, 40, 60, 68], "north/a.png": [0, 20, 32]}
    for scene, ys in corners.items():
        found, xs = np.load(tmp_path / "out/maps" / f"{maps[scene]['file']}.npy"), [0, 20, 40, 58]
        expected = np.full((len(ys), len(xs), features.shape[1]), np.nan, np.float32)
        for row, image in enumerate(images):
            if image["scene"] == scene:
                expected[ys.index(int(image["y"])), xs.index(int(image["x"]))] = features[row]
        np.testing.assert_array_equal(found, expected)
        assert np.isnan(found[0, 0]).all() and not np.isnan(found[-1]).any()
        assert int(maps[scene]["tiles"]) == len(ys) * len(xs) - 1
        with Image.open(tmp_path / "out/maps" / f"{maps[scene]['file']}.png") as picture:
            assert picture.width / picture.height == pytest.approx(4 / len(ys), abs=0.01)
            assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert {"maps-random", "maps-pixels"} <= {p.name for p in (tmp_path / "out").iterdir()}
    embed.run(EmbedConfig(tmp_path / "out", config, examples=0))  # its own files are replaced


def test_no_maps_without_tiles(run_folder, tmp_path: Path):
    embed.run(EmbedConfig(tmp_path / "out", run_folder.target(), split="val", examples=0))
    assert not (tmp_path / "out" / "maps").exists()
    assert rows_of(tmp_path / "out" / "images.csv")[0]["scene"] == ""
    assert ShardIndex.load(run_folder.data / "val").num_samples


def test_regions_of_alike_features_have_one_color(tmp_path: Path):
    spectra = np.eye(8, dtype=np.float32)[[0, 1, 2, 3]]
    regions = (np.arange(36) // 9).tolist()
    features = spectra[regions] + RANDOM.normal(0, 0.01, (36, 8)).astype(np.float32)
    places = [Place("s.tif", 60, 60, n % 6 * 10, n // 6 * 10, 10, 10) for n in range(36)]
    assert write_maps(features, [*places], tmp_path / "maps") == 1
    with Image.open(tmp_path / "maps" / "s.png") as picture:
        side = picture.width // 6
        cells = np.asarray(picture).astype(int)[side // 2 :: side, side // 2 :: side].reshape(-1, 3)
    means = np.stack([cells[9 * k : 9 * k + 9].mean(0) for k in range(4)])
    inside = max(cells[9 * k : 9 * k + 9].std(0).max() for k in range(4))
    between = min(np.abs(means[a] - means[b]).max() for a in range(4) for b in range(a))
    assert between > 10 * inside


def test_names_and_places_from_hostile_shards():
    scenes = ["../../etc/x.tif", "a/b.tif", "a-b.png", "é", "..", "A-B.x"]
    names = file_names(scenes)
    assert names == ["etc-x", "a-b", "a-b-2", "scene", "scene-2", "A-B-3"]
    good = Place("s", 64, 64, 0, 0, 32, 32)._asdict()
    assert place_of(good) == Place(**good)
    for change in ({"x": "0"}, {"stride": 0}, {"scene": 3}, {"scene_width": 10**9}, {"tile": -1}):
        assert place_of(good | change) is None
    assert place_of({"source": "a.jpg"}) is None
