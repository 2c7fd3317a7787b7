"""Images that are not 8-bit RGB, from the shard to the network's input."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.native_sets import form_of, image, make_set
from xcit_dino.data.augment import normalize, scaled
from xcit_dino.data.config import AugmentConfig, CropsConfig, LoaderConfig
from xcit_dino.data.crops import crop_boxes
from xcit_dino.data.loader import CropLoader, ImageLoader
from xcit_dino.data.native.scaling import resolve_scaling
from xcit_dino.data.pixels import RGB8, Window
from xcit_dino.data.plan import Plan
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError
from xcit_dino.inputs import IMAGENET_MEAN, IMAGENET_STD, InputSettings

CROPS = CropsConfig(global_crops_size=16, local_crops_number=2, local_crops_size=8)
KINDS = [(5, "uint16"), (1, "uint8"), (3, "float32"), (2, "int16")]


def loader_of(index: ShardIndex, *, bands: tuple[int, ...] = (), **change) -> CropLoader:
    config = LoaderConfig(num_workers=change.pop("num_workers", 0), shuffle_window=2, bands=bands)
    plan = Plan.of(index, config, seed=3, batch_size=6)
    return CropLoader(index, plan, CROPS, config, **change)


def original(index: ShardIndex, sample: int, channels: int, dtype: str) -> np.ndarray:
    """The image of a sample, whose shards hold every second one."""
    half = int(index.counts[0])
    return image(2 * sample if sample < half else 2 * (sample - half) + 1, channels, dtype)


@pytest.mark.parametrize(("channels", "dtype"), KINDS)
def test_crops_are_torchs_in_the_sets_own_type(tmp_path, channels, dtype):
    index = ShardIndex.load(make_set(tmp_path / "set", channels, dtype) / "train")
    with closing(iter(loader_of(index))) as steps:
        (batch,) = next(steps)
    assert batch.global_crops.dtype == getattr(torch, dtype)
    assert batch.global_crops.shape == (2, 6, channels, 16, 16)
    for place, sample in enumerate(batch.samples):
        values = original(index, sample, channels, dtype)
        boxes = crop_boxes(
            CROPS, *(np.array([side]) for side in values.shape[:2]),
            seed=3, epoch=0, samples=np.array([sample]),
        )[0]  # fmt: skip
        crops = [*batch.global_crops[:, place], *batch.local_crops[:, place]]
        for (top, left, height, width), crop in zip(boxes, crops, strict=True):
            part = torch.from_numpy(
                values[top : top + height, left : left + width].astype(np.float64)
            ).permute(2, 0, 1)[None]
            wanted = F.interpolate(part, crop.shape[-2:], mode="bicubic", antialias=True)[0]
            if dtype != "float32":
                limits = np.iinfo(dtype)
                wanted = wanted.clamp(limits.min, limits.max)
            assert (crop.double() - wanted).abs().max() <= (1e-2 if dtype == "float32" else 0.51)


def test_an_image_that_is_not_resized_keeps_every_level(tmp_path):
    index = ShardIndex.load(make_set(tmp_path / "set", 5, "uint16") / "train")
    loader = ImageLoader(index, LoaderConfig(num_workers=0), resize=None, crop=24)
    images, _, samples = next(iter(loader))
    for view, sample in zip(images, samples, strict=True):
        values = original(index, sample, 5, "uint16")
        top = round((len(values) - 24) / 2)
        assert np.array_equal(view.permute(1, 2, 0).numpy(), values[top : top + 24])
    assert len(np.unique(images.numpy())) > 3000  # of 4,096


def test_batches_depend_neither_on_workers_nor_on_ranks(tmp_path):
    index = ShardIndex.load(make_set(tmp_path / "set", 5, "uint16") / "train")

    def crops(**change) -> list[np.ndarray]:
        with closing(iter(loader_of(index, **change))) as steps:
            return [step[0].global_crops.numpy().copy() for step in islice(steps, 3)]

    alone = crops()
    for workers in (1, 2):
        assert all(map(np.array_equal, alone, crops(num_workers=workers)))
    halves = [crops(rank=rank, world_size=2) for rank in range(2)]
    for whole, *parts in zip(alone, *halves, strict=True):
        assert np.array_equal(whole, np.concatenate(parts, 1))
    assert all(map(np.array_equal, alone[1:], crops(start_step=1)))


def test_bands_pick_and_order_channels(tmp_path):
    index = ShardIndex.load(make_set(tmp_path / "set", 5, "uint16") / "train")
    with (
        closing(iter(loader_of(index))) as steps,
        closing(iter(loader_of(index, bands=(4, 3, 2)))) as picked,
    ):
        whole, some = next(steps)[0].global_crops, next(picked)[0].global_crops
    assert torch.equal(some.float(), whole.float()[:, :, [3, 2, 1]])
    with pytest.raises(InputError, match="channels 1 to 5"):
        loader_of(index, bands=(4, 6))
    with pytest.raises(InputError, match="--bands 4 3 4: name each channel once"):
        loader_of(index, bands=(4, 3, 4))
    with pytest.raises(InputError, match="8-bit RGB"):
        RGB8.select((1,))
    with pytest.raises(InputError, match="--decoder cuda: decodes 8-bit RGB only"):
        CropLoader(
            index, Plan.of(index, LoaderConfig(), seed=0, batch_size=6), CROPS,
            LoaderConfig(decoder="cuda"), device="cuda",
        )  # fmt: skip


def test_damaged_images_are_replaced(tmp_path):
    folder = make_set(tmp_path / "set", 2, "int16") / "train"
    index = ShardIndex.load(folder)
    shard, offset, _ = index.locate(3)
    with open(index.path(shard), "r+b") as file:
        file.seek(offset)
        file.write(b"nothing")
    loader = loader_of(index)
    with closing(iter(loader)) as steps:
        batches = [step[0] for step in islice(steps, 4)]
    samples = np.concatenate([batch.samples for batch in batches])
    sources = np.concatenate([batch.sources for batch in batches])
    assert samples[samples != sources].tolist() == [3]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_windows_scale_and_clip(dtype):
    values = torch.arange(24).view(1, 2, 3, 4).to(getattr(torch, dtype))
    before = values.clone()
    ours = scaled(values, (2.0, 10.0), (6.0, 20.0))
    wanted = values.double()
    wanted = torch.stack([(wanted[:, 0] - 2) / 4, (wanted[:, 1] - 10) / 10], 1).clamp(0, 1)
    assert (ours - wanted).abs().max() < 1e-6
    assert torch.equal(values.double(), before.double())  # float32 crops lie in the ring
    ours = normalize(values, (0.1, 0.2), (0.5, 2.0), (2.0, 10.0), (6.0, 20.0))
    center, spread = torch.tensor([0.1, 0.2]), torch.tensor([0.5, 2.0])
    wanted = (wanted - center.view(2, 1, 1)) / spread.view(2, 1, 1)
    assert (ours - wanted).abs().max() < 1e-5


def test_scaling_is_given_or_known_or_the_datas():
    images = [image(n, 3, "uint16") for n in range(8)]
    form, given = form_of(images), AugmentConfig()
    own = resolve_scaling(given, form, None)
    pixels = np.concatenate([each.reshape(-1, 3) for each in images]) / 4095
    assert own.options["window"] == (0.0, 4095.0)
    assert own.lines == [
        "images are 3xuint16: values 0 to 4095 are scaled to [0, 1] (12 of 16 bits are used)"
    ]
    assert own.mean == pytest.approx(pixels.mean(0), abs=1e-4)
    assert own.std == pytest.approx(pixels.std(0), abs=1e-4)

    rgb = resolve_scaling(given, form, InputSettings())  # weights of ImageNet
    assert (rgb.mean, rgb.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert rgb.options["window"] == (0.0, 4095.0) and "those of the weights" in rgb.lines[0]

    theirs = InputSettings(mean=(0.1,) * 3, std=(0.2,) * 3, low=(10.0,), high=(1000.0,))
    taken = resolve_scaling(given, form, theirs)
    assert taken.window == Window((10.0,), (1000.0,)) and taken.mean == theirs.mean
    assert "as the weights were trained" in taken.lines[0]
    resumed = resolve_scaling(given, form, theirs, same_data=True)
    assert resumed.window == taken.window and resumed.std == theirs.std
    other = resolve_scaling(
        given, form, replace(theirs, channels=2, mean=(0.1, 0.2), std=(1.0, 1.0))
    )
    assert other.options == own.options  # they say nothing of three channels

    window = AugmentConfig(window=(0.0, "p50", 5.0, "p100", 7, 900), mean=(0.5,) * 3)
    chosen = resolve_scaling(window, form, theirs)
    assert chosen.window.low == (0.0, 5.0, 7.0) and chosen.mean == (0.5,) * 3
    assert chosen.window.high[1] == form.statistics.maximum[1]
    assert chosen.std == theirs.std


def test_8_bit_rgb_is_scaled_as_ever():
    plain = resolve_scaling(AugmentConfig(), RGB8, None)
    assert plain.options == {"window": None, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    assert not plain.lines
    assert resolve_scaling(AugmentConfig(window=(0, 255)), RGB8, None).options == plain.options
    deep = InputSettings(low=(0.0,), high=(4095.0,))
    found = resolve_scaling(AugmentConfig(), RGB8, deep)
    assert (
        found.options == plain.options and "(the weights: values 0 to 4095 are)" in found.lines[0]
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mean": (0.5,)}, "--mean: 1 values, and the images have 3 channels"),
        ({"std": (0.5, 0.1)}, "--std: 2 values"),
        ({"window": (9.0, 4.0)}, "first must be below"),
        ({"window": ("p101", 4.0)}, "between p0 and p100"),
    ],
)
def test_scaling_that_cannot_be(options, words):
    form = form_of([image(0, 3, "uint16")])
    with pytest.raises(InputError, match=words):
        resolve_scaling(AugmentConfig(**options), form, None)
