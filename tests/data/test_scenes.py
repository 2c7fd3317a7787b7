"""Large images cut into tiles: windows against whole images, places, foreground, resuming."""

from __future__ import annotations

import colorsys
import io
import json
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from xcit_dino.cli import main
from xcit_dino.data.decode.native import decode_native, open_native
from xcit_dino.data.pack import image_file
from xcit_dino.data.pack.image_file import Image, read_image
from xcit_dino.data.scenes import cut, grid
from xcit_dino.data.scenes.foreground import find_background, otsu, saturation
from xcit_dino.data.scenes.reader import open_scene
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.files import file_sha256

RANDOM = np.random.default_rng(3)
Capture = pytest.CaptureFixture[str]
LAYOUTS: dict[str, dict[str, Any]] = {
    "one strip": {}, "big-endian": {"byteorder": ">"}, "tiles": {"tile": (64, 48)},
    "strips": {"rowsperstrip": 7, "compression": "zlib", "predictor": True},
    "BigTIFF": {"bigtiff": True, "tile": (64, 64), "compression": "zstd"},
    "planar": {"planarconfig": "separate", "tile": (32, 32), "compression": "lzw"},
    "planar strip": {"planarconfig": "separate"},
}  # fmt: skip


def noise(*shape: int, dtype: str = "uint8", most: int = 200) -> np.ndarray:
    return RANDOM.integers(1, most, shape).astype(dtype)


def write(path: Path, values: np.ndarray, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_planar = how.get("planarconfig") == "separate"
    is_gray = values.shape[-1] == 1
    data = np.moveaxis(values, -1, 0) if is_planar else values[..., 0] if is_gray else values
    how = {"photometric": "rgb" if values.shape[-1] == 3 else "minisblack",
           "planarconfig": "contig"} | how  # fmt: skip
    tifffile.imwrite(path, data, metadata=None, **how)
    return path


def scene(path: Path) -> Image:
    return Image(path.name, str(path), size=path.stat().st_size)


def read(path: Path, y: int, x: int, height: int, width: int, page: int | None = None) -> Any:
    with open_scene(scene(path), page, None) as found:
        return found.read(y, x, height, width)


def make(src: Path, dst: Path, *options: str) -> int:
    words = ["shards", "make", str(src), str(dst), "--num_workers", "1", "--tile", "32"]
    return main([*words, *options])


def tiles(folder: Path) -> list[tuple[dict[str, Any], np.ndarray]]:
    """(.json, pixels) of every tile."""
    index, found = ShardIndex.load(folder), []
    for n in range(index.num_samples):
        shard, offset, size = index.locate(n)
        raw = Path(index.path(shard)).read_bytes()[offset : offset + size]
        with tarfile.open(index.path(shard)) as tar:
            member = tar.extractfile(f"{n:09d}.json")
            assert member is not None
            meta = json.load(member)
        if index.pixels.is_rgb8:
            with Pillow.open(io.BytesIO(raw)) as image:
                found.append((meta, np.asarray(image)))
        else:
            found.append((meta, decode_native(raw, open_native(raw), index.pixels)))
    return found


# ---------------------------------------------------------------------------- windows


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["3xuint8", "1xuint16", "13xuint16", "4xfloat32", "2xint16"])
def test_a_window_is_that_part_of_the_whole_image(tmp_path: Path, kind: str, layout: str):
    channels, dtype = kind.split("x")
    values = noise(150, 210, int(channels), dtype=dtype)
    if channels == "1" and "planar" in layout:
        pytest.skip("one channel has no planes")
    path = write(tmp_path / "a.tif", values, **LAYOUTS[layout])
    with open_scene(scene(path), None, None) as found:
        assert (found.kind, found.height, found.width) == (kind, 150, 210)
    for y, x, height, width in (
        (0, 0, 150, 210),
        (3, 5, 70, 100),
        (100, 150, 50, 60),
        (63, 47, 2, 2),
    ):
        expected = values[y : y + height, x : x + width]
        np.testing.assert_array_equal(read(path, y, x, height, width), expected)


