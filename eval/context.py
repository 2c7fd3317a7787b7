"""How images reach a network in an evaluation: geometry, normalisation, loader, device, precision.

:func:`make_context` fills it once, from what knows best: options, then the network's own input
settings (:func:`settings_of`), then the published protocol. Every evaluation works with it, the
on-line k-NN, supervised validation, teachers, attention maps and the report's pictures too.
"""

from __future__ import annotations

import math
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
from xcit_dino.data.decode import BadImage, read_header
from xcit_dino.data.io.storage import open_source
from xcit_dino.data.loader import ImageLoader
from xcit_dino.data.shards.index import ShardIndex, resolve_split
from xcit_dino.errors import InputError, warn
from xcit_dino.eval.config import EvalTargetConfig
from xcit_dino.inputs import InputSettings
from xcit_dino.models.weights.load import input_settings
from xcit_dino.models.zoo import TIMM_PREFIX, check_timm_name
from xcit_dino.options import options as options_of
from xcit_dino.options import read_yaml, replace
from xcit_dino.progress import progress
from xcit_dino.train.amp import autocast, resolve_precision
from xcit_dino.train.distributed import dist

PROTOCOL_CROP, PROTOCOL_RESIZE = 224, 256  # DINO eval_knn.py, eval_linear.py
WHOLE = 64  # images up to this side are seen whole
INHERITED = (  # loader options that an evaluation takes from the run
    "shard_url cache_dir cache_gb max_bad_fraction prefetch_factor shuffle_window decoder".split()
)
ENLARGED = 3  # times, from which on it is said
LOOKED_AT = 16  # images whose size is looked at


