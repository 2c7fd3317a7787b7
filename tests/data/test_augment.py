"""Augmentation against Pillow (what the official code calls) and torchvision: operation by
operation with the same parameters, then the whole pipeline in distribution."""

from __future__ import annotations

import colorsys
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import functional as T
from torchvision.transforms.v2 import functional as F

from bench.reference import plain_more
from xcit_dino.data import augment as A
from xcit_dino.data.batch import Batch
from xcit_dino.data.config import AugmentConfig
from xcit_dino.data.packed import Packed


def photo(seed: int = 0, size: int = 48) -> Image.Image:
    """Smooth colors with some noise and flat saturated areas: all that the operations care for."""
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(-3, 3, (3, 3))]
    image = 127 + 90 * np.stack(waves, -1) + rng.normal(0, 25, (size, size, 3))
    image[:8, :8], image[-8:, :8] = (255, 0, 0), (40, 40, 40)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def to_float(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def levels(x: torch.Tensor, image: Image.Image) -> np.ndarray:
    """Absolute differences in 8-bit levels."""
    ours = (x[0].permute(1, 2, 0).numpy() * 255).round()
    return abs(ours - np.asarray(image).astype(float))


def one(value: float) -> np.ndarray:
    return np.array([value], np.float32)


def jitter(x: torch.Tensor, order: np.ndarray, factors: np.ndarray) -> torch.Tensor:
    return A.color_jitter(x, Packed.of(A.jitter_passes(order, factors)).unpacked())


def jitter_one(x: torch.Tensor, operation: int, factor: float) -> torch.Tensor:
    factors = np.array([[1, 1, 1, 0]], np.float32)
    factors[0, operation] = factor
    return jitter(x, np.array([[0, 1, 2, 3]]), factors)


def blur(x: torch.Tensor, sigma: np.ndarray) -> torch.Tensor:
    return A.gaussian_blur(x, torch.from_numpy(A.box_sums(sigma)))


def applied(crops, params: A.AugmentParams, config: AugmentConfig, *dtype) -> torch.Tensor:
    return A.apply(crops, Packed.of(A.recipe(params)).unpacked(), config, *dtype)


@pytest.mark.parametrize("factor", [0.6, 0.95, 1.4])
@pytest.mark.parametrize(
    "operation,enhance",
    [
        (A.BRIGHTNESS, ImageEnhance.Brightness),
        (A.CONTRAST, ImageEnhance.Contrast),
        (A.SATURATION, ImageEnhance.Color),
    ],
)
def test_blends_are_pillows_within_one_level(operation, enhance, factor: float):
    image = photo()
    expected = enhance(image).enhance(factor)
    assert levels(jitter_one(to_float(image), operation, factor), expected).max() <= 1


@pytest.mark.parametrize("turns", [-0.1, -0.03, 0.07, 0.5])
def test_hue_is_torchvisions_and_colorsyss(turns: float):
    x = to_float(photo())
    ours = jitter_one(x, A.HUE, turns)
    torch.testing.assert_close(ours, F.adjust_hue(x, turns), atol=1e-5, rtol=0)
    r, g, b = x[0, :, 20, 20].tolist()
    h, s, v = colorsys.rgb_to_hsv(r, g, b)
    expected = colorsys.hsv_to_rgb((h + turns) % 1, s, v)
    np.testing.assert_allclose(ours[0, :, 20, 20], expected, atol=1e-5)
    pillow = T.adjust_hue(photo(), turns)  # hue in 256 steps: a coarse relative
    assert levels(ours, pillow).mean() < 2


def test_jitter_order_is_each_images_own():
    images, rng = [photo(seed) for seed in range(6)], np.random.RandomState(0)
    order = np.stack([rng.permutation(4) for _ in images])
    factors = np.float32([1, 1, 1, 0] + rng.uniform(-1, 1, (6, 4)) * (0.4, 0.4, 0.2, 0.1))
    ours = jitter(torch.cat([to_float(image) for image in images]), order, factors)
    adjust = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
    for i, image in enumerate(images):
        expected = to_float(image)[0]
        for operation in order[i]:
            expected = adjust[operation](expected, float(factors[i, operation]))
        torch.testing.assert_close(ours[i], expected, atol=2e-4, rtol=0)  # gray 0.299 for 0.2989


def test_gray_and_solarize_are_pillows_within_one_level():
    image = photo()
    gray = A.grayscale(to_float(image)).expand(1, 3, -1, -1)
    assert levels(gray, ImageOps.grayscale(image).convert("RGB")).max() <= 1
    assert levels(A.solarize(to_float(image)), ImageOps.solarize(image)).max() == 0


@pytest.mark.parametrize("sigma", [0.1, 0.35, 0.9, 1.3, 2.0, 7.5])
def test_blur_is_pillows_within_three_levels_edges_included(sigma: float):
    """Three levels because Pillow rounds to 8 bits after each of its six passes."""
    image = photo()
    expected = image.filter(ImageFilter.GaussianBlur(sigma))
    difference = levels(blur(to_float(image), one(sigma)), expected)
    assert difference.max() <= 3 and difference.mean() < 0.75


def test_blur_takes_each_images_own_sigma_and_any_shape():
    x = torch.rand(3, 3, 17, 30)
    sigmas = np.float32([0.2, 1.0, 2.0])
    together = blur(x, sigmas)
    for i in range(3):
        torch.testing.assert_close(together[i, None], blur(x[i, None], sigmas[i, None]))


def neutral(n: int, **change) -> A.AugmentParams:
    no = np.zeros(n, bool)
    factors = np.tile(np.float32([1, 1, 1, 0]), (n, 1))
    defaults = dict(
        flip=no, order=np.tile(np.arange(4), (n, 1)), factors=factors, gray=no,
        sigma=np.zeros(n, np.float32), solarize=no,
    )  # fmt: skip
    return A.AugmentParams(**(defaults | change))


def test_nothing_drawn_is_to_tensor_and_normalize():
    crops = torch.randint(0, 256, (2, 3, 8, 8, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    config = AugmentConfig()
    ours = applied(crops, neutral(6), config)
    expected = T.normalize(crops.flatten(0, 1) / 255, *config.normalization)
    torch.testing.assert_close(ours, expected)
    flipped = applied(crops, neutral(6, flip=np.arange(6) == 4), config)
    torch.testing.assert_close(flipped[4], expected[4].flip(-1))
    torch.testing.assert_close(flipped[5], expected[5])
    assert applied(crops, neutral(6), config, torch.bfloat16).dtype == torch.bfloat16


ALL_ON = AugmentConfig(
    rot90_prob=0.7, channel_jitter=(0.3, 0.4), noise_prob=0.5, channel_drop_prob=0.3
)


@pytest.mark.parametrize("config", [AugmentConfig(), ALL_ON], ids=["dino", "all"])
def test_parameters_do_not_depend_on_the_batch_they_are_drawn_in(config):
    samples = np.array([7, 3, 11, 900])
    whole = A.sample_params(config, 1, 2, samples, range(5), 2)
    for place, sample in enumerate(samples):
        for crop in range(5):
            alone = A.sample_params(config, 1, 2, np.array([sample]), [crop], 2)
            pairs = [(alone, whole)] + ([(alone.more, whole.more)] if config is ALL_ON else [])
            for one_crop, all_crops in pairs:
                for name, value in vars(one_crop).items():
                    if name != "more":
                        assert np.array_equal(
                            value[0], getattr(all_crops, name)[crop * 4 + place]
                        ), name


def test_probabilities_ranges_and_orders_are_the_configured_ones():
    config, n = AugmentConfig(), 6000
    p = A.sample_params(config, 0, 0, np.arange(n), range(3), num_global=2)

    def share(values: np.ndarray) -> np.ndarray:
        return values.reshape(3, n).mean(1)

    np.testing.assert_allclose(share(p.flip), 0.5, atol=0.03)
    np.testing.assert_allclose(share(p.gray), 0.2, atol=0.03)
    np.testing.assert_allclose(share(p.sigma > 0), config.blur_prob, atol=0.03)
    np.testing.assert_allclose(share(p.solarize), config.solarize_prob, atol=0.03)
    jittered = (p.factors != (1, 1, 1, 0)).any(1)
    np.testing.assert_allclose(share(jittered), 0.8, atol=0.03)
    deviation = (p.factors - (1, 1, 1, 0))[jittered] / config.color_jitter
    assert abs(deviation).max() <= 1.001
    np.testing.assert_allclose(deviation.mean(0), 0, atol=0.03)
    np.testing.assert_allclose((deviation**2).mean(0), 1 / 3, atol=0.02)
    assert 0.1 <= p.sigma[p.sigma > 0].min() and p.sigma.max() <= 2.0
    _, counts = np.unique(p.order @ [64, 16, 4, 1], return_counts=True)
    assert len(counts) == 24 and abs(counts / (3 * n) - 1 / 24).max() < 0.01


def official(blur: float, solarized: float) -> transforms.Compose:
    """The crop's transform of main_dino.py after RandomResizedCrop, written plainly."""

    def gaussian_blur(image: Image.Image) -> Image.Image:
        if random.random() > blur:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    def solarization(image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < solarized else image

    return transforms.Compose(
        [
            transforms.RandomHorizontalFlip(0.5),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(0.2),
            gaussian_blur,
            solarization,
            transforms.ToTensor(),
        ]
    )


@pytest.mark.parametrize("crop,blur,solarized", [(0, 1.0, 0.0), (1, 0.1, 0.2), (2, 0.5, 0.0)])
def test_whole_pipeline_has_the_official_distribution(crop: int, blur: float, solarized: float):
    """Moments and histograms over many draws on the same images: one law, other random bits."""
    torch.manual_seed(0)
    random.seed(0)
    draws, images = 1200, [photo(seed, 24) for seed in range(4)]
    transform = official(blur, solarized)
    theirs = torch.stack([transform(image) for image in images for _ in range(draws)])
    crops = torch.cat([(to_float(image) * 255).round().to(torch.uint8) for image in images])
    config = AugmentConfig(mean=(0, 0, 0), std=(1, 1, 1))
    params = A.sample_params(config, 0, 0, np.arange(4 * draws), [crop], 2)
    ours = applied(crops.repeat_interleave(draws, 0)[None], params, config)

    ours, theirs = (x.view(4, draws, 3, 24, 24) for x in (ours, theirs))
    moments = [(x.mean((1, 3, 4)), x.std((1, 3, 4)), x.std((3, 4)).mean(1)) for x in (ours, theirs)]
    for a, b in zip(*moments, strict=True):
        torch.testing.assert_close(a, b, atol=0.012, rtol=0)
    sharpness = [(x.diff(dim=-1) ** 2).mean((1, 2, 3, 4)).sqrt() for x in (ours, theirs)]
    torch.testing.assert_close(*sharpness, atol=0.003, rtol=0.03)
    histograms = [torch.histc(x, 32, 0, 1) / x.numel() for x in (ours, theirs)]
    assert (histograms[0] - histograms[1]).abs().sum() < 0.05


def test_recipes_that_come_with_the_batch_change_nothing():
    """Drawn where the batch is made, or where it is augmented: the same bits."""
    crops = torch.randint(0, 256, (4, 5, 3, 16, 16), dtype=torch.uint8)
    numbers = np.arange(5)
    batch = Batch(0, 0, 1, numbers, numbers, torch.zeros(5), crops[:2], crops[2:, ..., :8])
    augment = A.Augment(AugmentConfig(), seed=3)
    drawn = replace(batch, recipes=augment.recipes(batch))
    for here, there in zip(augment(batch), augment(drawn), strict=True):
        assert torch.equal(here, there)


def test_a_block_holds_arrays_of_any_kind_and_none():
    nest = {
        "a": [np.arange(3), np.zeros((0, 4), np.float32)],
        "b": (np.array([True, False, True]), np.float32(np.eye(2)), np.array(7, np.int16)),
    }
    packed = Packed.of(nest)
    found = packed.unpacked()
    pairs = zip([*nest["a"], *nest["b"]], [*found["a"], *found["b"]], strict=True)
    for array, tensor in pairs:
        assert tensor.numpy().dtype == array.dtype and np.array_equal(tensor.numpy(), array)
        assert tensor.untyped_storage().data_ptr() == packed.block.data_ptr()


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_what_is_added_equals_its_plain_twin(channels):
    config = replace(
        ALL_ON, mean=(0.4,) * channels, std=tuple(0.1 * (c + 1) for c in range(channels)),
        window=(0.0, 4095.0), flip_prob=0, color_jitter=(0, 0, 0, 0), blur_prob=(0, 0, 0),
        gray_prob=0, solarize_prob=(0, 0, 0), channel_drop_prob=0.3 if channels > 1 else 0,
    )  # fmt: skip
    crops = torch.randint(0, 4096, (3, 4, channels, 7, 7)).to(torch.uint16)
    params = A.sample_params(config, 1, 2, np.array([7, 3, 11, 900]), range(3), 2)
    ours = applied(crops, params, config).numpy()
    extra = params.more
    assert extra.turns.any() and extra.noise.any() and (extra.factors != 1).any()
    assert extra.dropped.any() == (channels > 1) and not extra.dropped.all(1).any()
    unit = crops.flatten(0, 1).numpy() / 4095
    for n, crop in enumerate(unit):
        wanted = plain_more(
            crop, turns=int(extra.turns[n]), factors=extra.factors[n], noise=float(extra.noise[n]),
            seed=int(extra.seeds[n]), dropped=extra.dropped[n], mean=config.mean, std=config.std,
        )  # fmt: skip
        np.testing.assert_allclose(ours[n], wanted, atol=2e-4)


def test_colors_are_off_where_there_are_none():
    config = AugmentConfig(mean=(0.5,) * 5, std=(0.2,) * 5)
    assert config.effective.color_jitter == (0.4, 0.4, 0, 0)
    assert config.effective.gray_prob == 0 and not any(config.effective.solarize_prob)
    assert AugmentConfig().effective == AugmentConfig()
    assert config.without_meaning(5) == ["color_jitter", "gray_prob", "solarize_prob"]
    assert not config.without_meaning(3)
