"""Decoding and cropping against Pillow and torchvision, and every kind of file people have."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms

from xcit_dino.data.config import CropsConfig
from xcit_dino.data.crops import Cutter, center_view, crop_boxes, cut_crops, reduction, resize_into
from xcit_dino.data.decode.rgb import MAX_PIXELS, BadImage, Scratch, decode, read_header


def photo(width: int = 120, height: int = 90, seed: int = 0) -> Image.Image:
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[0:height, 0:width] / 60
    waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(-2, 2, (3, 3))]
    image = 127 + 100 * np.stack(waves, -1) + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(raw: bytes) -> np.ndarray:
    return decode(raw, read_header(raw), Scratch()).copy()


def official(raw: bytes) -> np.ndarray:
    """torchvision's ImageFolder loader."""
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))


# ------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_pixels_are_pillows(subsampling: int, progressive: bool):
    raw = encoded(photo(), quality=90, subsampling=subsampling, progressive=progressive)
    assert read_header(raw).pillow is None
    assert abs(decoded(raw).astype(int) - official(raw)).max() <= 1


@pytest.mark.parametrize(
    "kind,mode",
    [("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1"),
     ("PNG", "LA"), ("WEBP", "RGB"), ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB"), ("PPM", "L")],
)  # fmt: skip
def test_other_files_are_pillows_convert_rgb(kind: str, mode: str):
    raw = encoded(photo().convert(mode), kind)
    header = read_header(raw)
    pixels = decoded(raw)
    assert pixels.shape == (header.height, header.width, 3) and pixels.dtype == np.uint8
    assert abs(pixels.astype(int) - official(raw)).max() <= 1


def test_sixteen_bits_keep_their_upper_eight():
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    pixels = decoded(encoded(Image.fromarray(values), "PNG"))
    assert np.array_equal(pixels, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, 2))


def test_animations_give_their_first_frame():
    frames = [photo(seed=seed).quantize() for seed in range(3)]
    for kind in ("GIF", "WEBP"):
        raw = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.array_equal(decoded(raw), official(raw))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_honored(orientation: int, kind: str):
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(photo(), kind, exif=exif)
    header = read_header(raw)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(raw))).convert("RGB"))
    assert (header.height, header.width) == expected.shape[:2]
    assert abs(decoded(raw).astype(int) - expected).max() <= 1


def png_bomb(side: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64)))


def jpeg_bomb() -> bytes:
    raw = bytearray(encoded(photo()))
    frame = raw.index(b"\xff\xc0")
    raw[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    return bytes(raw)


@pytest.mark.parametrize(
    "raw,reason",
    [
        (b"", "empty file"),
        (b"\0" * 1000, "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be decoded"),
        (png_bomb(60_000), "bomb"),
        (png_bomb(10_000), "bomb"),
        (jpeg_bomb(), "bomb"),
        (png_bomb(50), "cannot be decoded"),
        (encoded(photo())[:700], "cannot be decoded"),
        (encoded(photo(), "PNG")[:700], "cannot be decoded"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "floating-point"),
    ],
    ids=["empty", "zeros", "postscript", "png bomb", "png bomb small", "jpeg bomb", "png no data",
         "jpeg cut", "png cut", "float"],
)  # fmt: skip
def test_bad_files_are_refused_in_words(raw: bytes, reason: str):
    with pytest.raises(BadImage, match=reason):
        decoded(raw)


def test_size_limit_is_pillows():
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS


def test_garbage_after_the_image_does_no_harm():
    raw = encoded(photo())
    assert np.array_equal(decoded(raw + b"garbage" * 9), decoded(raw))


@pytest.mark.parametrize("cases", [600, pytest.param(50_000, marks=pytest.mark.faults)])
def test_mutated_images_of_every_format_are_decoded_or_refused(cases):
    image = photo(60, 50)
    kinds = [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {}),
             ("TIFF", {"compression": "tiff_lzw"}), ("BMP", {}), ("PPM", {})]  # fmt: skip
    files = [np.frombuffer(encoded(image, kind, **o), np.uint8) for kind, o in kinds]
    refused = 0
    for case in range(cases):
        rng = np.random.RandomState(case)
        raw = files[case % len(files)].copy()
        reach = 200 if rng.randint(2) else len(raw)  # headers are where the decisions are
        raw[rng.randint(min(reach, len(raw)), size=rng.randint(1, 8))] = rng.randint(256)
        raw = raw[: rng.randint(1, len(raw)) if rng.randint(4) == 0 else None]
        try:
            header = read_header(raw.tobytes())
            if header.height * header.width > 10**6:
                continue  # allowed, but not worth the test's time
            pixels = decode(raw.tobytes(), header, Scratch())
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, case
        except BadImage as reason:
            assert str(reason), case
            refused += 1
    assert refused > cases // 12


# -------------------------------------------------------------------------------------- geometry


def boxes_of(width: int, height: int, n: int, **change) -> np.ndarray:
    config = CropsConfig(**change)
    sizes = np.full(n, height), np.full(n, width)
    return crop_boxes(config, *sizes, seed=0, epoch=0, samples=np.arange(n))


