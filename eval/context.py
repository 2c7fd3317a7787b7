"""The evaluation context: image geometry, normalization, loader, device, precision.

:func:`make_context` resolves it once, in order of precedence: options, the network's own input
settings (:func:`resolve_input_settings`), the published protocol. It is used by every evaluation,
the online k-NN, supervised validation, teachers, attention maps and the report's pictures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xcit_dino.data.augment import normalize
from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.decode.native import read_native_header
from xcit_dino.data.decode.rgb import BadImage, read_header
from xcit_dino.data.io.storage import open_source
from xcit_dino.data.loader import ImageLoader
from xcit_dino.data.native.scaling import form_of, resolve_scaling
from xcit_dino.data.packed import to_device
from xcit_dino.data.pixels import RGB8, PixelFormat
from xcit_dino.data.shards.index import ShardIndex, resolve_split
from xcit_dino.errors import InputError, warn
from xcit_dino.eval.config import EvalTargetConfig
from xcit_dino.inputs import BYTES, InputSettings
from xcit_dino.models.weights.load import input_settings
from xcit_dino.models.zoo import TIMM_PREFIX, check_timm_name
from xcit_dino.options import options as options_of
from xcit_dino.options import read_yaml, replace
from xcit_dino.progress import progress
from xcit_dino.train.amp import autocast, resolve_precision
from xcit_dino.train.distributed import dist

INHERITED = (  # loader options inherited from the run
    "shard_url cache_dir cache_gb max_bad_fraction prefetch_factor shuffle_window decoder "
    "bands".split()
)
ENLARGED = 3  # upsampling factor from which a note is printed
SIZES_READ = 16  # images whose size is read for that


@dataclass(frozen=True)
class Context:
    """See the module's docstring."""

    inputs: InputSettings
    resize: int
    """Shorter side after resizing, in pixels."""
    crop: int
    """Side of the center crop, in pixels."""
    data_path: str
    loader: LoaderConfig
    batch_size: int
    """Images per batch of this process."""
    precision: str
    world: dist.World
    output_dir: Path
    form: PixelFormat = RGB8
    """What the images are, once ``--bands`` are picked."""
    notes: tuple[str, ...] = ()
    """How they are scaled, where that does not go without saying."""
    show_channels: tuple[int, ...] = ()
    """Channels shown as red, green and blue in pictures, numbered from 1."""
    colors: Any = None
    """The :class:`FalseColor` of pictures, where it is not found in the set."""

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def protocol(self) -> dict[str, Any]:
        """What affects the features of an image, apart from network and precision."""
        found = {
            "resize": self.resize,
            "crop": self.crop,
            "interpolation": self.inputs.interpolation,
            "mean": list(self.inputs.mean),
            "std": list(self.inputs.std),
        }
        if self.inputs.window != BYTES:
            found["window"] = [list(bounds) for bounds in self.inputs.window]
        if self.loader.bands:
            found["bands"] = list(self.loader.bands)
        return found

    def index(self, split: str) -> ShardIndex:
        """Open the shards of ``train`` or ``val``; prints a note if their images are small compared
        with the crop."""
        index = ShardIndex.load(resolve_split(self.data_path, split))
        self.check_form(index)
        if dist.is_main() and (text := self.upsampling_note(index)):
            print(text, flush=True)
        return index

    def check_form(self, index: ShardIndex) -> None:
        """Raise InputError where a split's images are of another kind than those that the scaling
        was resolved for."""
        found = index.pixels.select(self.loader.bands)
        if found.name != self.form.name:
            raise InputError(
                f"--data_path {index.root}: holds images of another kind ({found.name}) than the "
                f"other split ({self.form.name}); pack both with --pixels {self.form.name}"
            )

    def blank(self) -> Tensor:
        """float32 [1, C, crop, crop] of zeros on the device, to probe a network's output."""
        return torch.zeros(1, self.inputs.channels, self.crop, self.crop, device=self.device)

    def normalize(self, images: Tensor) -> Tensor:
        """[B, C, H, W] in the set's own units on any device -> normalized float32 on the context's
        device."""
        images = to_device(images, self.device)
        return normalize(images, self.inputs.mean, self.inputs.std, *self.inputs.window)

    def images(
        self,
        index: ShardIndex,
        samples: np.ndarray,
        batch_size: int | None = None,
        labeled: bool = True,
    ) -> ImageLoader:
        """Center crops of some samples, in the set's dtype; only labeled ones unless ``labeled`` is
        false."""
        return ImageLoader(
            index, self.loader, resize=self.resize, crop=self.crop,
            interpolation=self.inputs.interpolation, batch_size=batch_size or self.batch_size,
            indices=samples, labeled=labeled,
        )  # fmt: skip

    def batches(
        self,
        function: Callable[[Tensor], dict[str, Tensor]],
        index: ShardIndex,
        samples: np.ndarray,
        label: str,
        labeled: bool = True,
    ) -> Iterator[tuple[dict[str, Tensor], np.ndarray]]:
        """Apply a function to normalized images; yields its outputs (float32, on the device) and
        the sample numbers per batch, for the readable ones of ``samples``, with a progress bar."""
        dtype = resolve_precision(self.precision, self.device)
        with progress(label, len(samples), "images") as bar:
            for images, _, numbers in self.images(index, samples, labeled=labeled):
                with autocast(self.device, dtype):
                    outputs = function(self.normalize(images))
                yield {name: output.float() for name, output in outputs.items()}, numbers
                bar.advance(len(numbers))

    def upsampling_note(self, index: ShardIndex) -> str:
        """A note if images are upsampled by ``ENLARGED`` or more, else ""."""
        if not index.num_samples:
            return ""
        samples = np.unique(np.linspace(0, index.num_samples - 1, SIZES_READ).astype(int))
        source = open_source(index, self.loader)
        sides = []
        for image in source.read_many([index.locate(int(sample)) for sample in samples]):
            try:
                if isinstance(image, bytes):
                    rgb8 = index.pixels.is_rgb8
                    header = read_header(image) if rgb8 else read_native_header(image, index.pixels)
                    sides.append(min(header.height, header.width))
            except BadImage:
                continue
        side = int(np.median(sides)) if sides else self.resize
        if self.resize < ENLARGED * side:
            return ""
        return (
            f"{index.root}: images of about {side} px are upsampled "
            f"{self.resize / side:.0f} times, to {self.resize} px, as the network uses crops of "
            f"{self.crop}; "
            f"--crop_size {side} keeps their size"
        )


