"""data/decode/native.py: every kind of file against tifffile, NumPy and pydicom themselves."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pillow_heif
import pydicom
import pydicom.dataset
import pydicom.pixels
import pydicom.uid
import pytest
import tifffile
from PIL import Image
from pydicom.data import get_testdata_files

from xcit_dino.data.decode import coded_file, rgb
from xcit_dino.data.decode.native import (
    ANY,
    Wanted,
    decode_native,
    decode_values,
    open_native,
    read_native_header,
)
from xcit_dino.data.decode.rgb import BadImage
from xcit_dino.data.pixels import SHARES, PixelFormat, Statistics

RANDOM = np.random.default_rng(0)


def values_of(raw: bytes, wanted: Wanted = ANY) -> np.ndarray:
    return decode_values(open_native(raw, wanted))


def tiff(values: np.ndarray, **how: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **{"photometric": "minisblack", "metadata": None, **how})
    return file.getvalue()


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def some(dtype: str, *shape: int) -> np.ndarray:
    if np.dtype(dtype).kind == "f":
        return RANDOM.normal(0, 1000, shape).astype(dtype)
    limits = np.iinfo(dtype)
    return RANDOM.integers(limits.min, limits.max, shape, dtype, endpoint=True)


def form_of(channels: int, dtype: str, mean: float = 7.4, **more: Any) -> PixelFormat:
    rows = (mean,) * channels
    statistics = Statistics(rows, rows, ((0.0,) * len(SHARES),) * channels, (0.0,) * channels)
    return PixelFormat(channels, dtype, statistics=statistics, **more)


TIFFS = {
    "strips": {"rowsperstrip": 7},
    "tiles": {"tile": (16, 32)},
    "deflate": {"compression": "zlib"},
    "deflate with predictor": {"compression": "zlib", "predictor": True},
    "lzw": {"compression": "lzw"},
    "zstd in tiles": {"compression": "zstd", "tile": (32, 16)},
    "big-endian": {"byteorder": ">"},
    "big-endian, lzw with predictor": {
        "byteorder": ">", "compression": "lzw", "predictor": True,
    },
    "BigTIFF": {"bigtiff": True},
    "BigTIFF, big-endian": {"bigtiff": True, "byteorder": ">"},
}  # fmt: skip


@pytest.mark.parametrize("how", TIFFS.values(), ids=TIFFS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_every_way_to_store_a_tiff(how: dict[str, Any], dtype: str):
    gray = some(dtype, 37, 45)
    np.testing.assert_array_equal(values_of(tiff(gray, **how))[..., 0], gray)
    five = some(dtype, 37, 45, 5)
    raw = tiff(five, planarconfig="contig", **how)
    np.testing.assert_array_equal(values_of(raw), five)
    planar = tiff(np.moveaxis(five, -1, 0), planarconfig="separate", **how)
    header = open_native(planar)
    assert (header.height, header.width, header.kind) == (37, 45, f"5x{dtype}")
    np.testing.assert_array_equal(decode_values(header), five)
    np.testing.assert_array_equal(decode_values(header), np.moveaxis(
        tifffile.imread(io.BytesIO(planar)), 0, -1))  # fmt: skip


def test_twelve_bits_keep_all_their_levels():
    levels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    for raw in (tiff(levels), npy(levels), png16(levels)):
        found = decode_native(raw, open_native(raw), form_of(1, "uint16"))
        assert len(np.unique(found)) == 4096
        np.testing.assert_array_equal(found[..., 0], levels)


def png16(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def test_pages_are_channels_and_page_takes_one():
    stack = some("uint16", 5, 20, 30)
    raw = tiff(stack)
    np.testing.assert_array_equal(values_of(raw), np.moveaxis(stack, 0, -1))
    np.testing.assert_array_equal(values_of(raw, Wanted(page=3))[..., 0], stack[3])
    with pytest.raises(BadImage, match="has 5 pages, and none of number 5"):
        open_native(raw, Wanted(page=5))


def test_reduced_versions_and_other_pages_are_no_channels():
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        full = some("uint16", 64, 64)
        writer.write(full, subifds=0, photometric="minisblack")
        writer.write(full[::2, ::2], subfiletype=1, photometric="minisblack")
        writer.write(full[::4, ::4], subfiletype=1, photometric="minisblack")
    np.testing.assert_array_equal(values_of(file.getvalue())[..., 0], full)
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(full, photometric="minisblack")
        writer.write(full[:32], photometric="minisblack")
    np.testing.assert_array_equal(values_of(file.getvalue())[..., 0], full)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_white_is_zero_is_inverted(dtype: str):
    values = some(dtype, 9, 11)
    found = values_of(tiff(values, photometric="miniswhite"))[..., 0]
    np.testing.assert_array_equal(found, np.iinfo(dtype).max - values)
    with pytest.raises(BadImage, match="white-is-zero"):
        open_native(tiff(some("int16", 9, 11), photometric="miniswhite"))


@pytest.mark.parametrize("stored, kind", [
    ("int8", "int16"), ("float16", "float32"), ("float64", "float32"), ("bool", "uint8"),
])  # fmt: skip
def test_other_types_become_the_nearest(stored: str, kind: str):
    values = some("int8", 9, 11) > 0 if stored == "bool" else some(stored, 9, 11)
    for raw in (tiff(values) if stored != "bool" else npy(values), npy(values)):
        header = open_native(raw)
        assert header.dtype == kind
        np.testing.assert_array_equal(decode_values(header)[..., 0], values.astype(kind))


def test_integers_that_would_be_rounded_are_refused():
    exact = np.array([[0, 1 << 24], [5, 7]], np.uint32)
    np.testing.assert_array_equal(values_of(tiff(exact))[..., 0], exact)
    with pytest.raises(BadImage, match="16,777,216, which float32 cannot hold"):
        values_of(npy(exact + np.uint32(1)))


@pytest.mark.parametrize("shape, channels, expected", [
    ((20, 30), None, (20, 30, 1)),
    ((20, 30, 13), None, (20, 30, 13)),
    ((13, 20, 30), None, (20, 30, 13)),
    ((20, 30, 20), None, (20, 30, 20)),
    ((20, 30, 40), 40, (20, 30, 40)),
    ((20, 30, 40), 20, (30, 40, 20)),
    ((1, 20, 30), 1, (20, 30, 1)),
])  # fmt: skip
def test_axes_of_npy(shape: tuple, channels: int | None, expected: tuple):
    array = some("int16", *shape)
    for stored in (array, np.asfortranarray(array), array.astype(">i2")):
        found = values_of(npy(stored), Wanted(channels=channels))
        assert found.shape == expected and found.flags.c_contiguous
        same = array.reshape(expected) if expected[:2] == shape[:2] else array.transpose(1, 2, 0)
        np.testing.assert_array_equal(found, same)


@pytest.mark.parametrize("array, words", [
    (np.array([{}, 1], object).reshape(1, 2), "type object"),
    (np.zeros((2, 2), "c8"), "complex64"),
    (np.zeros(4), "1 axes"),
    (np.zeros((0, 4)), "empty image"),
    (np.zeros((2, 2, 2, 2)), "4 axes"),
])  # fmt: skip
def test_arrays_that_are_no_images(array: np.ndarray, words: str):
    with pytest.raises(BadImage, match=words):
        open_native(npy(array))
    with pytest.raises(BadImage, match=r"truncated|unpickled|decoded|empty"):
        values_of(npy(np.zeros((9, 9)))[:-1])


def test_invalid_pixels_become_the_channels_mean():
    values = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    values[0, 1, 2], values[1, 0, 0], values[1, 1, 1] = np.nan, np.inf, -9999
    raw = npy(values)
    form = form_of(3, "float32", nodata=-9999.0)
    found = decode_native(raw, read_native_header(raw, form), form)
    expected = values.copy()
    expected[0, 1, 2] = expected[1, 0, 0] = expected[1, 1, 1] = np.float32(7.4)
    np.testing.assert_array_equal(found, expected)

    whole = np.array([[0, 5], [9, 65535]], np.uint16)
    tag = (42113, "s", 0, "65535", True)
    raw = tiff(whole, extratags=[tag])
    found = decode_native(raw, open_native(raw), form_of(1, "uint16"))[..., 0]
    np.testing.assert_array_equal(found, [[0, 5], [9, 7]])  # the tag's, rounded
    found = decode_native(raw, open_native(raw), form_of(1, "uint16", nodata=0.0))[..., 0]
    np.testing.assert_array_equal(found, [[7, 5], [9, 65535]])  # the option's


def test_an_image_of_another_kind_than_the_set_is_refused():
    with pytest.raises(BadImage, match="^1xuint16, and the set consists of 13xuint16$"):
        read_native_header(tiff(some("uint16", 8, 8)), form_of(13, "uint16"))


def test_bombs_are_refused_before_they_are_decoded():
    array = np.lib.format.header_data_from_array_1_0(np.zeros((1, 1)))
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {**array, "shape": (1 << 20, 1 << 20)})
    with pytest.raises(BadImage, match="truncated"):
        open_native(file.getvalue())
    raw = npy(np.zeros((100, 100), np.uint8))
    with pytest.raises(BadImage, match="bomb: 100x100 pixels of 1 channels, at most 9999"):
        open_native(raw, Wanted(max_pixels=9999))
    deep = tiff(np.zeros((100, 100, 64), np.float32), planarconfig="contig")
    with pytest.raises(BadImage, match="times as many bytes"):
        open_native(deep, Wanted(max_pixels=20_000))
    assert read_native_header(raw, form_of(1, "uint8", max_pixels=10_000)).kind == "1xuint8"


@pytest.mark.parametrize("mode, kind", [("L", "1xuint8"), ("RGB", "3xuint8"), ("P", "3xuint8")])
def test_eight_bits_keep_their_channels(mode: str, kind: str, tmp_path: Path):
    image = Image.fromarray(some("uint8", 9, 11)).convert(mode)
    file = io.BytesIO()
    image.save(file, "PNG")
    header = open_native(file.getvalue())
    assert header.kind == kind
    expected = np.asarray(image if mode == "L" else image.convert("RGB")).reshape(9, 11, -1)
    np.testing.assert_array_equal(decode_values(header), expected)


def test_color_of_sixteen_bits_in_png():
    values = some("uint16", 9, 11, 3)
    np.testing.assert_array_equal(values_of(bytes(imagecodecs.png_encode(values))), values)


# ---------------------------------------------------------------------------- DICOM

DICOM_FILES = sorted(p for p in map(Path, get_testdata_files()) if p.is_file())


def by_pydicom(path: Path) -> np.ndarray | None:
    """[H, W, C] of the modality's values; None where pydicom itself fails."""
    try:
        data = pydicom.dcmread(path)
        values = pydicom.pixels.pixel_array(data)
        if data.PhotometricInterpretation == "PALETTE COLOR":
            values = pydicom.pixels.apply_color_lut(values, data)
        elif data.PhotometricInterpretation == "MONOCHROME1":
            values = (1 << data.BitsStored) - 1 - values.astype(np.float64)
            values = values * float(data.RescaleSlope) + float(data.RescaleIntercept)
        else:
            values = pydicom.pixels.apply_modality_lut(values, data)
    except Exception:
        return None
    frames = values if int(data.get("NumberOfFrames") or 1) > 1 else values[None]
    return np.concatenate([x if x.ndim == 3 else x[..., None] for x in frames], -1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pydicoms_own_files_are_decoded_as_pydicom_does_or_refused():
    decoded, refused, beyond = 0, [], []
    for path in DICOM_FILES:
        expected = by_pydicom(path)
        try:
            header = open_native(path.read_bytes())
            found = decode_values(header)
        except BadImage as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            refused += [path.name] if expected is not None else []
            continue
        assert found.dtype == header.dtype and found.shape[2] == header.channels
        if expected is None:
            beyond.append(path.name)
            continue
        decoded += 1
        np.testing.assert_array_equal(found, expected.astype(found.dtype), str(path))
        assert found.dtype == np.float32 or np.array_equal(found, expected), path
    assert decoded >= 75
    assert set(refused) == {"image_dfl.dcm", "SC_rgb_rle_32bit.dcm", "SC_rgb_rle_32bit_2frame.dcm"}
    assert set(beyond) == {  # JPEG-LS, lossless and 12-bit JPEG, without further packages
        "JPEG-lossy.dcm", "JPGExtended.dcm", "JPEGLSNearLossless_08.dcm",
        "JPEGLSNearLossless_16.dcm", "MR_small_jpeg_ls_lossless.dcm", "SC_rgb_jls_lossy_line.dcm",
        "SC_rgb_jls_lossy_sample.dcm", "SC_rgb_jpeg_gdcm.dcm",
    }  # fmt: skip


def bundled(name: str) -> bytes:
    return next(path for path in DICOM_FILES if path.name == name).read_bytes()


def test_dicom_frames_that_pydicom_leaves_to_others():
    lossless = values_of(bundled("MR_small_jpeg_ls_lossless.dcm"))
    np.testing.assert_array_equal(lossless, values_of(bundled("MR_small.dcm")))
    color = values_of(bundled("SC_rgb_jpeg_gdcm.dcm"))
    np.testing.assert_array_equal(color, values_of(bundled("SC_rgb_rle.dcm")))


def dicom(values: np.ndarray, bits: int, **tags: Any) -> bytes:
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = pydicom.uid.UID("1.2.840.10008.5.1.4.1.1.1")
    data.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.UID("1.2.3")
    data.Rows, data.Columns = values.shape[-2:]
    data.NumberOfFrames = values.shape[0] if values.ndim == 3 else 1
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored = values.dtype.itemsize * 8, bits
    data.HighBit, data.PixelRepresentation = bits - 1, int(values.dtype.kind == "i")
    data.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    file = io.BytesIO()
    pydicom.dcmwrite(file, data, enforce_file_format=True)
    return file.getvalue()


def test_dicom_kinds_inversion_and_frames():
    x = RANDOM.integers(0, 4096, (3, 8, 9)).astype(np.uint16)
    hounsfield = open_native(dicom(x[0], 12, RescaleSlope=1, RescaleIntercept=-1024))
    assert hounsfield.kind == "1xint16"
    np.testing.assert_array_equal(decode_values(hounsfield)[..., 0], x[0].astype(int) - 1024)
    inverted = values_of(dicom(x[0], 12, PhotometricInterpretation="MONOCHROME1"))[..., 0]
    np.testing.assert_array_equal(inverted, 4095 - x[0])
    np.testing.assert_array_equal(values_of(dicom(x, 12)), np.moveaxis(x, 0, -1))
    np.testing.assert_array_equal(values_of(dicom(x, 12), Wanted(page=2))[..., 0], x[2])
    suv = open_native(dicom(x[0], 12, RescaleSlope=0.5, RescaleIntercept=2))
    assert suv.kind == "1xfloat32"
    np.testing.assert_array_equal(decode_values(suv)[..., 0], x[0] * 0.5 + 2)
    with pytest.raises(BadImage, match="rescaled values from -1024 to 6.*: not int16"):
        values_of(dicom(np.full((4, 4), 65535, "u2") * np.eye(4, dtype="u2"), 16,
                        RescaleSlope=1, RescaleIntercept=-1024))  # fmt: skip


def test_dicom_in_a_set_of_eight_bits_is_scaled_by_its_window():
    x = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)
    raw = dicom(x, 12, WindowCenter=2048, WindowWidth=1024)
    gray = rgb.decode(raw, rgb.read_header(raw), rgb.Scratch())[..., 0]
    expected = np.clip((x.astype(float) - 1536) / 1024 * 255, 0, 255)
    assert np.abs(gray - expected).max() <= 1
    with pytest.raises(BadImage, match="without a window"):
        rgb.read_header(dicom(x, 12))


