"""Options of the evaluations; free of torch, so that ``--help`` is fast. Names are DINO's where
DINO has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from xcit_dino.errors import InputError, needs, within
from xcit_dino.inputs import check_window
from xcit_dino.paths import Location
from xcit_dino.train.config import Device

NetworkName = Literal["teacher", "student", "model", "model_ema"]


@dataclass(frozen=True)
class EvalTargetConfig:
    """Network to evaluate, its images, and how features are computed."""

    output_dir: Path = Path("runs/default")
    """The run folder: its config.yaml provides defaults for the options below; results.json and
    features are written there."""
    pretrained_weights: Path | None = None
    """A file of any kind that `weights` reads, or a run folder. Default: the run's newest
    checkpoint."""
    checkpoint_key: NetworkName | None = None
    """Network of a checkpoint. Default: the teacher of a DINO checkpoint, else the only one."""
    arch: str | None = None
    """Model name. Default: the run's."""
    data_path: Location | None = None
    """Folder (or URL) with the shards of train and val. Default: the run's."""
    shard_url: Location | None = None
    """Location of the shards if not next to their index, as for `pretrain`, with ``{split}`` for
    train or val. Default: the run's."""
    cache_dir: Path | None = None
    """Local folder for copies of remote shards. Default: the run's."""
    cache_gb: float | None = None
    """Maximum size of the cache in gigabytes. Default: the run's, else 100."""
    bands: tuple[int, ...] | None = None
    """Channels to read, in this order, numbered from 1. Default: the run's, else all."""
    max_bad_fraction: float | None = None
    """Fraction of unreadable images that ends the evaluation. Default: the run's, else 0.001."""
    crop_size: int = 0
    """Side of the center crop in pixels; 0: the network's own (from its run, its file or timm),
    else 224."""
    resize_size: int = -1
    """Shorter side before the crop; -1: from the network's own crop ratio, else crop_size x 256 /
    224 above 64 px and crop_size up to 64 px."""
    interpolation: Literal["bicubic", "bilinear"] | None = None
    """Resize interpolation. Default: the network's own, else bicubic."""
    window: tuple[float | str, ...] | None = None
    """Values that become 0 and 1, LOW HIGH or such a pair for each channel: numbers, or percentiles
    of the data (p0.1 p99.9). Default: the network's own, else by the data."""
    mean: tuple[float, ...] | None = None
    """Mean of the channels (values in [0, 1]), subtracted. Default: the network's own, else that of
    the data, and ImageNet's of 8-bit RGB."""
    std: tuple[float, ...] | None = None
    """Standard deviation of the channels, the divisor. Default: as for mean."""
    baselines: bool = False
    """Also evaluate raw pixels and a randomly initialized backbone, for comparison."""
    batch_size_per_gpu: int = 128
    """Images per batch of each process."""
    num_workers: int = 10
    """Decoding processes; 0 decodes in the main process."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Precision of the forward pass; published numbers use fp32."""
    device: Device = "auto"
    """auto: cuda if available."""

    def __post_init__(self) -> None:
        within(self, 0, 4096, "crop_size")
        within(self, -1, 8192, "resize_size")
        within(self, 0, 1, "mean", "max_bad_fraction")
        within(self, 1e-3, 1e3, "std")
        check_window(self.window)
        within(self, 1e-9, 1e9, "cache_gb")
        within(self, 1, 512, "bands")
        within(self, 1, 1e6, "batch_size_per_gpu")
        within(self, 0, 4096, "num_workers")
        if self.resize_size != -1 and self.resize_size < max(1, self.crop_size):
            raise InputError(
                f"--resize_size {self.resize_size}: must be at least --crop_size, or -1"
            )


@dataclass(frozen=True)
class FewConfig:
    """Few labels."""

    labels_per_class: int = 0
    """Use the labels of only this many random training images a class; the result is `knn-few` or
    `linear-few`. 0: of all."""
    draws: int = 5
    """Random choices of these images; reported are mean and standard deviation."""
    draw_seed: int = 0
    """Seed of these choices."""

    def __post_init__(self) -> None:
        within(self, 0, 1e9, "labels_per_class")
        within(self, 1, 1000, "draws")
        within(self, 0, 2**31, "draw_seed")

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        return needs(self.labels_per_class, "without --labels_per_class", "draws", "draw_seed")

    @property
    def protocol(self) -> dict[str, int]:
        """Fields of a result's protocol."""
        few = {"labels_per_class": self.labels_per_class, "draws": self.draws}
        return few | {"draw_seed": self.draw_seed} if self.labels_per_class else {}


@dataclass(frozen=True)
class KnnConfig:
    """Weighted k-NN (DINO ``eval_knn.py``)."""

    target: EvalTargetConfig = field(default_factory=EvalTargetConfig)
    nb_knn: tuple[int, ...] = (10, 20, 100, 200)
    """Values of k; one search serves all. 20 usually works best."""
    temperature: float = 0.07
    """Temperature T of a neighbor's vote exp(cosine / T)."""
    few: FewConfig = field(default_factory=FewConfig)

    def __post_init__(self) -> None:
        if not self.nb_knn:
            raise InputError("--nb_knn: give one or more numbers of neighbors")
        within(self, 1, 1e9, "nb_knn")
        within(self, 1e-4, 1e4, "temperature")


