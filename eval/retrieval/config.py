"""Options of near-duplicates and retrieval; free of torch, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from xcit_dino.errors import InputError, within
from xcit_dino.eval.config import EvalTargetConfig, NetworkName
from xcit_dino.inputs import check_window
from xcit_dino.train.config import Device


@dataclass(frozen=True)
class DuplicatesConfig:
    """Near-duplicates inside a set of images, leaks between train and val, and outliers:
    duplicates.csv (for `shards make --exclude`), pairs.csv, outliers.csv and pictures."""

    dst: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[DST]")] = None
    """Folder to write. Default: duplicates in the run folder."""
    target: EvalTargetConfig = field(default_factory=EvalTargetConfig)
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")
    """Splits to compare, with themselves and with each other."""
    threshold: float = 0.94
    """Correlation of two images' thumbnails from which they are near-duplicates; 1: equal."""
    outliers: int = 100
    """Images listed as outliers: those least similar to their nearest neighbors; 0: none."""
    examples: int = 16
    """Pairs and outliers in the pictures; 0: no pictures."""

    def __post_init__(self) -> None:
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise InputError("--splits: name train, val or both, each once")
        if self.target.baselines:
            raise InputError(
                "--baselines: near-duplicates are those of one network; evaluate them by knn or "
                "linear, or leave it out"
            )
        within(self, 0.5, 1, "threshold")
        within(self, 0, 1e9, "outliers")
        within(self, 0, 200, "examples")


@dataclass(frozen=True)
class RetrieveConfig:
    """Image retrieval and copy detection: for each query the most similar images of a bank, as
    neighbors.csv and a picture; mAP where it is known what is relevant."""

    output_dir: Path = Path("runs/default")
    """The run folder: provides defaults for arch and weights; results.json and the neighbors (in
    retrieve/) are written there."""
    bank: Path | None = None
    """Images to search: Oxford or Paris revisited (the folder with gnd_*.pkl and jpg), Copydays
    (original, strong, jpegqual, crops), or any folder, searched deeply."""
    queries: Path | None = None
    """Folder of images to search for. Default: each image of the bank, among the others."""
    relevant: Path | None = None
    """Table with columns query and image: which images a query should find, as paths within their
    folders. Default: those in a folder of the same name, where there are such."""
    distractors: Path | None = None
    """Folder of further images in the bank, relevant to no query."""
    pretrained_weights: Path | None = None
    """A file of any kind that `weights` reads, or a run folder. Default: the run's newest
    checkpoint."""
    checkpoint_key: NetworkName | None = None
    """Network of a checkpoint. Default: the teacher of a DINO checkpoint, else the only one."""
    arch: str | None = None
    """Model name. Default: the run's."""
    image_size: int = 224
    """Pixels of the longer side, or of both (--resize)."""
    resize: Literal["longer", "square"] | None = None
    """longer: larger images are reduced to that longer side (DINO's retrieval); square: all are
    resized to a square. Default: square for Copydays, else longer."""
    multiscale: bool = False
    """Mean of the features at three scales: 1, 1 / sqrt 2, 1 / 2."""
    features: Literal["cls", "cls+gem"] | None = None
    """The network's output, or this and its patch tokens pooled by GeM with exponent 4. Default:
    cls+gem for Copydays, else cls."""
    whitening: Path | None = None
    """Folder of images, of neither queries nor bank, from which a PCA whitening is made."""
    k: int = 10
    """Images listed for each query."""
    examples: int = 8
    """Queries in the picture; 0: no picture."""
    window: tuple[float | str, ...] | None = None
    """Values that become 0 and 1, LOW HIGH or such a pair for each channel: numbers, or percentiles
    of the data (p0.1 p99.9). Default: the network's own, else by the data."""
    mean: tuple[float, ...] | None = None
    """Mean of the channels (values in [0, 1]), subtracted. Default: the network's own, else that of
    the data, and ImageNet's of 8-bit RGB."""
    std: tuple[float, ...] | None = None
    """Standard deviation of the channels, the divisor. Default: as for mean."""
    baselines: bool = False
    """Also search by a randomly initialized backbone and by raw pixels, for comparison."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Precision of the forward pass; published numbers use fp32."""
    device: Device = "auto"
    """auto: cuda if available."""

    def __post_init__(self) -> None:
        within(self, 16, 8192, "image_size")
        within(self, 1, 1e6, "k")
        within(self, 0, 200, "examples")
        within(self, 0, 1, "mean")
        within(self, 1e-3, 1e3, "std")
        check_window(self.window)
        for name in ("queries", "relevant", "distractors"):
            if self.bank is None and getattr(self, name) is not None:
                raise InputError(f"--{name}: name the images to search with --bank too")

    def remarks(self) -> list[str]:
        """Warnings of a dry run."""
        return [] if self.bank else ["--retrieve.bank is missing"]