# ---------------------------------------------------------------------------- other codecs


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 3), (20, 30, 4)])
@pytest.mark.parametrize("dtype, most", [("uint8", 255), ("uint16", 1023)])
@pytest.mark.parametrize("name", ["jpeg2k", "jpegxl", "avif"])
def test_other_codecs(name: str, dtype: str, most: int, shape: tuple):
    values = RANDOM.integers(0, most, shape).astype(dtype)
    how = {
        "jpeg2k": {"level": 0, "reversible": True},
        "jpegxl": {"lossless": True},
        "avif": {"level": 100} | ({"bitspersample": 10} if dtype == "uint16" else {}),
    }[name]
    raw = bytes(getattr(imagecodecs, f"{name}_encode")(values, **how))
    header = open_native(raw)
    kept = values.reshape(20, 30, -1)[..., :3]
    assert header.kind == f"{kept.shape[2]}x{dtype}"
    np.testing.assert_array_equal(decode_values(header), kept)
    with pytest.raises(BadImage, match="bomb: 30x20 pixels"):
        open_native(raw, Wanted(max_pixels=599))
    if dtype == "uint8":
        found = rgb.decode(raw, rgb.read_header(raw), rgb.Scratch())
        np.testing.assert_array_equal(found, np.broadcast_to(kept, (20, 30, 3)))