@dataclass(frozen=True)
class LinearConfig:
    """Linear probe: a grid of heads trained simultaneously on the same features."""

    target: EvalTargetConfig = field(default_factory=EvalTargetConfig)
    protocol: Literal["cached", "dino"] = "cached"
    """cached: features of the center crop, extracted once. dino: RandomResizedCrop + flip, with a
    forward pass through the backbone in every epoch (DINO ``eval_linear.py``)."""
    epochs: int = 100
    """Passes over the training images (DINO: 100)."""
    lrs: tuple[float, ...] = (
        1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0,
    )  # fmt: skip
    """Learning rates for batch size 256, scaled linearly with the batch size; one head each."""
    weight_decays: tuple[float, ...] = (0.0,)
    """Weight decays, combined with every learning rate (DINO: 0)."""
    layers: tuple[Literal["cls", "cls+patch", "cls2", "cls2+patch", "deep"], ...] = (
        "cls", "cls+patch", "cls2", "cls2+patch",
    )  # fmt: skip
    """Features, combined with every learning rate: the class token after the last layer (DINO for
    XCiT), with the mean of the patch tokens, with the class token one class-attention layer
    earlier, with both; deep: these and the mean patch tokens of the last four cross-covariance
    blocks (DINO, for ViTs: their class tokens), which are extracted for it."""
    probe_batch_size: int = 1024
    """Batch size of the heads (cached); dino uses batch_size_per_gpu x processes."""
    decoder: Literal["host", "cuda"] | None = None
    """Where the dino protocol decodes and crops JPEGs. Default: as in the run, and on the host
    without CUDA."""
    holdout: float = 0.1
    """Fraction of the training images used to select the best head; the validation set is never
    used for that."""
    seed: int = 0
    """Seed of heads, data order, held-out images and crops."""
    few: FewConfig = field(default_factory=FewConfig)

    def __post_init__(self) -> None:
        if self.few.labels_per_class and self.protocol == "dino":
            raise InputError(
                "--labels_per_class: for --protocol cached only; DINO's protocol uses all labels"
            )
        for name in ("lrs", "layers", "weight_decays"):
            if not getattr(self, name):
                raise InputError(f"--{name}: give at least one")
        if self.decoder == "cuda" and self.protocol == "cached":
            raise InputError(
                "--decoder cuda: for --protocol dino only; center crops are made on the host"
            )
        within(self, 1e-9, 1e3, "lrs")
        within(self, 0, 1, "weight_decays")
        within(self, 1e-6, 0.5, "holdout")
        within(self, 1, 1e6, "epochs", "probe_batch_size")
        within(self, 0, 2**31, "seed")

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        cached = self.protocol == "cached"
        return needs(cached, "with --protocol dino: it is --batch_size_per_gpu", "probe_batch_size")


@dataclass(frozen=True)
class EvaluateConfig:
    """Top-1 and top-5 of a classifier: one checkpoint, or a backbone and the head of a linear
    probe."""

    target: EvalTargetConfig = field(default_factory=EvalTargetConfig)
    head: Path | None = None
    """Head saved by `linear` (linear_head.safetensors). Default: the weights file contains a
    classifier."""
    label_map: Path | None = None
    """Which outputs of the head the data's classes are, where the head has others: a text file with
    the name of each output in a line, or JSON {"class of the data": number, or [numbers]}; only
    these outputs compete. Default: they are the same."""

    def __post_init__(self) -> None:
        if self.target.baselines:
            raise InputError(
                "--baselines: a random network has no classifier; compare by knn or linear, or "
                "leave it out"
            )


@dataclass(frozen=True)
class EmbedConfig:
    """Features of all images of a split, labeled or not, for search, clustering, deduplication:
    features.npy, images.csv and a picture of nearest neighbors; those of every patch too with
    --patches true."""

    dst: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[DST]")] = None
    """Folder to write. Default: embeddings/SPLIT in the run folder."""
    target: EvalTargetConfig = field(default_factory=EvalTargetConfig)
    split: Literal["train", "val"] = "train"
    """Shards of --data_path to use; a set of shards without train/ and val/ counts as train."""
    patches: bool = False
    """Also write the features of every patch of the whole images, on grids of any size (float16),
    and pictures of their principal components."""
    tap: int = -1
    """Layer of the patch features: a block or stage, counted from 0; -1: the network's output."""
    image_size: int = -1
    """Shorter side to which whole images are resized for their patches, before both sides are
    rounded to whole patches; 0 keeps their size, -1: --resize_size."""
    examples: int = 8
    """Images shown with their nearest neighbors; 0: no picture."""
    show_channels: tuple[int, ...] = ()
    """Channels shown as red, green and blue, in pictures of images with other than 8-bit RGB;
    numbered from 1, of those that --bands reads. Default: the first three, of more than three the
    first principal components."""
    seed: int = 0
    """Seed for selecting the images shown."""

    def __post_init__(self) -> None:
        within(self, 1, 512, "show_channels")
        within(self, 0, 100, "examples")
        within(self, 0, 2**31, "seed")
        within(self, -1, 1000, "tap")
        within(self, -1, 8192, "image_size")

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        why = "with --examples 0: nothing is shown"
        return {
            **needs(self.examples, why, "seed", "show_channels"),
            **needs(self.patches, "without --patches", "tap", "image_size"),
        }