def make_context(
    options: EvalTargetConfig,
    settings: InputSettings | None,
    run: Mapping[str, Any],
    data_path: str | Path,
    world: dist.World,
) -> Context:
    """Make the context of an evaluation.

    Args:
        options: of the command; they take precedence.
        settings: the network's own; None: not known.
        run: options of the run whose data and loader are used; may be empty.

    Raises:
        InputError: images of other channels than the network takes.
    """
    loader = resolve_loader(options, run, data_path)
    notes = []
    if not loader.bands and settings is not None and settings.bands:
        loader, line = with_bands(loader, settings, form_of(data_path))
        notes = [line]
    form = form_of(data_path, loader.bands)
    if form is not None and settings is not None:
        check_channels(settings.channels, form)
    known_form = form is not None
    form = form or PixelFormat(settings.channels if settings else 3)
    same_data = not known_form or same_path(run.get("data_path"), data_path)
    scaling = resolve_scaling(options, form, settings, same_data=same_data)
    given = {"interpolation": options.interpolation, "size": options.crop_size or None}
    resolved: dict[str, Any] = vars(settings or InputSettings()) | scaling.settings
    resolved |= {name: value for name, value in given.items() if value is not None}
    resolved["bands"] = loader.bands
    inputs = InputSettings(**resolved)
    resize = options.resize_size if options.resize_size != -1 else inputs.resize
    return Context(
        inputs, resize, inputs.crop, str(data_path), loader, options.batch_size_per_gpu,
        options.precision, world, options.output_dir, form, (*notes, *scaling.lines),
    )  # fmt: skip


def with_bands(
    loader: LoaderConfig, settings: InputSettings, form: PixelFormat | None
) -> tuple[LoaderConfig, str]:
    """The bands that a network was trained on, where no option names others, and a line on them;
    images that lack them are taken for those bands themselves.

    form: of the images, all channels; None: not known.
    """
    words = " ".join(map(str, settings.bands))
    if form is not None and (form.is_rgb8 or form.channels < max(settings.bands)):
        line = f"the weights were trained with --bands {words}: the images are taken for these"
        return loader, line
    line = f"bands {words} of the images are read, as the weights were trained"
    return replace(loader, {"bands": settings.bands}, source="the weights"), line