def test_windows_of_jpeg_tiles_of_white_is_zero_and_of_pages(tmp_path: Path):
    smooth = np.add.outer(np.arange(96), np.arange(128)).astype(np.uint8)
    color = np.stack([smooth, smooth[::-1], smooth[:, ::-1]], -1)
    path = write(tmp_path / "jpeg.tif", color, tile=(32, 32), compression="jpeg",
                 photometric="ycbcr", subsampling=(2, 2))  # fmt: skip
    window = read(path, 20, 30, 50, 60)
    np.testing.assert_array_equal(window, tifffile.imread(path)[20:70, 30:90])
    path = write(tmp_path / "w.tif", smooth[..., None], photometric="miniswhite")
    np.testing.assert_array_equal(read(path, 1, 2, 9, 8)[..., 0], 255 - smooth[1:10, 2:10])
    pages = noise(3, 40, 50, dtype="uint16")
    tifffile.imwrite(tmp_path / "p.tif", pages, photometric="minisblack", metadata=None)
    path = tmp_path / "p.tif"
    stacked = np.moveaxis(pages, 0, -1)
    np.testing.assert_array_equal(read(path, 4, 5, 6, 7), stacked[4:10, 5:12])
    np.testing.assert_array_equal(read(path, 4, 5, 6, 7, page=1)[..., 0], pages[1, 4:10, 5:12])


def test_windows_of_arrays_of_whole_images_and_of_archive_members(tmp_path: Path):
    values = noise(60, 70, 5, dtype="uint16")
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "b.npy", np.moveaxis(values, -1, 0).astype(">u2"))
    for name in ("a.npy", "b.npy"):
        np.testing.assert_array_equal(read(tmp_path / name, 3, 4, 20, 30), values[3:23, 4:34])
    color = noise(60, 70, 3)
    Pillow.fromarray(color).save(tmp_path / "c.png")
    np.testing.assert_array_equal(read(tmp_path / "c.png", 3, 4, 20, 30), color[3:23, 4:34])
    path = write(tmp_path / "d.tif", values, tile=(32, 32), compression="zlib")
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        tar.add(tmp_path / "a.npy", "first.npy")
        tar.add(path, "d.tif")
    with tarfile.open(tmp_path / "d.tar") as tar:
        at = tar.getmember("d.tif").offset_data
    member = Image("d.tif", str(tmp_path / "d.tar"), at, path.stat().st_size)
    with open_scene(member, None, None) as found:
        np.testing.assert_array_equal(found.read(3, 4, 20, 30), values[3:23, 4:34])


def test_parts_that_a_file_leaves_out_are_no_data(tmp_path: Path):
    tags = [(42113, "s", 0, "7", True)]
    values = noise(64, 64, 1, dtype="uint16")
    path = write(tmp_path / "a.tif", values, tile=(32, 32), compression="zlib", extratags=tags)
    with tifffile.TiffFile(path, mode="r+") as file:
        counts = file.pages.first.tags[325]
        counts.overwrite((0, *counts.value[1:]))
    window = read(path, 0, 0, 64, 64)[..., 0]
    np.testing.assert_array_equal(window, tifffile.imread(path))
    assert (window[:32, :32] == 7).all() and (window[:32, 32:] == values[:32, 32:, 0]).all()


# ---------------------------------------------------------------------------- the grid


@pytest.mark.parametrize(("length", "tile", "stride"), [(100, 32, 16), (96, 32, 32), (97, 32, 32),
                                                        (32, 32, 5), (200, 50, 49)])  # fmt: skip
def test_tiles_cover_a_side_and_stay_inside(length: int, tile: int, stride: int):
    corners = grid.starts(length, tile, stride)
    covered = np.zeros(length, int)
    for corner in corners:
        assert 0 <= corner <= length - tile
        covered[corner : corner + tile] += 1
    assert covered.all() and corners == sorted(set(corners))
    assert max(np.diff(corners), default=0) <= stride


def test_panels_hold_every_tile_once_and_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grid, "PANEL_BYTES", 100_000)
    rows = grid.bands(500, 700, 64, 32, 3)
    found = [(y, x) for row in rows for panel in row for y in panel.ys for x in panel.xs]
    ys, xs = grid.starts(500, 64, 32), grid.starts(700, 64, 32)
    assert sorted(found) == [(y, x) for y in ys for x in xs]
    assert all(p.box[2] * p.box[3] * 3 <= 100_000 for row in rows for p in row)


# ---------------------------------------------------------------------------- foreground


def test_otsu_is_the_best_of_all_thresholds():
    values = np.concatenate([RANDOM.normal(30, 9, 4000), RANDOM.normal(150, 30, 900)])
    counts = np.bincount(values.clip(0, 255).astype(int), minlength=256)
    levels = np.repeat(np.arange(256), counts)

    def between(level: int) -> float:
        low, high = levels[levels <= level], levels[levels > level]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(low) * len(high) else 0

    assert otsu(counts) == max(range(255), key=between)


def test_saturation_is_that_of_hsv():
    colors = noise(200, 3, most=256)
    expected = [int(255 * colorsys.rgb_to_hsv(*(c / 255))[1] + 1e-9) for c in colors]
    np.testing.assert_array_equal(saturation(colors), expected)


