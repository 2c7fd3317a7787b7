"""Sets that are not 8-bit RGB: their kind, what packing measures of them, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from xcit_dino.cli import main
from xcit_dino.data.decode.native import (
    Wanted,
    decode_native,
    decode_values,
    open_native,
    read_native_header,
)
from xcit_dino.data.pack import shard_job
from xcit_dino.data.pixels import SHARES, PixelFormat, default_window
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.data.shards.measure import merged, meter

RANDOM = np.random.default_rng(1)
Refused = Callable[..., str]


def write(folder: Path, **images: np.ndarray | bytes) -> Path:
    """A folder of TIFFs and files; ``a__b`` is a/b, and ``_tif`` stands for .tif."""
    for name, image in images.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(image, bytes):
            path.write_bytes(image)
        else:
            tifffile.imwrite(path, image, metadata=None, photometric="minisblack",
                             planarconfig="contig" if image.ndim == 3 else None)  # fmt: skip
    return folder


def png(*shape: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(RANDOM.integers(0, 255, shape, np.uint8)).save(file, "PNG")
    return file.getvalue()


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def make(src: Path, dst: Path, *options: str) -> int:
    return main(["shards", "make", str(src), str(dst), "--num_workers", "1", *options])


def stored(dst: Path) -> list[bytes]:
    index, found = ShardIndex.load(dst), []
    for n in range(index.num_samples):
        shard, offset, size = index.locate(n)
        found.append(Path(index.path(shard)).read_bytes()[offset : offset + size])
    return found


def bands(count: int, *shape: int, most: int = 4096) -> dict[str, np.ndarray]:
    return {
        f"c{n % 2}__{n}_tif": RANDOM.integers(0, most, shape).astype(np.uint16)
        for n in range(count)
    }


# ---------------------------------------------------------------------------- the kind


def test_a_set_of_thirteen_bands_is_found_and_stored_byte_for_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    images = bands(6, 9, 11, 13)
    src = write(tmp_path / "src", **images)
    assert make(src, tmp_path / "d", "--shuffle", "false") == 0
    out = capsys.readouterr().out
    assert "pixels: 13xuint16, values from 0 to 4,0" in out and "(12 of 16 bits in use)" in out
    form = ShardIndex.load(tmp_path / "d").pixels
    assert (form.name, form.max_pixels, form.nodata) == ("13xuint16", None, None)
    assert default_window(form).high == (4095.0,)
    paths = sorted(src.rglob("*.tif"))
    assert stored(tmp_path / "d") == [path.read_bytes() for path in paths]
    whole = np.concatenate([tifffile.imread(path).reshape(-1, 13) for path in paths])
    exact(form, whole)
    with tarfile.open(next((tmp_path / "d").glob("*.tar"))) as tar:
        assert "000000000.tif" in tar.getnames()
    assert main(["shards", "check", str(tmp_path / "d"), "--num_workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "13xuint16, measured on 6 images" in out and "problems" in out


def exact(form: PixelFormat, values: np.ndarray, invalid: np.ndarray | None = None) -> None:
    """The statistics are NumPy's over all pixels [N, C]."""
    found = form.statistics
    assert found is not None
    for c in range(values.shape[1]):
        column = values[:, c] if invalid is None else values[~invalid[:, c], c]
        np.testing.assert_allclose(found.mean[c], column.mean(dtype=np.float64), rtol=1e-9)
        np.testing.assert_allclose(found.std[c], column.std(dtype=np.float64), rtol=1e-9)
        expected = np.percentile(column, SHARES, method="inverted_cdf")
        np.testing.assert_array_equal(found.quantiles[c], expected)
        share = 0 if invalid is None else invalid[:, c].mean()
        np.testing.assert_allclose(found.invalid[c], share)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_statistics_of_integers_are_exact_and_leave_out_no_data(tmp_path: Path, dtype: str):
    limits = np.iinfo(dtype)
    images = {
        f"{n}_npy": npy(RANDOM.integers(limits.min, limits.max, (7, 8, 2), dtype, endpoint=True)
                        // (1 if n else 3)) for n in range(5)
    }  # fmt: skip
    src = write(tmp_path / "src", **images)
    lowest = str(limits.min // 3)
    options = ("--pixels", f"2x{dtype}", "--nodata", lowest, "--shuffle", "false")
    assert make(src, tmp_path / "d", *options) == 0
    whole = np.concatenate([np.load(p).reshape(-1, 2) for p in sorted(src.glob("*.npy"))])
    exact(ShardIndex.load(tmp_path / "d").pixels, whole, whole == int(lowest))


def test_statistics_of_floats_without_their_invalid_pixels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    images = [RANDOM.normal(5, 2, (20, 30, 3)).astype(np.float32) for _ in range(8)]
    for n, image in enumerate(images):
        image[RANDOM.random(image.shape) < 0.05 * n] = (np.nan, np.inf, -9999)[n % 3]
    src = write(tmp_path / "src", **{f"{n}_tif": image for n, image in enumerate(images)})
    assert make(src, tmp_path / "d", "--nodata", "-9999") == 0
    form = ShardIndex.load(tmp_path / "d").pixels
    whole = np.concatenate([image.reshape(-1, 3) for image in images])
    invalid = ~np.isfinite(whole) | (whole == -9999)
    found = form.statistics
    assert found is not None and form.nodata == -9999
    for c in range(3):
        column = whole[~invalid[:, c], c].astype(np.float64)
        np.testing.assert_allclose(found.mean[c], column.mean(), rtol=1e-12)
        np.testing.assert_allclose(found.std[c], column.std(), rtol=1e-12)
        assert (found.minimum[c], found.maximum[c]) == (column.min(), column.max())
        assert abs(found.percentile(50)[c] - np.median(column)) < 0.15
        np.testing.assert_allclose(found.invalid[c], invalid[:, c].mean())
    assert f"{invalid.mean():.3%} of the values are invalid" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_measuring_depends_neither_on_processes_nor_on_interruptions(tmp_path: Path, dtype: str):
    images = {f"{n}_tif": (RANDOM.random((9, 10, 2)) * 1000).astype(dtype) for n in range(12)}
    src = write(tmp_path / "src", **images)
    options = ("--shard_size", "3")
    command = ["shards", "make", str(src), *options]
    assert main([*command, str(tmp_path / "a"), "--num_workers", "1"]) == 0
    assert main([*command, str(tmp_path / "b"), "--num_workers", "2"]) == 0
    real, calls = shard_job.write_shard, []

    def interrupted(*args: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_job, "write_shard", interrupted)
        assert main([*command, str(tmp_path / "c"), "--num_workers", "1"]) == 130
    assert main([*command, str(tmp_path / "c"), "--num_workers", "1"]) == 0
    first, *others = (ShardIndex.load(tmp_path / name) for name in "abc")
    assert all(other.checksum == first.checksum for other in others)


def test_a_mixed_set_is_refused_with_the_options_that_pick(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    images: dict[str, np.ndarray | bytes] = {f"{n}_png": png(8, 8) for n in range(3)}
    images |= {"deep_tif": RANDOM.integers(0, 999, (8, 8)).astype(np.uint16),
               "float_tif": RANDOM.random((8, 8)).astype(np.float32)}  # fmt: skip
    src = write(tmp_path / "src", **images)
    assert make(src, tmp_path / "d") == 2
    error = capsys.readouterr().err
    for part in ("3 rgb8 (0.png)", "1 1xuint16 (deep.tif)", "1 1xfloat32 (float.tif)",
                 "--pixels 1x", "--pixels rgb8"):  # fmt: skip
        assert part in error, error
    assert not (tmp_path / "d").exists()
    assert make(src, tmp_path / "d", "--pixels", "1xuint16") == 0
    index = ShardIndex.load(tmp_path / "d")
    assert (index.num_samples, index.pixels.name) == (1, "1xuint16")
    lines = (tmp_path / "d" / "quarantine.jsonl").read_text().splitlines()
    left = [json.loads(line) for line in lines]
    assert len(left) == 4
    assert all(" and the set consists of 1xuint16" in item["reason"] for item in left)
    assert make(src, tmp_path / "e", "--pixels", "rgb8") == 0
    index = ShardIndex.load(tmp_path / "e")
    assert (index.num_samples, index.pixels.is_rgb8) == (4, True)  # the upper 8 of 16 bits


def test_float32_takes_every_type_without_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As scans of one study whose files differ in their intercept."""
    images: dict[str, np.ndarray | bytes] = {
        "a_tif": RANDOM.integers(0, 65536, (8, 8)).astype(np.uint16),
        "b_tif": RANDOM.integers(-32768, 32768, (8, 8)).astype(np.int16),
        "c_tif": RANDOM.normal(size=(8, 8)).astype(np.float32),
    }
    src = write(tmp_path / "src", **images)
    assert make(src, tmp_path / "d") == 2
    assert "--pixels 1xfloat32 all of them without loss" in capsys.readouterr().err
    assert make(src, tmp_path / "d", "--pixels", "1xfloat32", "--shuffle", "false") == 0
    index, raws = ShardIndex.load(tmp_path / "d"), stored(tmp_path / "d")
    for raw, values in zip(raws, images.values(), strict=True):
        assert isinstance(values, np.ndarray)
        found = decode_native(raw, read_native_header(raw, index.pixels), index.pixels)
        assert found.dtype == np.float32 and np.array_equal(found[..., 0], values)
    statistics = index.pixels.statistics
    assert statistics is not None
    assert statistics.minimum[0] == min(float(np.min(values)) for values in images.values())


def test_sets_of_eight_bits_stay_as_they_were(tmp_path: Path):
    rgba = io.BytesIO()
    Image.fromarray(RANDOM.integers(0, 255, (8, 8, 4), np.uint8)).save(rgba, "PNG")
    src = write(tmp_path / "src", a_png=png(8, 8), b_png=png(8, 8, 3), c_png=rgba.getvalue(),
                d_tif=RANDOM.integers(0, 255, (8, 8), np.uint8))  # fmt: skip
    assert make(src, tmp_path / "d") == 0
    meta = json.loads((tmp_path / "d" / "index.json").read_bytes())
    assert "pixels" not in meta and meta["samples"] == 4
    shards = shard_job.Encoding(None, 90, True)
    assert "pixels" in repr(shards)  # which the fingerprint leaves out


def test_gray_images_keep_one_channel_where_that_is_wanted(tmp_path: Path):
    src = write(tmp_path / "src", a_png=png(8, 8), b_png=png(8, 8))
    assert make(src, tmp_path / "d", "--pixels", "1xuint8") == 0
    form = ShardIndex.load(tmp_path / "d").pixels
    assert (form.name, form.is_rgb8) == ("1xuint8", False)


def test_four_bands_of_eight_bits_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    image = RANDOM.integers(0, 255, (8, 8, 4), np.uint8)
    (tmp_path / "src").mkdir()
    tifffile.imwrite(tmp_path / "src" / "a.tif", image, photometric="rgb", metadata=None,
                     extrasamples=["unspecified"])  # fmt: skip
    assert make(tmp_path / "src", tmp_path / "d") == 0
    assert "--pixels 4xuint8 keeps all" in capsys.readouterr().out
    assert make(tmp_path / "src", tmp_path / "e", "--pixels", "4xuint8") == 0
    found = decode_values(open_native(stored(tmp_path / "e")[0]))
    np.testing.assert_array_equal(found, image)


def test_page_takes_one_of_each_stack(tmp_path: Path):
    src = write(tmp_path / "src", a_tif=np.zeros((4, 4), np.uint8))
    stack = RANDOM.integers(0, 255, (5, 9, 10), np.uint8)
    tifffile.imwrite(src / "a.tif", stack, photometric="minisblack", metadata=None)
    assert make(src, tmp_path / "d") == 0
    assert ShardIndex.load(tmp_path / "d").pixels.name == "5xuint8"
    assert make(src, tmp_path / "e", "--page", "3") == 0
    form = ShardIndex.load(tmp_path / "e").pixels
    assert (form.name, form.page) == ("1xuint8", 3)
    raw = stored(tmp_path / "e")[0]
    found = decode_native(raw, read_native_header(raw, form), form)
    np.testing.assert_array_equal(found[..., 0], stack[3])


# ---------------------------------------------------------------------------- size


def test_resize_keeps_the_type_and_its_levels(tmp_path: Path):
    ramp = np.add.outer(np.arange(60), np.arange(40) * 60).astype(np.uint16)
    src = write(tmp_path / "src", a_tif=np.stack([ramp, ramp * 2], -1))
    assert make(src, tmp_path / "d", "--resize", "20") == 0
    small = np.load(io.BytesIO(stored(tmp_path / "d")[0]), allow_pickle=False)
    assert (small.shape, small.dtype) == ((30, 20, 2), np.dtype("uint16"))
    plane = Image.fromarray(ramp.astype(np.float32)).resize((20, 30), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(small[..., 0], np.rint(np.asarray(plane)).clip(0))
    exact(ShardIndex.load(tmp_path / "d").pixels, small.reshape(-1, 2))


def test_resize_does_not_spread_invalid_pixels(tmp_path: Path):
    image = np.full((40, 40), 7, np.float32)
    image[:, :20] = np.nan
    src = write(tmp_path / "src", a_tif=image)
    assert make(src, tmp_path / "d", "--resize", "10") == 0
    small = np.load(io.BytesIO(stored(tmp_path / "d")[0]))[..., 0]
    assert np.isnan(small[:, :5]).all() and (small[:, 5:] == 7).all()
    found = ShardIndex.load(tmp_path / "d").pixels.statistics
    assert found is not None and found.invalid == (0.5,)


@pytest.mark.parametrize("deep", [False, True])
def test_max_pixels_lets_one_take_what_is_refused(
    tmp_path: Path, deep: bool, monkeypatch: pytest.MonkeyPatch
):
    from xcit_dino.data.decode import native, rgb
    from xcit_dino.data.shards import kinds, verify

    for module in (native, rgb, kinds, verify, shard_job):
        monkeypatch.setattr(module, "MAX_PIXELS", 500)
    monkeypatch.setattr(rgb, "_allowed", [500])
    image = RANDOM.integers(0, 999, (30, 40)).astype(np.uint16)
    src = write(tmp_path / "src", **({"a_tif": image} if deep else {"a_png": png(30, 40)}))
    pixels = ("--pixels", "1xuint16" if deep else "rgb8")
    assert make(src, tmp_path / "d", *pixels, "--max_pixels", "1199") == 2
    assert make(src, tmp_path / "d", *pixels, "--max_pixels", "1200") == 0
    if not deep:
        rgb._allowed[0] = 500  # of another process, which then opens the index
        with pytest.raises(rgb.BadImage, match="--max_pixels 1200 takes it"):
            rgb.read_header(png(30, 40))
    assert ShardIndex.load(tmp_path / "d").pixels.max_pixels == 1200
    if not deep:
        assert rgb.read_header(png(30, 40)).height == 30
    assert main(["shards", "check", str(tmp_path / "d"), "--num_workers", "1"]) == 0
    rescue = ("--max_pixels", "1200", "--resize", "10")
    assert make(src, tmp_path / "e", *pixels, *rescue) == 0
    assert ShardIndex.load(tmp_path / "e").pixels.max_pixels is None


# ---------------------------------------------------------------------------- names, foreign tars


def test_images_are_recognized_by_their_first_bytes(tmp_path: Path):
    import imagecodecs

    gray = RANDOM.integers(0, 255, (9, 9), np.uint8)
    files = {
        "a": png(9, 9), "b.jfif": bytes(imagecodecs.jpeg_encode(gray)),
        "c.jxl": bytes(imagecodecs.jpegxl_encode(gray)), 
        "d": bytes(imagecodecs.jpeg2k_encode(gray)),
        "e.avif": bytes(imagecodecs.avif_encode(gray)), "f.x": npy(gray), "g": b"no image at all",
    }  # fmt: skip
    (tmp_path / "src").mkdir()
    for name, data in files.items():
        (tmp_path / "src" / name).write_bytes(data)
    assert make(tmp_path / "src", tmp_path / "d") == 0
    assert ShardIndex.load(tmp_path / "d").num_samples == 6
    with tarfile.open(next((tmp_path / "d").glob("*.tar"))) as tar:
        kinds = {name.rpartition(".")[2] for name in tar.getnames()}
    assert kinds == {"json", "png", "jpg", "jxl", "jp2", "avif", "npy"}


def test_npy_beside_images_is_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    src = write(tmp_path / "src", a_png=png(8, 8), a_npy=npy(np.zeros((4, 4))))
    assert make(src, tmp_path / "d") == 0
    assert ".npy files (there are images beside them)" in capsys.readouterr().out
    assert ShardIndex.load(tmp_path / "d").pixels.is_rgb8


def tar_of(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_foreign_tars_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    images = [RANDOM.integers(0, 4000, (6, 7, 4)).astype(np.uint16) for _ in range(5)]
    members: dict[str, bytes] = {}
    for n, image in enumerate(images):
        members |= {f"{n}.cls": b"1", f"{n}.npy": npy(image)}
    tar_of(tmp_path / "t" / "0.tar", members)
    check = ["shards", "check", str(tmp_path / "t"), "--num_workers", "1"]
    assert main(check) == 0
    assert "4xuint16, measured on 5 images" in capsys.readouterr().out
    form = ShardIndex.load(tmp_path / "t").pixels
    exact(form, np.concatenate([image.reshape(-1, 4) for image in images]))
    before = (tmp_path / "t" / "index.json").read_bytes()
    assert main([*check, "--rebuild"]) == 0
    assert (tmp_path / "t" / "index.json").read_bytes() == before
    assert main([*check, "--nodata", "0"]) == 2
    assert main([*check, "--nodata", "0", "--rebuild"]) == 0
    assert ShardIndex.load(tmp_path / "t").pixels.nodata == 0


def test_foreign_tars_of_several_kinds_are_refused_and_keep_their_index(tmp_path: Path):
    members = {"a.png": png(8, 8), "b.npy": npy(np.zeros((4, 4), np.int16)), "b.cls": b"0"}
    tar_of(tmp_path / "t" / "0.tar", members)
    check = ["shards", "check", str(tmp_path / "t"), "--num_workers", "1"]
    assert main(check) == 2
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["0.tar"]
    assert main([*check, "--pixels", "rgb8"]) == 1  # the array is no 8-bit image
    before = (tmp_path / "t" / "index.json").read_bytes()
    assert main([*check, "--rebuild"]) == 2
    assert (tmp_path / "t" / "index.json").read_bytes() == before


def test_members_without_an_extension_are_images_by_their_content(tmp_path: Path):
    tar_of(tmp_path / "t" / "0.tar", {"x/first": png(8, 8), "second": b"text", "x/third": png(9, 9),
                                      "k.jpg_large": png(8, 8), "k.cls": b"3"})  # fmt: skip
    check = ["shards", "check", str(tmp_path / "t"), "--num_workers", "1"]
    assert main(check) in (0, 1)
    assert ShardIndex.load(tmp_path / "t").labels.tolist() == [-1, -1, 3]


def test_both_splits_are_of_one_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    src = write(tmp_path / "a", **bands(2, 8, 8))
    assert make(src, tmp_path / "d", "--split", "train") == 0
    other = write(tmp_path / "b", a_png=png(8, 8))
    assert make(other, tmp_path / "d", "--split", "val") == 2
    assert "these images are rgb8, those of" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "d" / "train")
    assert make(other, tmp_path / "d", "--split", "val") == 0


def test_a_meter_merges_to_the_same_whatever_the_order_of_images():
    form = PixelFormat(2, "int16")
    images = [RANDOM.integers(-900, 900, (5, 6, 2)).astype(np.int16) for _ in range(4)]
    alone = meter(form, 4)
    for n, image in enumerate(images):
        alone.add(n, image, None)
    halves = [meter(form, 4), meter(form, 4)]
    for n, image in enumerate(images):
        halves[n // 2].add(n, image, None)
    assert merged(form, 4, [half.shares() for half in halves]) == alone.statistics()
    nothing = merged(form, 4, [])
    assert nothing.images == 0 and nothing.mean == (0.0, 0.0)
    assert Wanted().page is None