def check_channels(channels: int, form: PixelFormat) -> None:
    """Raise InputError where a network takes another number of channels than images have."""
    if channels == form.channels:
        return
    if form.is_rgb8:
        raise InputError(
            f"--arch: the network expects {channels} channels, and shards are RGB images; "
            "name weights for 3 channels"
        )
    pick = f", or pick {channels} channels with --bands" if channels < form.channels else ""
    raise InputError(
        f"--pretrained_weights: the network takes {channels} channels, and the images have "
        f"{form.channels} ({form.name}); name weights for {form.channels} channels{pick}"
    )


def resolve_loader(
    options: EvalTargetConfig, run: Mapping[str, Any], data_path: str | Path
) -> LoaderConfig:
    """Loader options: those given, then the run's. The run's ``shard_url`` applies only to the
    run's own data."""
    defaults = {name: run[name] for name in INHERITED if run.get(name) is not None}
    if not same_path(run.get("data_path"), data_path):
        defaults.pop("shard_url", None)
    given = {name: value for name, value in options_of(options) if name in INHERITED}
    defaults |= {name: value for name, value in given.items() if value is not None}
    defaults["num_workers"] = options.num_workers
    return replace(LoaderConfig(), defaults, source="config.yaml")


def same_path(run: Any, given: str | Path) -> bool:
    """Whether two data paths are the same."""
    return run is not None and os.path.abspath(str(run)) == os.path.abspath(str(given))


# -- the network's own settings


def resolve_input_settings(
    arch: str, weights: Path | None, which: str | None = None, run: Mapping[str, Any] | None = None
) -> InputSettings:
    """:func:`known_settings`; where nothing says them, those of the published XCiTs."""
    return known_settings(arch, weights, which, run) or InputSettings()


def known_settings(
    arch: str, weights: Path | None, which: str | None = None, run: Mapping[str, Any] | None = None
) -> InputSettings | None:
    """Input settings of a network: from its file, from the run folder that contains the file, from
    the run (if it has this architecture), from timm; else None.

    Args:
        arch: name of the architecture, ``timm/NAME`` for timm's.
        weights: the file; None: the run's own network.
        which: network of the file.
        run: options of the evaluated run folder.
    """
    found = None
    if weights is not None:
        found = input_settings(weights, which)
        if found is None and which != "teacher":
            found = InputSettings.from_run(run_options(weights.parent.parent))
    if found is None and run and run.get("arch") == arch:
        found = InputSettings.from_run(run)
    return found or timm_input_settings(arch)


def timm_input_settings(arch: str) -> InputSettings | None:
    """Input settings of timm's own weights of that name; None for other names."""
    if not arch.startswith(TIMM_PREFIX):
        return None
    import timm

    check_timm_name(arch.removeprefix(TIMM_PREFIX), f"arch {arch}")
    defaults = timm.get_pretrained_cfg(arch.removeprefix(TIMM_PREFIX), allow_unregistered=True)
    return defaults and settings_of_timm(defaults.to_dict(), arch)


def settings_of_timm(config: Mapping[str, Any], name: str) -> InputSettings:
    """Input settings in a ``pretrained_cfg`` of timm; warns where ours differ.

    name: of the network, for the warning.
    """
    kinds, given, mode = ("bicubic", "bilinear"), config["interpolation"], config["crop_mode"]
    interpolation = given if given in kinds else "bicubic"
    if (given, mode) != (interpolation, "center") and dist.is_main():
        warn(
            f"{name}: timm prepares images by {given} resizing and crop mode {mode}; here it is "
            f"{interpolation} and center"
        )
    return InputSettings(
        size=config["input_size"][-1],
        crop_ratio=config["crop_pct"],
        interpolation=interpolation,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        channels=config["input_size"][0],
    )


def run_options(folder: Path) -> dict[str, Any]:
    """Options of a run folder's ``config.yaml``; empty if there is none."""
    path = folder / "config.yaml"
    return read_yaml(path) if path.is_file() else {}
