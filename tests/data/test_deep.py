"""Images of more than 8 bits: what their pixels become, and what is reported about them."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xcit_dino.cli import main
from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.decode.rgb import BadImage, Scratch, decode, read_header
from xcit_dino.data.io.storage import open_source
from xcit_dino.data.shards.index import ShardIndex

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def png(values: np.ndarray) -> bytes:
    """A 16-bit PNG, in gray [H, W] or color [H, W, 3]."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def tiff(values: np.ndarray, bits: int = 16, white_is_zero: bool = False, kind: int = 1) -> bytes:
    """A TIFF [H, W]; ``kind`` is its SampleFormat: 1 unsigned, 2 signed, 3 floating point."""
    height, width = values.shape
    if bits == 12:
        flat = values.ravel().astype(int)
        pairs = zip(flat[::2], flat[1::2], strict=True)
        data = b"".join(bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in pairs)
    else:
        data = values.tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 0 if white_is_zero else 1,
            273: 8, 277: 1, 278: height, 279: len(data), 339: kind}  # fmt: skip
    tail = struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())
    )
    padding = b"\0" * (len(data) % 2)
    return (
        b"II*\0" + struct.pack("<I", 8 + len(data) + len(padding)) + data + padding + tail
        + bytes(4)
    )  # fmt: skip


def gray(raw: bytes) -> np.ndarray:
    return decode(raw, read_header(raw), Scratch())[..., 0]


FULL = (RAMP * 65535).astype("<u2")
TWELVE = (RAMP * 4095).astype("<u2")


@pytest.mark.parametrize("raw, expected", [
    (png(FULL), FULL >> 8),
    (tiff(FULL), FULL >> 8),
    (tiff(FULL, white_is_zero=True), 255 - (FULL >> 8)),
    (tiff(TWELVE, bits=12), TWELVE >> 4),
    (png(TWELVE), TWELVE >> 8),
    (png(np.stack((FULL, FULL, FULL), -1)), FULL >> 8),
], ids=["png", "tiff", "white is zero", "12 bits", "12 bits in 16", "color"])  # fmt: skip
def test_the_upper_eight_bits(raw: bytes, expected: np.ndarray):
    np.testing.assert_array_equal(gray(raw), expected)


@pytest.mark.parametrize("raw, words", [
    (tiff((RAMP * 70000).astype("<u4"), 32), "signed or of 32 bits"),
    (tiff((RAMP * 70000 - 9).astype("<i4"), 32, kind=2), "signed or of 32 bits"),
    (tiff((RAMP * 7000 - 9).astype("<i2"), 16, kind=2), "signed or of 32 bits"),
    (tiff(RAMP.astype("<f4"), 32, kind=3), "floating-point"),
], ids=["32 bits", "32 bits signed", "16 bits signed", "float"])  # fmt: skip
def test_pixels_without_a_known_range_are_refused(raw: bytes, words: str):
    with pytest.raises(BadImage, match=words):
        gray(raw)


def folder(tmp_path: Path, *images: bytes) -> Path:
    (tmp_path / "src").mkdir()
    for number, data in enumerate(images):
        (tmp_path / "src" / f"{number}.png").write_bytes(data)
    return tmp_path / "src"


def first_image(dst: Path) -> np.ndarray:
    index = ShardIndex.load(dst)
    raw = open_source(index, LoaderConfig()).read_many([index.locate(0)])[0]
    assert isinstance(raw, bytes)
    return gray(raw)


def test_empty_upper_bits_are_said_and_bits_rescales(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    src = folder(tmp_path, png(TWELVE), tiff(TWELVE // 2), png((RAMP * 255).astype("<u2")))
    command = ["shards", "make", str(src), "--num_workers", "1", "--shuffle", "false"]
    assert main([*command, str(tmp_path / "d"), "--pixels", "rgb8"]) == 0
    line = "3 images have 16 bits, but no value uses more than 12: 16 gray levels remain"
    assert line in capsys.readouterr().out
    assert main(["shards", "check", str(tmp_path / "d")]) == 0
    assert f"{line}; pack the originals with --bits 12" in capsys.readouterr().out
    assert len(np.unique(first_image(tmp_path / "d"))) == 16
    assert main([*command, str(tmp_path / "e"), "--bits", "12"]) == 0
    assert "3 images of 16 bits stored as 8-bit PNG" in capsys.readouterr().out
    np.testing.assert_array_equal(first_image(tmp_path / "e"), TWELVE >> 4)
    assert main([*command, str(tmp_path / "f"), "--bits", "11"]) == 0
    left = (tmp_path / "f" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in left] == [
        "values of 12 bits, more than --bits 11"
    ]


def test_bits_too_few_for_all_images_leave_the_folder_to_the_corrected_command(tmp_path: Path):
    src = folder(tmp_path, png(TWELVE))
    command = ["shards", "make", str(src), str(tmp_path / "d"), "--num_workers", "1", "--bits"]
    assert main([*command, "10"]) == 2
    assert not (tmp_path / "d").exists()
    assert main([*command, "12"]) == 0


def test_white_is_zero_of_twelve_bits(tmp_path: Path):
    src = folder(tmp_path, tiff(TWELVE, white_is_zero=True))
    assert main(["shards", "make", str(src), str(tmp_path / "d"), "--bits", "12"]) == 0
    np.testing.assert_array_equal(first_image(tmp_path / "d"), (4095 - TWELVE.astype(int)) >> 4)


def test_bits_without_an_image_of_16_bits_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 7).save(buffer, "PNG")
    src = folder(tmp_path, buffer.getvalue())
    assert main(["shards", "make", str(src), str(tmp_path / "d"), "--bits", "12"]) == 0
    assert "WARNING: --bits: no image has 16 bits" in capsys.readouterr().out


def test_full_sixteen_bits_are_said_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    src = folder(tmp_path, png(FULL))
    command = ["shards", "make", str(src), str(tmp_path / "d"), "--pixels", "rgb8"]
    assert main(command) == 0
    assert "1 images have 16 bits, of which the upper 8 are used" in capsys.readouterr().out
