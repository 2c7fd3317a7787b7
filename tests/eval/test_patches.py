"""Patch features in files and in colors: against the network, a plain principal component analysis
and drawings whose colors are known."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import victims
from xcit_dino.cli import main
from xcit_dino.data.decode.rgb import Scratch, decode, read_header
from xcit_dino.data.pack.image_file import Place
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError
from xcit_dino.eval import embed
from xcit_dino.eval.config import AttentionConfig, EmbedConfig
from xcit_dino.eval.dense import patches
from xcit_dino.eval.dense.components import PatchColors, fit_colors
from xcit_dino.eval.dense.grids import GridFile, Grids, write_table
from xcit_dino.eval.dense.scenes import assembled
from xcit_dino.eval.pictures import attention
from xcit_dino.eval.pictures.false_color import FalseColor
from xcit_dino.eval.pictures.scene_map import grids as scenes_of
from xcit_dino.models.dense import feature_maps
from xcit_dino.models.weights.load import load_backbone
from xcit_dino.models.zoo import create_model
from xcit_dino.report.report import page
from xcit_dino.train.distributed import dist
from xcit_dino.train.run.reader import read_runs

SIZES = ((40, 64), (40, 64), (33, 50), (56, 24), (40, 64))


# ---------------------------------------------------------------------------- colors


def blob(seed: int = 0, size: tuple[int, int] = (12, 16)) -> tuple[np.ndarray, np.ndarray]:
    """Features [h, w, 6] of an object amid a background, far apart, and where it is."""
    rng = np.random.default_rng(seed)
    inside = np.zeros(size, bool)
    inside[3:9, 4:12] = True
    grid = rng.normal(0, 0.1, (*size, 6)).astype(np.float32)
    grid[inside, :2] += 3
    grid[..., 2] += inside * np.linspace(-1, 1, size[1])
    return grid, inside


def test_components_are_those_of_a_plain_decomposition():
    """Projections on the right singular vectors; signs may differ."""
    grid, _ = blob()
    rows = grid.reshape(-1, 6).astype(np.float64)
    centered = rows - rows.mean(0)
    _, _, axes = np.linalg.svd(centered, full_matrices=False)
    colors = fit_colors([grid])
    assert colors is not None
    assert np.allclose(abs(axes[0] @ colors.axis), 1, atol=1e-5)
    for n in range(3):
        scores = centered @ axes[n]
        found = rows @ colors.every.weights[:, n]
        assert abs(np.corrcoef(scores, found)[0, 1]) > 0.9999
        low, high = np.percentile(found + colors.every.offset[n], (1, 99))
        assert (low, high) == pytest.approx((0, 1), abs=1e-4)


def test_the_foreground_is_what_the_border_has_less_of():
    grid, inside = blob()
    for sign in (1, -1):
        colors = fit_colors([sign * grid, sign * blob(1)[0]])
        assert colors is not None
        assert np.array_equal(colors.is_foreground(sign * grid), inside)
        found = colors(sign * grid)
        assert (found.foreground[~inside] == 0).all()
        assert found.foreground[inside].any(-1).mean() > 0.9
        left, right = found.foreground[5, 4].astype(int), found.foreground[5, 11].astype(int)
        assert abs(left - right).max() > 150  # the object's own variation fills its colors
        assert (found.enlarged(24, 64).patches[::2, ::4] == found.patches).all()


def test_colors_of_little():
    assert fit_colors([]) is None and fit_colors([np.zeros((1, 1, 4), np.float32)]) is None
    colors = fit_colors([np.ones((2, 2, 4), np.float32)])
    assert colors is not None and colors(np.ones((2, 2, 4), np.float32)).patches.shape == (2, 2, 3)


# ---------------------------------------------------------------------------- files


def test_a_file_of_grids_is_an_array(tmp_path: Path):
    rng = np.random.default_rng(0)
    file = GridFile(tmp_path / "00000.npy", 3)
    one, two = rng.normal(size=(2, 4, 5, 3)), rng.normal(size=(1, 1, 2, 3))
    two[0, 0, 0, 0] = 1e6
    file.write([7, 2], one.astype(np.float32))
    file.write([0], two.astype(np.float32))
    file.close()
    write_table(tmp_path, file.places)
    table = np.load(tmp_path / "00000.npy", mmap_mode="r")
    assert table.shape == (42, 3) and table.dtype == np.float16 and file.clipped == 1
    grids = Grids(tmp_path)
    assert sorted(grids) == [0, 2, 7] and grids.width == 3
    for row, expected in ((7, one[0]), (2, one[1])):
        assert np.array_equal(grids[row], expected.astype(np.float16))
    assert grids[0][0, 0, 0] == np.finfo(np.float16).max


def pack(folder: Path, sizes: tuple[tuple[int, int], ...] = SIZES) -> Path:
    rng = np.random.default_rng(0)
    for number, size in enumerate(sizes):
        path = folder / f"photos/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    shards = folder / "shards"
    assert main(["shards", "make", str(folder / "photos"), str(shards), "--num_workers", "1"]) == 0
    return shards


def read(index: ShardIndex, sample: int) -> np.ndarray:
    shard, offset, size = index.locate(sample)
    raw = Path(index.path(shard)).read_bytes()[offset : offset + size]
    return decode(raw, read_header(raw), Scratch())


@pytest.mark.parametrize("tap", [-1, 2])
def test_embed_writes_the_networks_patches(run_folder: Any, tmp_path: Path, tap: int):
    """NumPy and csv alone, as the docs have it; the same whatever the batch."""
    shards = pack(tmp_path)
    found = []
    for batch in (1, 128):
        config = run_folder.target(data_path=str(shards), batch_size_per_gpu=batch, baselines=True)
        out = tmp_path / f"out{batch}"
        embed.run(EmbedConfig(out, config, patches=True, tap=tap, image_size=0, examples=3))
        found.append(np.load(out / "patches/00000.npy", mmap_mode="r"))
    assert np.abs(found[0].astype(float) - found[1]).max() < 0.01
    model = create_model("xcit_pico_6_p8", num_classes=0).eval()
    load_backbone(run_folder.weights, model)
    _, context = embed.resolve(run_folder.target(data_path=str(shards)), dist.init("cpu"))
    index = context.index("train")
    with (out / "patches/grids.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [int(line["row"]) for line in rows] == list(range(5))
    for line in rows:
        first, height, width = (int(line[name]) for name in ("first", "rows", "columns"))
        table = np.load(out / "patches" / line["file"], mmap_mode="r")
        grid = table[first : first + height * width].reshape(height, width, -1)
        pixels = read(index, int(line["row"]))
        sides = [max(1, round(side / 8)) for side in pixels.shape[:2]]
        assert [height, width] == sides
        photo = Image.fromarray(pixels).resize((8 * width, 8 * height), Image.Resampling.BICUBIC)
        tensor = context.normalize(torch.tensor(np.asarray(photo)).permute(2, 0, 1)[None])
        with torch.no_grad():
            (expected,) = feature_maps(model, tensor, [tap])
        expected = expected[0].permute(1, 2, 0).numpy()
        assert np.allclose(grid, expected, atol=2e-3 * np.abs(expected).max())
    names = {path.name for path in out.iterdir()}
    assert {"patches-random", "patches.png", "patches-random.png"} <= names
    assert "patches-pixels" not in names
    with Image.open(out / "patches.png") as picture:
        assert picture.height == 3 * (patches.HEIGHT + patches.GAP)
    embed.run(EmbedConfig(out, config, examples=0))  # takes its place
    assert not (out / "patches").exists()


def test_the_shorter_side_follows_the_options(run_folder: Any, tmp_path: Path):
    shards = pack(tmp_path)
    for size, side in ((-1, 48), (64, 64)):
        config = run_folder.target(data_path=str(shards), resize_size=48, crop_size=32)
        embed.run(EmbedConfig(tmp_path / "out", config, patches=True, image_size=size, examples=0))
        grids = Grids(tmp_path / "out/patches")
        assert {min(grids[row].shape[:2]) for row in grids} == {side // 8}


def test_too_little_space_and_no_such_layer(run_folder: Any, tmp_path: Path, monkeypatch: Any):
    config = run_folder.target(data_path=str(pack(tmp_path)))
    with pytest.raises(InputError, match="--tap 6: xcit_pico_6_p8 has layers 0 to 5"):
        embed.run(EmbedConfig(tmp_path / "out", config, patches=True, tap=6))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(patches.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="--patches true: about .* GB free; choose a smaller"):
        embed.run(EmbedConfig(tmp_path / "out", config, patches=True))
    assert not (tmp_path / "out").exists()


def test_two_processes_write_the_same_grids(run_folder: Any, tmp_path: Path):
    shards = pack(tmp_path)
    words = ["--output_dir", str(run_folder.path), "--data_path", str(shards), "--device", "cpu"]
    words += ["--pretrained_weights", str(run_folder.weights), "--num_workers", "0"]
    words += ["--patches", "true", "--examples", "1", "--batch_size_per_gpu", "1"]
    assert main(["embed", str(tmp_path / "one"), *words]) == 0
    victims.on_two_processes(["embed", str(tmp_path / "two"), *words], tmp_path)
    one, two = (Grids(tmp_path / name / "patches") for name in ("one", "two"))
    assert {place.file for place in two.places.values()} == {"00000.npy", "00001.npy"}
    assert sorted(one) == sorted(two) == list(range(5))
    assert all(np.array_equal(one[row], two[row]) for row in one)
    names = {path.name for path in (tmp_path / "two/patches").iterdir()}
    assert names == {"00000.npy", "00001.npy", "grids.csv"}


# ---------------------------------------------------------------------------- pictures


def test_tiles_are_put_back_and_averaged_where_they_overlap(tmp_path: Path):
    """Two tiles of 4 patches a side, 32 pixels, that overlap by half; one channel a color."""
    file = GridFile(tmp_path / "00000.npy", 3)
    file.write([0, 1], np.stack([np.full((4, 4, 3), value, np.float32) for value in (0.2, 0.8)]))
    file.close()
    write_table(tmp_path, file.places)
    places: list[Place | None] = [Place("a.tif", 64, 32, x, 0, 32, 16) for x in (0, 16)]
    same = FalseColor(np.eye(3, dtype=np.float32), np.zeros(3, np.float32))
    colors = PatchColors(np.array([1, 0, 0], np.float32), 0.5, same, same)
    (scene,) = scenes_of(places)
    picture = assembled(scene, places, Grids(tmp_path), colors, "patches")
    assert picture.shape == (4, 8, 3)
    assert picture[0, :, 0].tolist() == [51, 51, 128, 128, 204, 204, 255, 255]
    front = assembled(scene, places, Grids(tmp_path), colors, "foreground")
    assert front[0, :, 0].tolist() == [0, 0, 102, 102, 204, 204, 255, 255]


def test_scenes_in_the_colors_of_their_patches(run_folder: Any, tmp_path: Path):
    """The packed tiles of a scene, and their picture in the report."""
    rng = np.random.default_rng(0)
    (tmp_path / "src").mkdir()
    pixels = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "src/north.png")
    words = ["shards", "make", str(tmp_path / "src"), str(tmp_path / "tiles"), "--tile", "32"]
    assert main([*words, "--num_workers", "1"]) == 0
    config = run_folder.target(data_path=str(tmp_path / "tiles"), crop_size=32)
    embed.run(EmbedConfig(None, config, patches=True, examples=1))
    maps = run_folder.path / "embeddings/train/maps"
    with Image.open(maps / "north-patches.png") as picture:
        assert picture.size == (12 * 85, 8 * 85)
    assert (maps / "north-foreground.png").is_file()
    text = page(read_runs([run_folder.path]))
    assert 'id="scenes"' in text and "north (train)" in text


def config_for(run_folder: Any, src: Path, dst: Path, **options: Any) -> AttentionConfig:
    options = {"image_size": 32, "device": "cpu", "draw": "patches"} | options
    return AttentionConfig(src, dst, run_folder.path, run_folder.weights, **options)


@pytest.mark.parametrize("shared", [False, True])
def test_photos_and_animations(run_folder: Any, tmp_path: Path, shared: bool):
    """In shared colors the photo, the animation's first frame, looks like it; in its own colors it
    looks as if it were alone."""
    src, dst = tmp_path / "src", tmp_path / "out"
    src.mkdir()
    photo = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)
    frames = [Image.fromarray(np.roll(photo, 9 * i, 1)).quantize(200) for i in range(3)]
    frames[0].convert("RGB").save(src / "photo.png")
    frames[0].save(src / "clip.gif", save_all=True, append_images=frames[1:])
    (src / "broken.jpg").write_bytes(b"no image")
    attention.run(config_for(run_folder, src, dst, shared_colors=shared))
    names = {path.name for path in (dst / "photo").iterdir()}
    assert names == {"patches.png", "foreground.png", "all.png"}
    with Image.open(dst / "photo/all.png") as row, Image.open(dst / "clip.gif") as clip:
        assert row.size == clip.size == (3 * 48, 32)
        assert getattr(clip, "n_frames", 1) == 3
        one, two = np.asarray(row.convert("RGB")), np.asarray(clip.convert("RGB"))
    assert not shared or np.abs(one.astype(int) - two).mean() < 25  # a GIF has 256 colors
    attention.run(config_for(run_folder, src / "photo.png", tmp_path / "alone"))
    alone = (tmp_path / "alone/photo/all.png").read_bytes()
    assert (alone == (dst / "photo/all.png").read_bytes()) is not shared
    attention.run(config_for(run_folder, src / "photo.png", dst, draw="attention"))  # its place
    assert "patches.png" not in {path.name for path in (dst / "photo").iterdir()}


def test_a_network_without_class_attention_and_a_single_patch(run_folder: Any, tmp_path: Path):
    torch.manual_seed(0)
    model = create_model("timm/resnet10t", num_classes=0)
    torch.save(model.state_dict(), tmp_path / "resnet.pth")
    photo = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    options: dict[str, Any] = {"arch": "timm/resnet10t", "tap": 2, "image_size": 64}
    config = AttentionConfig(
        tmp_path / "photo.png", tmp_path / "out", tmp_path, tmp_path / "resnet.pth", device="cpu",
        draw="patches", **options,
    )  # fmt: skip
    attention.run(config)
    with Image.open(tmp_path / "out/photo/all.png") as row:
        assert row.size == (3 * 96, 64)
    Image.new("RGB", (8, 8)).save(tmp_path / "dot.png")
    with pytest.raises(InputError, match="no readable image in it"):
        attention.run(config_for(run_folder, tmp_path / "dot.png", tmp_path / "o", image_size=0))


def test_the_report_shows_patches(whole: Path):
    text = page(read_runs([whole]))
    assert 'id="patch-features"' in text and "foreground" in text