@dataclass(frozen=True)
class ReportConfig:
    """One self-contained HTML page of one or more runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders; a page of several compares them. Default: --output_dir."""
    output_dir: Path = Path("runs/default")
    """The run folder if none is named; used by the launcher's stages."""
    output: Path | None = None
    """File to write. Default: report.html in the first run folder."""
    pictures: bool = True
    """Also show crops, attention, neighbors, confusions and a map of the features; they need the
    shards, a checkpoint and the features cached by `knn`."""
    show_channels: tuple[int, ...] = ()
    """Channels shown as red, green and blue, in pictures of images with other than 8-bit RGB;
    numbered from 1, of those that --bands reads. Default: the first three, of more than three the
    first principal components."""

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        return {
            **needs(not self.runs, "beside run folders", "output_dir"),
            **needs(self.pictures, "with --pictures false", "show_channels"),
        }

    @property
    def folders(self) -> tuple[Path, ...]:
        """Run folders in the order of the page."""
        return self.runs or (self.output_dir,)

    def __post_init__(self) -> None:
        within(self, 1, 512, "show_channels")


@dataclass(frozen=True)
class CompareConfig:
    """Accuracies of runs side by side, ranked only if their protocols are the same."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Two or more run folders."""

    def __post_init__(self) -> None:
        if len(self.runs) == 1:
            raise InputError(f"report compare {self.runs[0]}: name two run folders or more")


@dataclass(frozen=True)
class AttentionConfig:
    """Class-attention maps of an XCiT, one per head, overlaid on photos; or the patch features of
    any network as colors."""

    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")] = tyro.MISSING
    """A photo, an animated GIF or WebP, a video (needs PyAV: pip install av), or a folder of
    them."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")] = Path("attention")
    """Folder for the maps."""
    output_dir: Path = Path("runs/default")
    """The run folder: provides defaults for arch and weights."""
    pretrained_weights: Path | None = None
    """A file of any kind that `weights` reads, or a run folder."""
    checkpoint_key: NetworkName | None = None
    """Network of a checkpoint. Default: the teacher of a DINO checkpoint, else the only one."""
    arch: str | None = None
    """Model name. Default: the run's."""
    draw: Literal["attention", "patches"] = "attention"
    """attention: a map per head. patches: the first three principal components of the patch
    features as colors, of all patches and of the foreground."""
    image_size: int = 480
    """Shorter side to which an image is resized (DINO: 480), before its sides are rounded to whole
    patches; 0 keeps its size."""
    tile: int | None = None
    """Read images as large scenes or slides: in parts (TIFF, .npy), tile by tile of this many
    pixels, at their own size. The maps, one pixel a patch, cover the scene."""
    window: tuple[float | str, ...] | None = None
    """Values that become 0 and 1, LOW HIGH or such a pair for each channel: numbers, or percentiles
    of the data (p0.1 p99.9). Default: the network's own, else by the data."""
    mean: tuple[float, ...] | None = None
    """Mean of the channels (values in [0, 1]), subtracted. Default: the network's own, else that of
    the data, and ImageNet's of 8-bit RGB."""
    std: tuple[float, ...] | None = None
    """Standard deviation of the channels, the divisor. Default: as for mean."""
    show_channels: tuple[int, ...] = ()
    """Channels shown as red, green and blue, in pictures of images with other than 8-bit RGB;
    numbered from 1, of those that --bands reads. Default: the first three, of more than three the
    first principal components."""
    layer: Literal[1, 2] = 2
    """Class attention layer; the last one is 2."""
    threshold: float = 0.0
    """Show only the strongest patches that make up this fraction of a head's attention (DINO: 0.6);
    0 shows all."""
    tap: int = -1
    """Layer of the patch features: a block or stage, counted from 0; -1: the network's output."""
    shared_colors: bool = False
    """Find the components in all files together, so that a color means the same in each of them:
    frames of a video, photos of one kind of thing. By default each file has its own."""
    device: Device = "auto"
    """auto: cuda if available."""

    def __post_init__(self) -> None:
        within(self, 1, 512, "show_channels")
        within(self, 0, 1, "threshold", "mean")
        within(self, 1e-3, 1e3, "std")
        check_window(self.window)
        within(self, 0, 8192, "image_size")
        within(self, 4, 8192, "tile")
        within(self, -1, 1000, "tap")

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        attention, patches = self.draw == "attention", "with --draw patches"
        free = self.tile is None or not attention
        return {
            **needs(free, "with --tile: tiles keep their size", "image_size"),
            **needs(attention, patches, "layer", "threshold", "tile"),
            **needs(not attention, "without --draw patches", "tap", "shared_colors"),
        }
