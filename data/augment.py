"""Crops -> augmented, normalized crops, batched on any device (dino DataAugmentationDINO).

Scale to [0, 1], flip, color jitter in random order, gray, blur, solarize, normalize; with what
``data/native/augment.py`` adds. Images that do not have 3 channels have no saturation, hue, gray
and solarize, and their contrast is that to the mean of all channels. Random choices
(:func:`sample_params`) are made on the host from (seed, epoch, sample, crop), so they do not depend
on ranks, workers or micro-batches; applying them (:func:`apply`) is a pure function. Each operation
is Pillow's with the same parameters, without its rounding to 8 bits after every one.

Which crops an operation changes, and by how much, is computed on the host (:func:`recipe`) and
copied to the device in one block beside the crops; from there on nothing waits for the device.

Shapes: V crops of B images; N = V*B crops, crop-major (all images' crop 0, then crop 1, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcit_dino.data.batch import Batch
from xcit_dino.data.config import AugmentConfig
from xcit_dino.data.native import augment as more
from xcit_dino.data.native.augment import change
from xcit_dino.data.packed import Packed
from xcit_dino.data.rng import random_uniforms
from xcit_dino.inputs import BYTES, Channels

AUGMENT_STREAM = 13
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
GRAY = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's convert("L")
SOLARIZE_FROM = 127.5 / 255  # Pillow inverts 8-bit values of 128 and more


class Augment:
    """The augmentation of a run: a micro-batch's global and local crops, ready for the network.

    Args:
        config: probabilities and strengths.
        seed: of the run.
        dtype: of the result; the arithmetic is float32.
    """

    def __init__(
        self, config: AugmentConfig, *, seed: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.config, self.seed, self.dtype = config.effective, seed, dtype

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """([G*B, C, S, S], [L*B, C, s, s]) on the crops' device, crop-major."""
        recipes = batch.recipes or self.recipes(batch)
        of_globals, of_locals = recipes.to(batch.global_crops.device).unpacked()
        return (
            apply(batch.global_crops, of_globals, self.config, self.dtype),
            apply(batch.local_crops, of_locals, self.config, self.dtype),
        )

    def recipes(self, batch: Batch) -> Packed:
        """A pair of :class:`Recipe`, of the batch's global and of its local crops, on the host."""
        num_global = len(batch.global_crops)
        num_crops = num_global + len(batch.local_crops)
        return Packed.of(
            [
                recipe(
                    sample_params(
                        self.config, self.seed, batch.epoch, batch.samples, numbers, num_global
                    )
                )
                for numbers in (range(num_global), range(num_global, num_crops))
            ]
        )


@dataclass(frozen=True)
class AugmentParams:
    """Augmentation parameters of N crops.

    Attributes:
        flip: bool [N], left-right.
        order: int64 [N, 4], the operation (BRIGHTNESS ... HUE) that comes first, second, ...
        factors: float32 [N, 4], of brightness, contrast, saturation (1: unchanged), and the hue's
            shift in turns (0: unchanged).
        gray: bool [N].
        sigma: float32 [N], Pillow's blur radius in pixels; 0: none.
        solarize: bool [N].
        more: what is off unless asked for.
    """

    flip: NDArray[np.bool_]
    order: NDArray[np.int64]
    factors: NDArray[np.float32]
    gray: NDArray[np.bool_]
    sigma: NDArray[np.float32]
    solarize: NDArray[np.bool_]
    more: more.MoreParams = more.NOTHING


def sample_params(
    config: AugmentConfig,
    seed: int,
    epoch: int,
    samples: NDArray[np.int64],
    crops: Sequence[int],
    num_global: int,
) -> AugmentParams:
    """Draw the parameters of ``crops`` (numbers, globals first) of ``samples``; N = V*B."""
    numbers = np.asarray(crops, np.int64)  # without a dtype an empty list would be float
    u = random_uniforms(
        seed, AUGMENT_STREAM, epoch, samples[:, None], numbers[:, None, None], np.arange(14)
    ).reshape(-1, 14)
    kind = np.repeat(np.where(numbers >= num_global, 2, np.minimum(numbers, 1)), len(samples))
    strength = np.array(config.color_jitter)
    factors = np.array([1, 1, 1, 0]) + (2 * u[:, 2:6] - 1) * strength
    jitter = u[:, 1] < config.color_jitter_prob
    factors[~jitter] = (1, 1, 1, 0)
    low, high = config.blur_sigma
    blur = u[:, 11] < np.array(config.blur_prob)[kind]
    return AugmentParams(
        flip=u[:, 0] < config.flip_prob,
        order=np.argsort(u[:, 6:10], axis=1),
        factors=factors.astype(np.float32),
        gray=u[:, 10] < config.gray_prob,
        sigma=np.where(blur, low + u[:, 12] * (high - low), 0).astype(np.float32),
        solarize=u[:, 13] < np.array(config.solarize_prob)[kind],
        more=more.sample_params(config, seed, epoch, samples, numbers),
    )


Array = TypeVar("Array", NDArray, Tensor)