@pytest.mark.parametrize("width,height", [(500, 375), (60, 200), (33, 32), (300, 20)])
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_boxes_follow_torchvisions_distribution(width: int, height: int, scale):
    """Area, ratio and position against RandomResizedCrop.get_params, fallback included."""
    n = 3000
    change = {"global_crops_number": 1, "local_crops_number": 0, "global_crops_scale": scale}
    ours = boxes_of(width, height, n, **change)[:, 0]
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    params = transforms.RandomResizedCrop.get_params
    theirs = np.array([params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(n)])
    for boxes in (ours, theirs):
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= (height, width)).all()
    for quantile in (0.02, 0.25, 0.5, 0.75, 0.98):
        a, b = (np.quantile(boxes, quantile, axis=0) for boxes in (ours, theirs))
        np.testing.assert_allclose(a, b, atol=0.03 * max(width, height) + 1)
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=0.015 * max(width, height))
    covariances = [np.cov(boxes.T) / max(width, height) ** 2 for boxes in (ours, theirs)]
    np.testing.assert_allclose(*covariances, atol=0.002)


def test_boxes_depend_on_seed_epoch_sample_and_crop_only():
    config = CropsConfig()
    sizes = np.array([300, 200, 250]), np.array([400, 333, 250])
    samples = np.array([5, 9, 2])
    key = dict(seed=1, epoch=2)
    whole = crop_boxes(config, *sizes, **key, samples=samples)
    for i in range(3):
        alone = crop_boxes(config, sizes[0][[i]], sizes[1][[i]], **key, samples=samples[[i]])
        assert np.array_equal(alone[0], whole[i])
    assert len(np.unique(whole[0], axis=0)) == config.num_crops
    for change in ({"seed": 2}, {"epoch": 3}):
        assert (crop_boxes(config, *sizes, **(key | change), samples=samples) != whole).any()


def test_tiny_images_give_boxes_inside():
    for width, height in [(1, 1), (1, 1000), (1000, 1), (2, 3)]:
        boxes = boxes_of(width, height, 50)
        assert (boxes[..., 2:] >= 1).all()
        assert (boxes[..., :2] + boxes[..., 2:] <= (height, width)).all()


# -------------------------------------------------------------------------------------- resizing


def slots(*sizes: int) -> list[torch.Tensor]:
    return [torch.zeros(1, s, s, 3, dtype=torch.uint8).permute(0, 3, 1, 2) for s in sizes]


@pytest.mark.parametrize("size", [32, 96, 224])
def test_crops_are_pillows_within_one_level(size: int):
    raw = encoded(photo(330, 260), quality=95)
    boxes = np.array([[0, 0, 260, 330], [10, 20, 200, 150], [100, 100, 31, 29]])
    outputs = slots(size, size, size)
    cut_crops(raw, read_header(raw), boxes, outputs, Scratch(), Cutter())
    for (top, left, height, width), out in zip(boxes, outputs, strict=True):
        box = (left, top, left + width, top + height)
        image = Image.open(io.BytesIO(raw)).convert("RGB").crop(box)
        expected = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
        assert abs(out[0].permute(1, 2, 0).numpy() - expected).max() <= 1


def test_resize_into_is_interpolate():
    pixels = torch.randint(0, 256, (1, 50, 70, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    (out,) = slots(31)
    resize_into(pixels, out)
    options = dict(mode="bicubic", antialias=True, align_corners=False)
    assert torch.equal(out, torch.nn.functional.interpolate(pixels, (31, 31), **options))


def test_large_jpegs_are_decoded_reduced_without_visible_change():
    raw = encoded(photo(1600, 1200), quality=92, subsampling=0)
    boxes = np.array([[36, 56, 1000, 1204], [300, 432, 504, 500]])  # edges on reduced pixels
    sizes = [96, 64]
    assert reduction(boxes, np.array(sizes)) == 4
    reduced, exact = slots(*sizes), slots(*sizes)
    cut_crops(raw, read_header(raw), boxes, reduced, Scratch(), Cutter())
    pixels = torch.from_numpy(decoded(raw)).permute(2, 0, 1)[None]
    for (top, left, height, width), out, same in zip(boxes, exact, reduced, strict=True):
        box = pixels[:, :, top : top + height, left : left + width]
        resize_into(box.contiguous(memory_format=torch.channels_last), out)
        difference = (out.float() - same.float()).abs()
        assert difference.mean() < 1.5 and difference.quantile(0.99) < 6, difference.mean()


def test_reduction_leaves_enough_pixels_for_every_crop():
    sizes = np.array([224, 96])
    for big, small, expected in [(335, 900, 1), (672, 288, 2), (671, 900, 1), (2688, 1152, 8)]:
        boxes = np.array([[0, 0, big, big + 5], [0, 0, small + 9, small]])
        assert reduction(boxes, sizes) == expected


@pytest.mark.parametrize("width,height", [(300, 200), (200, 301), (64, 64), (40, 500)])
@pytest.mark.parametrize("resize,crop", [(72, 64), (64, 64)])
def test_center_view_is_torchvisions_resize_and_center_crop(width, height, resize, crop):
    image = photo(width, height)
    (out,) = slots(crop)
    center_view(np.asarray(image), resize, crop, out)
    bicubic = transforms.InterpolationMode.BICUBIC
    expected = transforms.CenterCrop(crop)(transforms.Resize(resize, bicubic)(image))
    assert abs(out[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 1


def test_center_view_without_resize_keeps_pixels():
    image = np.asarray(photo(32, 32))
    (out,) = slots(32)
    center_view(image, None, 32, out)
    assert np.array_equal(out[0].permute(1, 2, 0).numpy(), image)
    center_view(np.asarray(photo(20, 24)), None, 32, out)  # enlarged to fit