@dataclass(frozen=True)
class Context:
    """See the module's docstring."""

    inputs: InputSettings
    resize: int
    """Shorter side after resizing, in pixels."""
    crop: int
    """Side of the centre crop, in pixels."""
    data_path: str
    loader: LoaderConfig
    batch_size: int
    """Images of a batch of this process."""
    precision: str
    world: dist.World
    output_dir: Path

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def protocol(self) -> dict[str, Any]:
        """What bears on the features of an image, beside the network and the arithmetic."""
        return {
            "resize": self.resize,
            "crop": self.crop,
            "interpolation": self.inputs.interpolation,
            "mean": list(self.inputs.mean),
            "std": list(self.inputs.std),
        }

    def index(self, split: str) -> ShardIndex:
        """Opened shards of ``train`` or ``val``; says so where their images are small beside the
        crop."""
        index = ShardIndex.load(resolve_split(self.data_path, split))
        if dist.is_main() and (text := self.enlargement(index)):
            print(text, flush=True)
        return index

    def blank(self) -> Tensor:
        """float32 [1, C, crop, crop] of zeros on the device, to see what a network gives."""
        return torch.zeros(1, self.inputs.channels, self.crop, self.crop, device=self.device)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] anywhere -> float32 on the device, as the network expects it."""
        images = images.to(self.device, non_blocking=True)
        return normalize(images, self.inputs.mean, self.inputs.std)

    def images(
        self,
        index: ShardIndex,
        samples: np.ndarray,
        batch_size: int | None = None,
        labelled: bool = True,
    ) -> ImageLoader:
        """Centre views (uint8) of some samples, those with a label unless ``labelled`` is false."""
        return ImageLoader(
            index, self.loader, resize=self.resize, crop=self.crop,
            interpolation=self.inputs.interpolation, batch_size=batch_size or self.batch_size,
            indices=samples, labelled=labelled,
        )  # fmt: skip

    def batches(
        self,
        function: Callable[[Tensor], dict[str, Tensor]],
        index: ShardIndex,
        samples: np.ndarray,
        label: str,
        labelled: bool = True,
    ) -> Iterator[tuple[dict[str, Tensor], np.ndarray]]:
        """What a function of normalised images gives (as float32, on the device), and the sample
        numbers: the readable ones of ``samples``, a batch at a time, with a progress bar."""
        dtype = resolve_precision(self.precision, self.device)
        with progress(label, len(samples), "images") as bar:
            for images, _, numbers in self.images(index, samples, labelled=labelled):
                with autocast(self.device, dtype):
                    outputs = function(self.normalize(images))
                yield {name: output.float() for name, output in outputs.items()}, numbers
                bar.advance(len(numbers))

    def enlargement(self, index: ShardIndex) -> str:
        """A line where images are enlarged several times; "" where they are not."""
        if not index.num_samples:
            return ""
        samples = np.unique(np.linspace(0, index.num_samples - 1, LOOKED_AT).astype(int))
        source = open_source(index, self.loader)
        sides = []
        for image in source.read_many([index.locate(int(sample)) for sample in samples]):
            try:
                if isinstance(image, bytes):
                    header = read_header(image)
                    sides.append(min(header.height, header.width))
            except BadImage:
                continue
        side = int(np.median(sides)) if sides else self.resize
        if self.resize < ENLARGED * side:
            return ""
        return (
            f"{index.root}: images of about {side} px are enlarged {self.resize / side:.0f} times, "
            f"to {self.resize} px, as the network takes crops of {self.crop}; "
            f"--crop_size {side} takes them as they are"
        )


def make_context(
    options: EvalTargetConfig,
    settings: InputSettings,
    run: Mapping[str, Any],
    data_path: str | Path,
    world: dist.World,
) -> Context:
    """The context of an evaluation.

    Args:
        options: of the command; what they give wins.
        settings: the network's own.
        run: options of the run that the data and their loader belong to; may be empty.

    Raises:
        InputError: a network that takes no RGB images.
    """
    given = {
        "mean": options.mean,
        "std": options.std,
        "interpolation": options.interpolation,
        "size": options.crop_size or None,
    }
    inputs = InputSettings(
        **vars(settings) | {name: value for name, value in given.items() if value is not None}
    )
    if inputs.channels != 3:
        raise InputError(
            f"--arch: the network takes {inputs.channels} channels, and shards hold RGB images; "
            "name weights for 3 channels"
        )
    crop = inputs.size or PROTOCOL_CROP
    resize = options.resize_size if options.resize_size != -1 else resize_of(inputs)
    return Context(
        inputs, resize, crop, str(data_path), loader_of(options, run, data_path),
        options.batch_size_per_gpu, options.precision, world, options.output_dir,
    )  # fmt: skip


def resize_of(inputs: InputSettings) -> int:
    """Shorter side after resizing, for a centre crop of ``inputs.size``.

    The network's own ratio, rounded down as timm does; the protocol's 256 / 224 where it has none.
    Then, up to 64 px, the whole image is kept: a margin of an eighth, harmless in a photograph,
    would cut into the object of a small image.
    """
    crop = inputs.size or PROTOCOL_CROP
    if inputs.crop_ratio is not None:
        return math.floor(crop / inputs.crop_ratio + 1e-9)
    return crop if crop <= WHOLE else round(crop * PROTOCOL_RESIZE / PROTOCOL_CROP)


def loader_of(
    options: EvalTargetConfig, run: Mapping[str, Any], data_path: str | Path
) -> LoaderConfig:
    """The data plane's options: those given, then the run's. Its ``shard_url`` belongs to its own
    data, and no other."""
    known = {name: run[name] for name in INHERITED if run.get(name) is not None}
    if not same_place(run.get("data_path"), data_path):
        known.pop("shard_url", None)
    given = {name: value for name, value in options_of(options) if name in INHERITED}
    known |= {name: value for name, value in given.items() if value is not None}
    known["num_workers"] = options.num_workers
    return replace(LoaderConfig(), known, source="config.yaml")


def same_place(run: Any, given: str | Path) -> bool:
    """Whether two data paths are one."""
    return run is not None and os.path.abspath(str(run)) == os.path.abspath(str(given))


# -- the network's own settings


def settings_of(
    arch: str, weights: Path | None, which: str | None = None, run: Mapping[str, Any] | None = None
) -> InputSettings:
    """How images are prepared for a network: as its file says, the run folder that the file lies
    in, the run (where it has this architecture), timm's table; else as for the published XCiTs.

    Args:
        arch: name of the architecture, ``timm/NAME`` for timm's.
        weights: the file; None: the run's own network.
        which: network of the file.
        run: options of the run folder that is evaluated.
    """
    found = None
    if weights is not None:
        found = input_settings(weights, which)
        if found is None and which != "teacher":
            found = InputSettings.of_run(run_options(weights.parent.parent))
    if found is None and run and run.get("arch") == arch:
        found = InputSettings.of_run(run)
    return found or of_timm(arch) or InputSettings()


def of_timm(arch: str) -> InputSettings | None:
    """What timm knows of its own weights of that name; None for other names."""
    if not arch.startswith(TIMM_PREFIX):
        return None
    import timm

    check_timm_name(arch.removeprefix(TIMM_PREFIX), f"arch {arch}")
    known = timm.get_pretrained_cfg(arch.removeprefix(TIMM_PREFIX), allow_unregistered=True)
    if known is None:
        return None
    kinds = ("bicubic", "bilinear")
    interpolation = known.interpolation if known.interpolation in kinds else "bicubic"
    if (known.interpolation, known.crop_mode) != (interpolation, "center") and dist.is_main():
        warn(
            f"{arch}: timm prepares images by {known.interpolation} resizing and crop mode "
            f"{known.crop_mode}; here it is {interpolation} and center"
        )
    return InputSettings(
        size=known.input_size[-1],
        crop_ratio=known.crop_pct,
        interpolation=interpolation,
        mean=tuple(known.mean),
        std=tuple(known.std),
        channels=known.input_size[0],
    )


def run_options(folder: Path) -> dict[str, Any]:
    """The options of a run folder's ``config.yaml``; empty where there is none."""
    path = folder / "config.yaml"
    return read_yaml(path) if path.is_file() else {}