def slide(tmp_path: Path, share: float = 0.5) -> tuple[Path, np.ndarray]:
    """White glass with pink tissue at the left; which pixels are tissue."""
    values = RANDOM.integers(236, 244, (128, 160, 3)).astype(np.uint8)
    tissue = np.zeros((128, 160), bool)
    tissue[:, : round(160 * share)] = True
    values[tissue] = np.array((190, 100, 160)) + RANDOM.integers(-20, 20, (int(tissue.sum()), 3))
    return write(tmp_path / "slide.tif", values, tile=(64, 64)), tissue


def test_the_glass_of_a_slide_is_background_and_the_ground_of_a_scene_is_not(tmp_path: Path):
    path, tissue = slide(tmp_path)
    with open_scene(scene(path), None, None) as found:
        rule = find_background(found, "auto", None)
        assert rule.saturation is not None
        np.testing.assert_array_equal(rule.foreground(found.read(0, 0, 128, 160)), tissue)
        assert find_background(found, "nodata", None).saturation is None
    ground = noise(128, 160, 3)
    ground[:, :40] = 0  # a black border
    with open_scene(scene(write(tmp_path / "ground.tif", ground)), None, None) as found:
        rule = find_background(found, "auto", None)
        assert rule.saturation is None
        assert rule.foreground(found.read(0, 0, 128, 160)).mean() == 0.75


def test_tiles_without_enough_foreground_are_left_out_and_counted(tmp_path: Path, capsys: Capture):
    path, tissue = slide(tmp_path, 0.45)
    assert make(path.parent, tmp_path / "d", "--stride", "16", "--min_foreground", "0.3") == 0
    ys, xs = grid.starts(128, 32, 16), grid.starts(160, 32, 16)
    shares = {(y, x): tissue[y : y + 32, x : x + 32].mean() for y in ys for x in xs}
    expected = {place for place, share in shares.items() if share >= 0.3}
    assert {(m["y"], m["x"]) for m, _ in tiles(tmp_path / "d")} == expected
    left = len(shares) - len(expected)
    out = capsys.readouterr().out
    assert f"tiles: {len(shares)} of 32 px from 1 scenes" in out
    assert f"tiles: {left} of them have less than 0.3 foreground and are left out; 1 of the" in out


# ---------------------------------------------------------------------------- packing


@pytest.mark.parametrize("kind", ["rgb8", "1xuint16", "13xuint16", "4xfloat32"])
def test_tiles_are_the_parts_of_their_scene_that_their_places_name(tmp_path: Path, kind: str):
    channels, dtype = ("3", "uint8") if kind == "rgb8" else kind.split("x")
    scenes = {}
    for name, height in (("a.tif", 70), ("deep/b.tif", 90)):
        scenes[name] = noise(height, 80, int(channels), dtype=dtype)
        write(tmp_path / "src" / name, scenes[name], tile=(16, 16))
    assert make(tmp_path / "src", tmp_path / "d", "--stride", "24", "--labels", "none") == 0
    assert ShardIndex.load(tmp_path / "d").pixels.name == kind
    found = tiles(tmp_path / "d")
    assert len(found) == (3 + 4) * 3
    for meta, pixels in found:
        whole = scenes[meta["scene"]]
        assert (meta["scene_height"], meta["scene_width"]) == whole.shape[:2]
        assert (meta["tile"], meta["stride"], meta["height"], meta["width"]) == (32, 24, 32, 32)
        y, x = meta["y"], meta["x"]
        np.testing.assert_array_equal(pixels, whole[y : y + 32, x : x + 32])
        assert meta["source"] == f"{meta['scene']}@{x},{y}"


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_no_data_of_a_scene_is_that_of_its_tiles(tmp_path: Path, capsys: Capture, channels: int):
    values = noise(64, 64, channels, dtype="int16")
    values[:20] = -999
    tags = [(42113, "s", 0, "-999", True)]
    write(tmp_path / "i" / "a.tif", values, extratags=tags)
    assert make(tmp_path / "i", tmp_path / "di") == 0
    form = ShardIndex.load(tmp_path / "di").pixels
    assert form.statistics is not None
    assert form.statistics.invalid == (20 / 64,) * channels
    np.testing.assert_allclose(form.statistics.mean, values[20:].mean((0, 1)))
    write(tmp_path / "f" / "a.tif", values.astype(np.float32), extratags=tags)
    assert make(tmp_path / "f", tmp_path / "df", "--min_foreground", "0.5") == 0
    assert "tiles: 2 of them" in capsys.readouterr().out
    form = ShardIndex.load(tmp_path / "df").pixels
    assert form.statistics is not None and max(form.statistics.invalid) == 0