def test_heic():
    values = np.add.outer(np.arange(20, dtype=np.uint8), np.arange(30, dtype=np.uint8) * 6)
    image = Image.fromarray(np.stack([values] * 3, -1))
    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, quality=-1, chroma=444)
    raw = file.getvalue()
    found = decode_values(open_native(raw))
    assert np.abs(found.astype(int) - np.asarray(image)).max() <= 2
    pixels = rgb.decode(raw, rgb.read_header(raw), rgb.Scratch())
    np.testing.assert_array_equal(pixels, found)
    assert coded_file.ispe_size(raw)[0] >= 20


@pytest.mark.parametrize("module, extra, what", [
    ("tifffile", "tiff", tiff(some("uint16", 4, 4))),
    ("imagecodecs", "tiff", bytes(imagecodecs.jpegxl_encode(some("uint8", 9, 9)))),
    ("pydicom", "dicom", dicom(some("uint16", 4, 4), 16)),
])  # fmt: skip
def test_a_missing_library_is_named_with_its_extra(
    module: str, extra: str, what: bytes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BadImage, match=rf"{module}: pip install 'xcit-dino\[{extra}\]'"):
        values_of(what)


def test_eight_bits_of_a_tiff_that_pillow_cannot_decompress():
    values = some("uint8", 40, 50, 3)
    raw = tiff(values, compression="zstd", photometric="rgb")
    raw2 = tiff(values, compression="jpegxl", photometric="rgb")
    for data in (raw, raw2):
        found = rgb.decode(data, rgb.read_header(data), rgb.Scratch())
        np.testing.assert_array_equal(found, values)


@pytest.mark.slow
@pytest.mark.parametrize("cases", [1000, pytest.param(50_000, marks=pytest.mark.faults)])
def test_mutated_images_of_every_kind_are_decoded_or_refused(cases: int):
    """In 512 MiB and without a crash of the interpreter: see fuzz_native.py."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "tests/data/fuzz_native.py", "0", str(cases)]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, (run.returncode, run.stderr[-2000:])
    counts = ast.literal_eval(run.stdout)
    assert counts["decoded"] + counts["refused"] == cases
    assert cases // 3 < counts["refused"] < cases * 3 // 4