class Jitter(NamedTuple, Generic[Array]):
    """One of the four passes of color jitter over N crops; see :func:`blend`, :func:`shift_hue`.

    Attributes:
        mean, gray, image: float32 [N, 1, 1, 1], weight of each in the blend.
        hue: int64 [n], the crops whose hue is shifted in this pass.
        turns: float32 [n, 1, 1], the shift in sixths of a circle.
    """

    mean: Array
    gray: Array
    image: Array
    hue: Array
    turns: Array


class Recipe(NamedTuple, Generic[Array]):
    """Augmentation of N crops as the device applies it: numpy arrays on the host, then tensors.

    Attributes:
        flip, gray, blur, solarize: int64 [n], the crops that the operation changes.
        jitter: the four passes.
        boxes: float32 [n, 2R+2], running sums of the box filters of ``blur``.
        more: what is off unless asked for.
    """

    flip: Array
    jitter: list[Jitter[Array]]
    gray: Array
    blur: Array
    boxes: Array
    solarize: Array
    more: more.MoreRecipe[Array]


def recipe(params: AugmentParams) -> Recipe[NDArray]:
    """Which crops each operation changes, and by how much."""
    blur = np.flatnonzero(params.sigma)
    return Recipe(
        flip=np.flatnonzero(params.flip),
        jitter=jitter_passes(params.order, params.factors),
        gray=np.flatnonzero(params.gray),
        blur=blur,
        boxes=box_sums(params.sigma[blur]),
        solarize=np.flatnonzero(params.solarize),
        more=more.recipe(params.more),
    )


def jitter_passes(order: NDArray[np.int64], factors: NDArray[np.float32]) -> list[Jitter[NDArray]]:
    """Brightness, contrast, saturation and hue of each image in its own order, [N, 4] each.

    Four passes. The first three operations blend an image with black, its mean gray or its gray
    version, so a pass does them for all images at once, each with its own; hue goes separately.
    """
    passes = []
    for operation in order.T:
        factor = np.take_along_axis(factors, operation[:, None], 1)[:, 0]
        shift = np.where(operation == HUE, factor, 0)
        factor = np.where(operation == HUE, 1, factor)
        hue = np.flatnonzero(shift)
        with_mean, with_gray = operation == CONTRAST, operation == SATURATION
        passes.append(
            Jitter(
                mean=_column((1 - factor) * with_mean),
                gray=_column((1 - factor) * with_gray),
                image=_column(factor),
                hue=hue,
                turns=_column(6 * shift[hue])[:, 0],
            )
        )
    return passes