def test_opacity_is_dropped_and_says_what_is_no_data(tmp_path: Path):
    values = noise(64, 64, 4)
    values[..., 3] = 255
    values[:, 32:, 3] = 0
    write(tmp_path / "src/a.tif", values, photometric="rgb", extrasamples=["unassalpha"])
    assert make(tmp_path / "src", tmp_path / "d", "--min_foreground", "0.1") == 0
    found = tiles(tmp_path / "d")
    assert {meta["x"] for meta, _ in found} == {0} and found[0][1].shape == (32, 32, 3)


def test_splits_and_labels_are_those_of_the_scenes(tmp_path: Path):
    for name in ("train/forest/a.tif", "train/town/b.tif", "val/forest/c.tif"):
        write(tmp_path / "src" / name, noise(64, 64, 3))
    assert make(tmp_path / "src", tmp_path / "d") == 0
    train, val = (ShardIndex.load(tmp_path / "d" / split) for split in ("train", "val"))
    assert train.classes == val.classes == ["forest", "town"]
    assert (sorted(train.labels.tolist()), val.labels.tolist()) == ([0] * 4 + [1] * 4, [0] * 4)
    names = [{meta["scene"] for meta, _ in tiles(tmp_path / "d" / s)} for s in ("train", "val")]
    assert names == [{"forest/a.tif", "town/b.tif"}, {"forest/c.tif"}]
    (tmp_path / "labels.csv").write_text("name,label\na.tif,0\nb.tif,1\nc.tif,1\n")
    flat = tmp_path / "flat"
    for path in (tmp_path / "src").rglob("*.tif"):
        write(flat / path.name, tifffile.imread(path))
    assert make(flat, tmp_path / "e", "--labels", str(tmp_path / "labels.csv")) == 0
    assert sorted(ShardIndex.load(tmp_path / "e").labels.tolist()) == [0] * 4 + [1] * 8


def test_an_interrupted_cut_goes_on_with_the_rows_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
):
    monkeypatch.setattr(grid, "PANEL_BYTES", 32 * 32 * 3)
    write(tmp_path / "src/a.tif", noise(160, 64, 3))
    assert make(tmp_path / "src", tmp_path / "whole") == 0
    whole, seen = cut._cut_rows, []

    def until(task: Any, advance: Any) -> None:
        if len(seen) == 2:
            raise KeyboardInterrupt
        whole(task, advance)
        seen.append(task)

    with monkeypatch.context() as patch:
        patch.setattr(cut, "_cut_rows", until)
        assert make(tmp_path / "src", tmp_path / "d") == 130
    assert "goes on where it stopped" in capsys.readouterr().err
    monkeypatch.setattr(cut, "_cut_rows", lambda *a: (seen.append(a[0]), whole(*a)))
    assert make(tmp_path / "src", tmp_path / "d") == 0
    assert len(seen) == 5
    names = ("shard-000000.tar", "index.json")
    assert [file_sha256(tmp_path / "d" / name) for name in names] == [
        file_sha256(tmp_path / "whole" / name) for name in names
    ]
    assert not (tmp_path / "d" / ".packing").exists()


def test_what_is_packed_is_not_cut_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
):
    for name in ("train/a.tif", "val/b.tif"):
        write(tmp_path / "src" / name, noise(64, 64, 3))
    assert make(tmp_path / "src", tmp_path / "d") == 0
    before = file_sha256(tmp_path / "d/train/index.json")
    with monkeypatch.context() as patch:
        patch.setattr(cut, "_cut_rows", lambda *_: pytest.fail("it was cut again"))
        capsys.readouterr()
        assert make(tmp_path / "src", tmp_path / "d") == 0
        assert capsys.readouterr().out.count("4 images are packed already; nothing to do") == 2
    assert make(tmp_path / "src", tmp_path / "d", "--seed", "1") == 2
    assert "of another source or of other options" in capsys.readouterr().err
    assert file_sha256(tmp_path / "d/train/index.json") == before
    write(tmp_path / "src/train/a.tif", noise(64, 64, 3, most=20))  # a file of the same size
    assert make(tmp_path / "src", tmp_path / "d") == 2


