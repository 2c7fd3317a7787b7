"""Augmentation beyond DINO's, all off by default: quarter turns, brightness and contrast of single
channels, noise, dropped channels.

Made for images from above, from microscopes and from sensors; any number of channels. Random
choices come from a stream of their own, so that DINO's stay as they are; the noise itself is drawn
on the device, as a function of (crop, pixel) alone.

Shapes: N crops of C channels; n of them that an operation changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcit_dino.data.config import AugmentConfig
from xcit_dino.data.rng import random_bits, random_uniforms

STREAM = 14
SINGLE = 5  # uniform numbers of a crop, before those of its channels
NOISE_KEY = 1 << 20
MASK = 0xFFFFFFFF

Array = TypeVar("Array", NDArray, Tensor)


@dataclass(frozen=True)
class MoreParams:
    """Parameters of N crops.

    Attributes:
        turns: int64 [N], quarter turns to the left, 0 to 3.
        factors: float32 [N, C, 2], of brightness and contrast of each channel; 1: unchanged.
        noise: float32 [N], standard deviation; 0: none.
        seeds: int64 [N], 32 bits, of the noise.
        dropped: bool [N, C].
    """

    turns: NDArray[np.int64]
    factors: NDArray[np.float32]
    noise: NDArray[np.float32]
    seeds: NDArray[np.int64]
    dropped: NDArray[np.bool_]


NOTHING = MoreParams(
    np.zeros(0, np.int64),
    np.ones((0, 1, 2), np.float32),
    np.zeros(0, np.float32),
    np.zeros(0, np.int64),
    np.zeros((0, 1), np.bool_),
)


def sample_params(
    config: AugmentConfig,
    seed: int,
    epoch: int,
    samples: NDArray[np.int64],
    numbers: NDArray[np.int64],
) -> MoreParams:
    """Draw the parameters of the crops ``numbers`` of ``samples``, crop-major; NOTHING where all is
    off."""
    on = (config.rot90_prob, config.noise_prob, config.channel_drop_prob, *config.channel_jitter)
    if not any(on):
        return NOTHING
    C, keys = config.channels, (seed, STREAM, epoch, samples[:, None], numbers[:, None, None])
    u = random_uniforms(*keys, np.arange(SINGLE + 3 * C)).reshape(-1, SINGLE + 3 * C)
    by_channel = u[:, SINGLE:].reshape(-1, 3, C)
    factors = 1 + (2 * by_channel[:, :2] - 1) * np.array(config.channel_jitter)[:, None]
    factors[u[:, 2] >= config.color_jitter_prob] = 1
    drawn = by_channel[:, 2]
    dropped = drawn < config.channel_drop_prob
    dropped[np.arange(len(u)), drawn.argmax(1)] = False  # one always stays
    return MoreParams(
        turns=np.where(u[:, 0] < config.rot90_prob, 1 + (3 * u[:, 1]).astype(np.int64), 0),
        factors=factors.transpose(0, 2, 1).astype(np.float32),
        noise=np.where(u[:, 3] < config.noise_prob, u[:, 4] * config.noise_std, 0).astype(
            np.float32
        ),
        seeds=(random_bits(*keys, NOISE_KEY).reshape(-1) & np.uint64(MASK)).astype(np.int64),
        dropped=dropped,
    )


class MoreRecipe(NamedTuple, Generic[Array]):
    """What the device applies: numpy arrays on the host, then tensors.

    Attributes:
        turned: int64 [n], the crops turned to the left by one, two and three quarters.
        jittered: int64 [n], with float32 [n, C, 1, 1] ``brightness`` and ``contrast``.
        noisy: int64 [n], with float32 [n, 1, 1, 1] ``noise`` and int64 ``seeds``.
        thinned: int64 [n], with float32 [n, C, 1, 1] ``kept``, 1 or 0.
    """

    turned: list[Array]
    jittered: Array
    brightness: Array
    contrast: Array
    noisy: Array
    noise: Array
    seeds: Array
    thinned: Array
    kept: Array


def recipe(params: MoreParams) -> MoreRecipe[NDArray]:
    """Which crops each operation changes, and by how much."""
    jittered = np.flatnonzero((params.factors != 1).any((1, 2)))
    noisy = np.flatnonzero(params.noise)
    thinned = np.flatnonzero(params.dropped.any(1))
    factors = params.factors[jittered][..., None, None]
    return MoreRecipe(
        turned=[np.flatnonzero(params.turns == quarter) for quarter in (1, 2, 3)],
        jittered=jittered,
        brightness=factors[:, :, 0],
        contrast=factors[:, :, 1],
        noisy=noisy,
        noise=params.noise[noisy].reshape(-1, 1, 1, 1),
        seeds=params.seeds[noisy].reshape(-1, 1, 1, 1),
        thinned=thinned,
        kept=(~params.dropped[thinned]).astype(np.float32)[..., None, None],
    )


# ----------------------------------- operations on float [N, C, H, W]; values in 0..1 but the last


def rotate(x: Tensor, recipe: MoreRecipe[Tensor]) -> Tensor:
    """Quarter turns of square crops, in place."""
    for quarters, where in enumerate(recipe.turned, start=1):
        x = change(x, where, lambda chosen, k=quarters: chosen.rot90(k, (-2, -1)))
    return x


def jitter_channels(x: Tensor, recipe: MoreRecipe[Tensor]) -> Tensor:
    """Brightness, then contrast to its own mean, of each channel; in place."""
    return change(x, recipe.jittered, _jitter, recipe.brightness, recipe.contrast)


def _jitter(x: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
    x = (x * brightness).clamp_(0, 1)
    mean = x.mean((2, 3), keepdim=True)
    return torch.addcmul(mean * (1 - contrast), x, contrast).clamp_(0, 1)


def add_noise(x: Tensor, recipe: MoreRecipe[Tensor]) -> Tensor:
    """Gaussian noise, clipped to 0..1; in place."""
    return change(x, recipe.noisy, _add_noise, recipe.noise, recipe.seeds)


def _add_noise(x: Tensor, std: Tensor, seeds: Tensor) -> Tensor:
    return torch.addcmul(x, normals(seeds, x.shape[1:]), std).clamp_(0, 1)


def drop_channels(x: Tensor, recipe: MoreRecipe[Tensor]) -> Tensor:
    """Channels of normalized crops become 0, their mean; in place."""
    return change(x, recipe.thinned, torch.mul, recipe.kept)


def normals(seeds: Tensor, shape: torch.Size) -> Tensor:
    """float32 [n, C, H, W] of standard normal numbers, from seeds int64 [n, 1, 1, 1] of 32 bits: a
    pure function of seed and place (Box-Muller)."""
    place = torch.arange(math.prod(shape), device=seeds.device).view(shape)
    first = hash32(hash32(place) ^ seeds)
    second = hash32(first ^ MASK)
    radius = ((first >> 8) + 1).float().mul_(2.0**-24).log_().mul_(-2).sqrt_()
    return radius.mul_((second >> 8).float().mul_(2 * math.pi * 2.0**-24).cos_())


def hash32(x: Tensor) -> Tensor:
    """A bijection of the 32-bit integers (in int64) that scatters them: xorshift and multiply,
    https://stackoverflow.com/a/12996028."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & MASK
    return (x >> 16) ^ x


def change(x: Tensor, where: Tensor, operation: Callable[..., Tensor], *amount: Tensor) -> Tensor:
    """Apply an operation in place to the images ``where`` (int64 [n]); ``amount``: a row for each.

    Their number is known on the host, so no image is computed needlessly and nothing waits for the
    device. (``torch.where`` would compute all, and is 30 times slower than an addition on CPUs.)
    """
    if len(where):
        x.index_copy_(0, where, operation(x.index_select(0, where), *amount))
    return x
