"""The Python transform on images that are not 8-bit RGB: what the loader makes of them."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import xcit_dino
from tests import victims
from tests.native_sets import image, make_set, npy
from xcit_dino.data.decode.native import decode_native, read_native_header
from xcit_dino.data.native.scaling import form_of
from xcit_dino.data.pixels import PixelFormat
from xcit_dino.errors import InputError
from xcit_dino.eval.api.preprocess import Preprocess
from xcit_dino.eval.config import EvalTargetConfig
from xcit_dino.eval.context import make_context
from xcit_dino.inputs import InputSettings
from xcit_dino.models.config import ExportConfig
from xcit_dino.models.weights import convert
from xcit_dino.ssl.pretrain import pretrain
from xcit_dino.train.distributed.dist import World

WORLD = World(0, 1, torch.device("cpu"))
KINDS = [(5, "uint16", ()), (1, "uint8", ()), (3, "float32", ()), (2, "int16", (2,))]


def tif(values: np.ndarray, **how) -> bytes:
    file = io.BytesIO()
    gray = values.shape[2] == 1
    how |= {} if gray else {"planarconfig": "contig"}
    tifffile.imwrite(file, values[..., 0] if gray else values, photometric="minisblack", **how)
    return file.getvalue()


def known(shards: Path, bands: tuple[int, ...] = ()) -> tuple[InputSettings, PixelFormat]:
    """Settings of a network trained on a set, and the set's format."""
    form = form_of(shards)
    assert form is not None
    channels = len(bands) or form.channels
    settings = InputSettings(
        20, 0.8, mean=(0.4,) * channels, std=(0.3,) * channels, channels=channels, bands=bands
    )
    given = EvalTargetConfig(num_workers=0, window=("p0.1", "p99.9"))
    return make_context(given, settings, {}, shards, WORLD).inputs, form


@pytest.mark.parametrize(("channels", "dtype", "bands"), KINDS)
def test_the_transform_makes_what_the_loader_does(tmp_path, channels, dtype, bands):
    shards = make_set(tmp_path / "set", channels, dtype, val=4, size=40)
    inputs, form = known(shards, bands)
    given = EvalTargetConfig(num_workers=0, batch_size_per_gpu=4)
    context = make_context(given, inputs, {}, shards, WORLD)
    assert context.inputs == inputs
    images, _, samples = next(iter(context.images(context.index("val"), np.arange(4))))
    expected = context.normalize(images)
    for transform in (Preprocess.of(inputs, form), Preprocess.of(inputs)):
        assert (transform.resize, transform.crop) == (context.resize, context.crop) == (25, 20)
        for place, sample in enumerate(samples.tolist()):
            number = 1000 + (2 * sample if sample < 2 else 2 * (sample - 2) + 1)
            values = image(number, channels, dtype, 40)
            (tmp_path / "file").write_bytes(tif(values))
            for way in (
                npy(values), tmp_path / "file", values,
                torch.from_numpy(values.astype(np.float64)).permute(2, 0, 1)
                if dtype == "float32" else torch.from_numpy(values).permute(2, 0, 1),
            ):  # fmt: skip
                found = transform(way)
                assert found.shape == (len(bands) or channels, 20, 20)
                assert torch.equal(found, expected[place]), type(way)


def test_a_transform_of_many_channels_prints_in_a_line(tmp_path):
    shards = make_set(tmp_path / "set", 13, "uint16")
    inputs, form = known(shards)
    shown = repr(Preprocess.of(inputs, form))
    assert shown == "Preprocess(resize=25, crop=20, bicubic, of 13 channels)"
    plain = repr(Preprocess(InputSettings(224), 256, 224))
    assert plain == "Preprocess(resize=256, crop=224, bicubic, of 8-bit RGB)"


def test_invalid_pixels_are_the_channels_mean(tmp_path):
    shards = make_set(tmp_path / "set", 3, "float32")
    inputs, form = known(shards)
    values = image(0, 3, "float32")
    values[:9, :9, 1] = np.nan
    values[12, 12] = -9999
    form = replace(form, nodata=-9999.0)
    raw = npy(values)
    filled = decode_native(raw, read_native_header(raw, form), form)
    transform = Preprocess.of(inputs, form)
    assert torch.equal(transform(values), transform(filled))
    alone = Preprocess.of(inputs)(np.full((20, 20, 3), np.nan, np.float32))
    assert alone.abs().max() < 1e-5  # the mean of the normalization, as nothing else is known