def test_memory_is_bounded_by_the_panel_not_by_the_scene(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(grid, "PANEL_BYTES", 2 << 20)
    path = write(tmp_path / "src/a.tif", np.full((4000, 4000, 3), 90, np.uint8),
                 tile=(256, 256), compression="zlib")  # fmt: skip
    assert 4000 * 4000 * 3 > 45e6 > path.stat().st_size
    tracemalloc.start()
    try:
        words = ["shards", "make", str(path.parent), str(tmp_path / "d"), "--num_workers", "1"]
        assert main([*words, "--tile", "512", "--min_foreground", "0.1"]) == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20
    assert ShardIndex.load(tmp_path / "d").num_samples == 64


def test_many_files_are_read_with_few_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(image_file, "MAX_OPEN", 3)
    for n in range(20):
        (tmp_path / str(n)).write_bytes(bytes([n]) * 9)
    before = len(list(Path("/proc/self/fd").iterdir()))
    read = [read_image(Image("x", str(tmp_path / str(n)), 1, 2)) for n in range(20)]
    assert read == [bytes([n]) * 2 for n in range(20)]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3


# ---------------------------------------------------------------------------- bad input


def test_a_tile_larger_than_the_image(tmp_path: Path, capsys: Capture):
    small = write(tmp_path / "src/small.tif", noise(20, 90, 3))
    assert make(small.parent, tmp_path / "d") == 2
    assert "--tile 32 is larger than its 90 x 20 pixels; --tile 20 fits" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
    write(tmp_path / "src/large.tif", noise(64, 64, 3))
    assert make(small.parent, tmp_path / "d") == 0  # the others are cut
    assert ShardIndex.load(tmp_path / "d").num_samples == 4
    assert "small.tif" in (tmp_path / "d" / "quarantine.jsonl").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--stride 0", "--stride 0: must be from 1"),
        ("--min_foreground 1.5", "--min_foreground 1.5: must be from 0 to 1"),
        ("--masks x", "--masks: is not available for tiles"),
        ("--background slide", "--background: no tile is left out without --min_foreground"),
        ("--pixels 2xuint16", "--pixels 2xuint16: the scenes are 1 3xuint8 (a.tif)"),
        ("--min_foreground 1 --nodata 7", "--min_foreground 1: all 4 tiles have less"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, capsys: Capture, options: str, message: str):
    values = noise(64, 64, 3)
    values[::32] = 7
    write(tmp_path / "src/a.tif", values)
    assert make(tmp_path / "src", tmp_path / "d", *options.split()) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_gaps_between_tiles_are_said(tmp_path: Path, capsys: Capture):
    write(tmp_path / "src/a.tif", noise(100, 100, 3))
    assert make(tmp_path / "src", tmp_path / "d", "--stride", "40") == 0
    assert "--stride leaves 8 px between them, which are in no tile" in capsys.readouterr().out
    assert {(m["y"], m["x"]) for m, _ in tiles(tmp_path / "d")} == {
        (y, x) for y in (0, 40) for x in (0, 40)
    }


def test_scenes_of_several_kinds_are_refused_before_anything_is_cut(
    tmp_path: Path, capsys: Capture
):
    write(tmp_path / "src/a.tif", noise(64, 64, 3))
    write(tmp_path / "src/b.tif", noise(64, 64, 4, dtype="uint16"))
    assert make(tmp_path / "src", tmp_path / "d") == 2
    assert "1 rgb8 (a.tif), 1 4xuint16 (b.tif); --pixels rgb8 takes" in capsys.readouterr().err
    assert make(tmp_path / "src", tmp_path / "d", "--pixels", "4xuint16") == 0
    assert ShardIndex.load(tmp_path / "d").pixels.name == "4xuint16"
    assert "a.tif" in (tmp_path / "d" / "quarantine.jsonl").read_text()


def test_damage_costs_the_tiles_that_it_touches(tmp_path: Path):
    path = write(tmp_path / "src/a.tif", noise(96, 96, 3), tile=(32, 32), compression="zlib")
    with tifffile.TiffFile(path) as file:
        at = file.pages.first.dataoffsets[4]
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 40)
    assert make(path.parent, tmp_path / "d") == 0
    assert {(m["y"], m["x"]) for m, _ in tiles(tmp_path / "d")} == {
        (y, x) for y in (0, 32, 64) for x in (0, 32, 64)
    } - {(32, 32)}
    assert '"a.tif@32,32"' in (tmp_path / "d" / "quarantine.jsonl").read_text()


def test_what_cannot_be_read_in_parts_needs_max_pixels(tmp_path: Path, capsys: Capture):
    write(tmp_path / "src/a.tif", noise(64, 64, 3), rowsperstrip=64, compression="zlib")
    assert make(tmp_path / "src", tmp_path / "d", "--max_pixels", "4095") == 2
    assert "parts have 4,096 pixels each, at most 4,095 are" in (err := capsys.readouterr().err)
    assert "--max_pixels 4096 takes it" in err
    assert make(tmp_path / "src", tmp_path / "d", "--max_pixels", "4096") == 0
