"""Dense features: a backbone's patch tokens or feature maps on a grid, of any layer and image size.

A *tap* is a layer by its number: of XCiT and ViTs a block, counted from 0; of a convolutional
network a stage; -1 is the output: of XCiT and ViTs the patch tokens after the last norm.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit_dino.errors import InputError, one_line
from xcit_dino.models.tokens import stride_of
from xcit_dino.models.xcit import XCiT

OUTPUT = -1
SHARES = (1 / 3, 1 / 2, 2 / 3, 1)  # of the depth: XCiT's taps, 3 5 7 11 of 12 and 7 11 15 23 of 24


def num_layers(backbone: nn.Module) -> int:
    """Number of taps beside the output."""
    if isinstance(backbone, XCiT):
        return len(backbone.blocks)
    info: Any = getattr(backbone, "feature_info", None) or ()
    return len(info)


def pyramid_taps(backbone: nn.Module) -> tuple[int, ...]:
    """Four taps for pyramids: XCiT's published ones, and at the same depths of other networks of
    one resolution; of convolutional networks the last four stages."""
    info: Any = getattr(backbone, "feature_info", None) or ()
    depth = num_layers(backbone)
    if not isinstance(backbone, XCiT) and len({stage["reduction"] for stage in info}) > 1:
        return tuple(range(max(0, depth - 4), depth))
    return tuple(max(0, round(depth * share) - 1) for share in SHARES)


def feature_maps(backbone: nn.Module, images: Tensor, taps: Sequence[int]) -> list[Tensor]:
    """Images (B, C, H, W), H and W divisible by the patch size -> a map (B, D, h, w) of each tap.

    Raises:
        InputError: no such layer, or a network that has no maps.
    """
    depth = num_layers(backbone)
    for tap in taps:
        if not OUTPUT <= tap < max(depth, 1):
            raise InputError(
                f"--taps {tap}: {type(backbone).__name__} has layers 0 to {depth - 1}, and -1 for "
                "its output"
            )
    if isinstance(backbone, XCiT):
        return _xcit_maps(backbone, images, taps)
    if not hasattr(backbone, "forward_intermediates"):
        raise InputError(f"--arch: {type(backbone).__name__} gives no maps of its layers")
    wanted = sorted({tap % depth for tap in taps})
    # the norm after the last layer belongs to the output alone
    maps: dict[int, Tensor] = {}
    for norm in {tap == OUTPUT for tap in taps}:
        found: Any = backbone.forward_intermediates(  # type: ignore[operator]
            images, indices=wanted, norm=norm, intermediates_only=True, output_fmt="NCHW"
        )
        chosen = zip(wanted, found, strict=True)
        maps |= {OUTPUT: found[-1]} if norm else dict(chosen)
    return [maps[tap] for tap in taps]


def _xcit_maps(backbone: XCiT, images: Tensor, taps: Sequence[int]) -> list[Tensor]:
    maps = backbone.block_maps(images, [tap for tap in taps if tap != OUTPUT])
    if OUTPUT in taps:
        tokens = backbone.forward_features(images)[:, 1:]
        columns = images.shape[-1] // backbone.patch_size
        maps[OUTPUT] = tokens.unflatten(1, (-1, columns)).permute(0, 3, 1, 2)
    return [maps[tap] for tap in taps]


def padded_to(images: Tensor, multiple: int) -> Tensor:
    """Images whose sides are whole multiples: the last rows and columns are repeated."""
    height, width = images.shape[-2:]
    extra = (0, -width % multiple, 0, -height % multiple)
    return F.pad(images, extra, mode="replicate") if any(extra) else images


def grid_features(backbone: nn.Module, images: Tensor, tap: int = OUTPUT) -> Tensor:
    """Features of images of any size (B, C, H, W) on a grid: (B, h, w, D); a side that is no
    multiple of the patch size is padded, so that h = ceil(H / patch)."""
    (found,) = feature_maps(backbone, padded_to(images, stride_of(backbone)), [tap])
    return found.permute(0, 2, 3, 1)


@torch.no_grad()
def probe_grid(backbone: nn.Module, tap: int, arch: str, images: Tensor) -> tuple[int, int]:
    """(Stride in pixels, D) of :func:`grid_features`, found with images whose sides are whole
    patches.

    Raises:
        InputError: no such layer, or a network that does not accept images of that size.
    """
    if not OUTPUT <= tap < max(depth := num_layers(backbone), 1):
        raise InputError(f"--tap {tap}: {arch} has layers 0 to {depth - 1}, and -1 for its output")
    height, width = images.shape[-2:]
    try:
        found = grid_features(backbone, images, tap)
    except InputError:
        raise
    except Exception as error:  # networks raise different types
        raise InputError(
            f"--arch {arch}: does not accept images of {width} x {height} pixels "
            f"({one_line(error, 120)}); take another --arch"
        ) from error
    return height // found.shape[1], found.shape[-1]


@torch.no_grad()
def map_sizes(
    backbone: nn.Module, taps: Sequence[int], size: int, channels: int
) -> list[tuple[int, int]]:
    """(D, stride in pixels) of each tap, found with black images of ``size`` pixels; the backbone
    is left as it is.

    Raises:
        InputError: images of that size do not fit.
    """
    modes = [(module, module.training) for module in backbone.modules()]
    weight = next(backbone.parameters())
    try:
        maps = feature_maps(backbone.eval(), weight.new_zeros(1, channels, size, size), taps)
    except InputError:
        raise
    except Exception as error:  # networks raise different types
        raise InputError(
            f"--arch: {type(backbone).__name__} does not accept images of {size} x {size} pixels "
            f"({one_line(error, 120)})"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    return [(found.shape[1], size // found.shape[-1]) for found in maps]


class Pyramid(nn.Module):
    """Four maps of one resolution -> maps of strides 4, 8, 16 and 32 (XCiT's
    ``detection/backbone/xcit.py``): upwards by transposed convolutions, downwards by max-pooling.

    Names of the parameters are the official ones (fpn1 ... fpn4).

    Args:
        dim: channels of every map.
        stride: of the maps in pixels, 4, 8, 16 or 32.
    """

    strides = (4, 8, 16, 32)

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        for number, wanted in enumerate(self.strides, start=1):
            self.add_module(f"fpn{number}", _rescaled(dim, stride / wanted))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """(B, D, h, w) four times -> the same of strides 4, 8, 16, 32."""
        return [level(x) for level, x in zip(self.children(), maps, strict=True)]


def pyramid_of(sizes: Sequence[tuple[int, int]]) -> nn.Module:
    """What makes a pyramid of four maps with these (D, stride): nothing where their strides already
    go from fine to coarse.

    Raises:
        InputError: they do not, or are not four.
    """
    strides = [stride for _, stride in sizes]
    if len(sizes) != len(Pyramid.strides):
        raise InputError(f"--taps: a pyramid takes four layers, not {len(sizes)}")
    if len(set(sizes)) == 1:
        return Pyramid(*sizes[0])
    if strides != sorted(strides):
        raise InputError(f"--taps: strides {strides} do not go from fine to coarse")
    return nn.Identity()


class TappedBackbone(nn.Module):
    """A backbone that supplies maps; networks for dense tasks add what uses them.

    Args:
        taps: layers, see the module's docstring.
        frozen: the backbone is not trained; its batch-norms keep their statistics and drop-path is
            off.
        pyramid: what the maps go through: a :class:`Pyramid`, or nothing.
    """

    def __init__(
        self, backbone: nn.Module, taps: Sequence[int], frozen: bool, pyramid: nn.Module
    ) -> None:
        super().__init__()
        self.backbone, self.pyramid = backbone, pyramid
        self.taps, self.frozen = tuple(taps), frozen
        if frozen:
            backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def maps(self, images: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> (B, D, h, w) of every tap."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = feature_maps(self.backbone, images, self.taps)
        return self.pyramid(maps)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more dimensions exempt from weight decay."""
        spared = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in spared}


def freeze_unused(network: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
    """Exclude parameters from training that a loss does not depend on, such as those of the class
    token and of the last norm: processes would wait for their gradients.

    loss: of a copy of the network, whose statistics it may change.
    """
    trial = copy.deepcopy(network).train()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        loss(trial).backward()
    used = {name for name, p in trial.named_parameters() if p.grad is not None}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in used)


def _rescaled(dim: int, factor: float) -> nn.Module:
    """A module that makes a map larger by ``factor``, a power of 2."""
    steps = round(math.log2(factor))
    if 2.0**steps != factor:
        raise InputError(f"--arch: maps of stride {4 * factor:g} do not fit a pyramid")
    if steps == 0:
        return nn.Identity()
    if steps < 0:
        return nn.MaxPool2d(2**-steps, 2**-steps)
    layers: list[nn.Module] = []
    for step in range(steps):
        if step:
            layers += [nn.BatchNorm2d(dim), nn.GELU()]
        layers.append(nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2))
    return nn.Sequential(*layers)