def test_one_page_of_a_stack_and_gray_pictures():
    stack = np.random.default_rng(0).integers(0, 4096, (3, 40, 40), np.uint16)
    inputs = InputSettings(20, 1.0, mean=(0.5,), std=(0.2,), channels=1, high=(4095.0,))
    file = io.BytesIO()
    tifffile.imwrite(file, stack, photometric="minisblack")
    paged = Preprocess.of(inputs, PixelFormat(1, "uint16", page=2))
    assert torch.equal(paged(file.getvalue()), paged(stack[2]))
    with pytest.raises(InputError, match="3xuint16, and the network takes 1 channel$"):
        Preprocess.of(inputs)(file.getvalue())
    deep = Image.fromarray(stack[2])
    assert torch.equal(paged(deep), paged(stack[2]))
    gray = Preprocess.of(replace(inputs, high=(255.0,)))
    picture = Image.fromarray(stack[2].astype(np.uint8))
    assert torch.equal(gray(picture.convert("RGB")), gray(np.asarray(picture)))


BANDS = InputSettings(20, mean=(0.5,) * 5, std=(0.2,) * 5, channels=5, high=(4095.0,))


@pytest.mark.parametrize(
    ("shown", "settings", "words"),
    [
        (np.zeros((40, 40, 3), np.uint16), BANDS, "3xuint16, and the network takes 5 channels"),
        (np.zeros((40, 40, 5), np.uint8), BANDS, "takes values from 0 to 4095; give the image"),
        (np.zeros((9, 9, 5), np.uint16), replace(BANDS, high=(255.0,)), "from 0 to 255; give the"),
        (np.zeros((2, 40, 40, 5), np.uint16), BANDS, "is no image; give"),
        (np.zeros((40, 40, 5), complex), BANDS, "pixels of type complex128"),
        (
            np.zeros((40, 40, 2), np.uint16),
            replace(BANDS, channels=1, mean=(0.5,), std=(0.2,), bands=(4,)),
            "takes 1 channel, bands 4 of its images",
        ),
        (b"no image", BANDS, "the image: cannot be decoded"),
        ("missing.tif", BANDS, "missing.tif: No such file"),
    ],
)
def test_images_that_it_cannot_take(shown, settings, words):
    with pytest.raises(InputError, match=words):
        Preprocess.of(settings)(shown)


def test_an_array_is_one_image_and_a_list_several():
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model.register_parameter("place", torch.nn.Parameter(torch.zeros(1)))
    five, one = (np.random.default_rng(0).integers(0, 4096, (30, 30, c), np.uint16) for c in (5, 1))
    gray = replace(BANDS, channels=1, mean=(0.5,), std=(0.2,))
    for settings, shown, count in (
        (BANDS, five, 1), (BANDS, torch.from_numpy(five).permute(2, 0, 1), 1),
        (BANDS, [five, five], 2), (gray, one, 1), (gray, one[..., 0], 1),
        (gray, np.stack([one] * 3), 3),
    ):  # fmt: skip
        found = xcit_dino.embed(shown, model, Preprocess.of(settings))
        assert found.shape == (count, settings.channels)


def test_window_and_bands_travel_with_exported_weights(tmp_path, capsys):
    shards = make_set(tmp_path / "set", 5, "uint16", train=20, val=8)
    run = tmp_path / "run"
    options = {
        "bands": (4, 2, 1, 5),
        "arch": "xcit_nano_12_p8",
        "batch_size_per_gpu": 2,
        "epochs": 1,
        "max_steps": 1,
    }
    pretrain(victims.config(shards, run, **options))
    convert.export(ExportConfig(run, tmp_path / "bands.safetensors"))
    convert.export(ExportConfig(run, tmp_path / "hub", format="timm-hub"))
    values = image(3, 5, "uint16")
    model, transform = xcit_dino.load(run)
    assert transform.inputs.bands == (4, 2, 1, 5) and transform.inputs.high == (4095.0,)
    features = xcit_dino.embed(values, model, transform)
    for source in ("bands.safetensors", "hub"):
        other, prepared = xcit_dino.load(tmp_path / source)
        assert prepared.inputs.bands == (4, 2, 1, 5)
        assert torch.equal(prepared(values), transform(values))
        np.testing.assert_allclose(xcit_dino.embed(values, other, prepared), features, atol=1e-5)
    for card in ("bands.safetensors.md", "hub/README.md"):
        text = (tmp_path / card).read_text()
        assert "bands 4, 2, 1, 5 of the images, values 0 to 4095 scaled to [0, 1]" in text

    context = make_context(EvalTargetConfig(num_workers=0), transform.inputs, {}, shards, WORLD)
    assert context.loader.bands == (4, 2, 1, 5) and context.form.channels == 4
    assert context.notes[0].startswith("bands 4 2 1 5 of the images are read, as the weights were")
    four = make_set(tmp_path / "four", 4, "uint16", train=4, val=4)
    context = make_context(EvalTargetConfig(num_workers=0), transform.inputs, {}, four, WORLD)
    assert context.loader.bands == ()
    assert "the images are taken for these" in context.notes[0]
    given = EvalTargetConfig(num_workers=0, bands=(1, 2, 3, 4))
    context = make_context(given, transform.inputs, {}, shards, WORLD)
    assert context.loader.bands == (1, 2, 3, 4)