def apply(
    crops: Tensor,
    recipe: Recipe[Tensor],
    config: AugmentConfig,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[V, B, C, H, W] of any dtype and strides -> ``dtype`` [V*B, C, H, W], contiguous."""
    crops = crops.flatten(0, 1)
    if not len(crops):
        return crops.to(dtype)
    x = scaled(crops, *config.window_bounds)
    x = change(x, recipe.flip, lambda chosen: chosen.flip(-1))
    x = more.rotate(x, recipe.more)
    x = color_jitter(x, recipe.jitter)
    x = more.jitter_channels(x, recipe.more)
    x = change(x, recipe.gray, lambda chosen: grayscale(chosen).expand_as(chosen))
    x = change(x, recipe.blur, gaussian_blur, recipe.boxes)
    x = change(x, recipe.solarize, solarize)
    x = more.add_noise(x, recipe.more)
    mean, std = channel_constants(*config.normalization, x.device)
    x = more.drop_channels(x.sub_(mean).div_(std), recipe.more)
    return x.to(dtype)


def scaled(values: Tensor, low: Channels, high: Channels) -> Tensor:
    """[N, C, H, W] in the set's own units -> a new float32 tensor, contiguous: ``low`` becomes 0,
    ``high`` 1, and what lies beyond them is clipped."""
    layout = torch.contiguous_format
    x = values.to(torch.float32, memory_format=layout, copy=True)  # float32 crops lie in the ring
    if values.dtype == torch.uint8 and (low, high) == BYTES:
        return x.mul_(1 / 255)
    floor, ceiling = channel_constants(low, high, x.device)
    return x.sub_(floor).div_(ceiling - floor).clamp_(0, 1)


@cache
def channel_constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and std as float32 [1, C, 1, 1] on a device; cached, as every copy from pageable host
    memory waits for the device."""
    with torch.inference_mode(False):  # usable in training too
        both = torch.tensor((mean, std), device=device).view(2, 1, -1, 1, 1)
    return both[0], both[1]


def normalize(
    images: Tensor, mean: Channels, std: Channels, low: Channels = BYTES[0],
    high: Channels = BYTES[1],
) -> Tensor:  # fmt: skip
    """[B, C, H, W] in the set's own units -> float32 on its device: scaled as by :func:`scaled`,
    minus ``mean``, over ``std``."""
    center, scale = channel_constants(mean, std, images.device)
    if images.dtype == torch.uint8 and (low, high) == BYTES:
        return (images.float() - 255 * center) / (255 * scale)
    return scaled(images, low, high).sub_(center).div_(scale)


# --------------------------------------------- operations on float [N, C, H, W] with values in 0..1


def color_jitter(x: Tensor, passes: Sequence[Jitter[Tensor]]) -> Tensor:
    """The passes of :func:`jitter_passes`, one after the other."""
    for jitter in passes:
        x = blend(x, jitter.mean, jitter.gray, jitter.image)
        x = change(x, jitter.hue, shift_hue, jitter.turns)
    return x


def blend(x: Tensor, with_mean: Tensor, with_gray: Tensor, with_itself: Tensor) -> Tensor:
    """``factor * x + (1 - factor) * other``, clamped to 0..1 (Pillow's ImageEnhance).

    ``with_itself`` is the factor; 1 - factor is in ``with_mean`` where ``other`` is the mean
    gray level (contrast), in ``with_gray`` where it is the gray image (saturation), and in neither,
    where it is black (brightness); the rest is 0. [N, 1, 1, 1] each.
    """
    gray = grayscale(x)
    mean = gray.mean((2, 3), keepdim=True) * with_mean
    other = torch.addcmul(mean, gray, with_gray)
    return torch.addcmul(other, x, with_itself).clamp_(0, 1)


def grayscale(x: Tensor) -> Tensor:
    """Luma [N, 1, H, W]; of other than 3 channels their mean."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    r, g, b = x.split(1, 1)
    return (r * GRAY[0]).add_(g, alpha=GRAY[1]).add_(b, alpha=GRAY[2])


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue in HSV space by sixths of a circle, [N, 1, 1]; +-3 gives the complement.

    HSV to RGB in closed form: channel c is V - C max(0, min(k, 4 - k, 1)), k = (n_c + 6 H) mod 6
    with n = 5, 3, 1 for red, green, blue, value V and chroma C.
    """
    r, g, b = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    scale = chroma.clamp(min=1e-12).reciprocal_()
    from_red, from_green, from_blue = (g - b) * scale, (b - r) * scale + 2, (r - g) * scale + 4
    hue = from_blue.lerp_(from_green, (value == g).float()).lerp_(from_red, (value == r).float())
    hue.add_(turns)
    out = torch.empty_like(x)
    for channel, n in enumerate((5, 3, 1)):
        k = hue + n
        k.sub_(k.div(6).floor_(), alpha=6)
        share = torch.minimum(k, 4 - k).clamp_(0, 1)
        torch.addcmul(value, chroma, share, value=-1, out=out[:, channel])
    return out


def gaussian_blur(x: Tensor, boxes: Tensor) -> Tensor:
    """Pillow's GaussianBlur(radius=sigma): three box filters of that total variance.

    boxes: :func:`box_sums` of the images' sigmas. As matrix products, x -> F x F^T with F the
    banded matrix of one box filter, cubed: one kernel per image, edges
    replicated exactly as in Pillow, and far faster than grouped convolutions.
    """
    channels, height, width = x.shape[1:]
    rows = torch.linalg.matrix_power(_band(boxes, height), 3)
    columns = rows
    if height != width:
        columns = torch.linalg.matrix_power(_band(boxes, width), 3)
    x = (x.flatten(1, 2) @ columns.mT).unflatten(1, (channels, height)).mT  # [N, C, W, H]
    return (x.flatten(1, 2) @ rows.mT).unflatten(1, (channels, width)).mT


def box_sums(sigma: NDArray[np.float32]) -> NDArray[np.float32]:
    """Running sums [N, 2R+2] of the weights of :func:`extended_box`, from 0 to 1."""
    sums = np.cumsum(extended_box(sigma), 1)
    return np.pad(sums, ((0, 0), (1, 0))).astype(np.float32)


def extended_box(sigma: NDArray[np.float32]) -> NDArray[np.float64]:
    """Weights [N, 2R+1] of the box filters that, applied three times, have variance sigma^2.

    Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering"
    (SSVM 2011): a box of radius r = l + a has weight 1 out to l and a at l + 1, l an integer.
    """
    variance = sigma.astype(np.float64) ** 2 / 3  # of one of the three
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    radius = (whole + part / (6 * (variance - (whole + 1) ** 2)))[:, None]
    reach = int(np.ceil(radius.max(initial=0)))
    return np.clip(radius + 1 - abs(np.arange(-reach, reach + 1)), 0, 1) / (2 * radius + 1)


def solarize(x: Tensor) -> Tensor:
    """Invert the values from one half up."""
    return torch.addcmul(x, (x >= SOLARIZE_FROM).float(), 1 - 2 * x)


def _band(boxes: Tensor, size: int) -> Tensor:
    """[N, size, size]: row i holds the taps centered on column i, taps beyond an edge added to it.

    Differences of the taps' running sum, so that no two weights are added to one element.
    """
    taps = boxes.shape[1] - 1
    at = torch.arange(size, device=boxes.device)
    offset = at - at[:, None] + taps // 2
    upto, before = (offset + 1).clamp_(0, taps), offset.clamp_(0, taps)
    before[:, 0].fill_(0)
    upto[:, -1].fill_(taps)
    return boxes[:, upto] - boxes[:, before]


def _column(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """One value an image, [N, 1, 1, 1]."""
    return values.astype(np.float32).reshape(-1, 1, 1, 1)
