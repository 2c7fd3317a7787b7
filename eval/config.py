"""Options of the evaluations; torch-free, so that ``--help`` is quick. Names are DINO's where DINO
has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from xcit_dino.errors import InputError, needs, within
from xcit_dino.paths import Location

NetworkName = Literal["teacher", "student", "model", "model_ema"]


@dataclass(frozen=True)
class EvalTargetConfig:
    """Which network is evaluated, on which images, and how they are computed."""

    output_dir: Path = Path("runs/default")
    """The run folder: its config.yaml gives what is left out below; results.json and features go
    there."""
    pretrained_weights: Path | None = None
    """A file of any kind that `weights` reads, or a run folder; left out: the run's newest
    checkpoint."""
    checkpoint_key: NetworkName | None = None
    """Which network of a checkpoint; left out: the teacher of a DINO one, else the only one."""
    arch: str | None = None
    """Model name; left out: the run's."""
    data_path: Location | None = None
    """Folder (or URL) that holds the shards of train and val; left out: the run's."""
    shard_url: Location | None = None
    """Where the shards lie if not beside their index, as for `pretrain`, with ``{split}`` for train
    or val; left out: the run's."""
    cache_dir: Path | None = None
    """Local folder for copies of remote shards; left out: the run's."""
    cache_gb: float | None = None
    """The cache holds at most this many gigabytes; left out: the run's, else 100."""
    max_bad_fraction: float | None = None
    """Share of unreadable images that ends the evaluation; left out: the run's, else 0.001."""
    crop_size: int = 0
    """Side of the centre crop; 0: the network's own (of its run, its file or timm's table), else
    224."""
    resize_size: int = -1
    """Shorter side before the crop; -1: by the network's own crop ratio, else crop_size x 256 / 224
    above 64 px and crop_size up to it."""
    interpolation: Literal["bicubic", "bilinear"] | None = None
    """How images are resized; left out: the network's own, else bicubic."""
    mean: tuple[float, float, float] | None = None
    """Subtracted from the channels (values in [0, 1]); left out: the network's own, else
    ImageNet's."""
    std: tuple[float, float, float] | None = None
    """The channels are divided by it; left out: the network's own, else ImageNet's."""
    baselines: bool = False
    """Evaluate raw pixels and a randomly initialised backbone too, so that the lift is visible."""
    batch_size_per_gpu: int = 128
    """Images a process takes at once."""
    num_workers: int = 10
    """Processes that decode images; 0 decodes in the main process."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Arithmetic of the forward pass; the published numbers are fp32."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: cuda where there is one."""

    def __post_init__(self) -> None:
        within(self, 0, 4096, "crop_size")
        within(self, -1, 8192, "resize_size")
        within(self, 0, 1, "mean", "max_bad_fraction")
        within(self, 1e-3, 1e3, "std")
        within(self, 1e-9, 1e9, "cache_gb")
        within(self, 1, 1e6, "batch_size_per_gpu")
        within(self, 0, 4096, "num_workers")
        if self.resize_size != -1 and self.resize_size < max(1, self.crop_size):
            raise InputError(
                f"--resize_size {self.resize_size}: must be at least --crop_size, or -1"
            )


@dataclass(frozen=True)
class KnnConfig:
    """Weighted k-NN (DINO ``eval_knn.py``)."""

    target: EvalTargetConfig = field(default_factory=EvalTargetConfig)
    nb_knn: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours; one search serves all. 20 usually works best."""
    temperature: float = 0.07
    """Temperature T of a neighbour's vote exp(cosine / T)."""

    def __post_init__(self) -> None:
        if not self.nb_knn:
            raise InputError("--nb_knn: give one or more numbers of neighbours")
        within(self, 1, 1e9, "nb_knn")
        within(self, 1e-4, 1e4, "temperature")


@dataclass(frozen=True)
class LinearConfig:
    """Linear probe: a grid of heads trained side by side in one pass over the features."""

    target: EvalTargetConfig = field(default_factory=EvalTargetConfig)
    protocol: Literal["cached", "dino"] = "cached"
    """cached: features of the centre crop, extracted once. dino: RandomResizedCrop + flip, every
    epoch through the backbone (DINO ``eval_linear.py``)."""
    epochs: int = 100
    """Passes over the training images (DINO: 100)."""
    lrs: tuple[float, ...] = (
        1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0,
    )  # fmt: skip
    """Learning rates for 256 images, scaled linearly with the batch; one head each."""
    weight_decays: tuple[float, ...] = (0.0,)
    """Weight decays, each with every learning rate (DINO: 0)."""
    layers: tuple[Literal["cls", "cls+patch", "cls2", "cls2+patch"], ...] = (
        "cls",
        "cls+patch",
        "cls2",
    )
    """Features, each with every learning rate: the class token after the last layer (DINO for
    XCiT), with the mean of the patch tokens, with the class token one class-attention layer
    earlier."""
    probe_batch_size: int = 1024
    """Images of one step of the heads (cached); dino takes batch_size_per_gpu x processes."""
    decoder: Literal["host", "cuda"] | None = None
    """Where the dino protocol's JPEGs are decoded and cropped; left out: where the run's were, and
    without CUDA on the host."""
    holdout: float = 0.1
    """Share of the training images on which the best head is chosen; the validation set never
    is."""
    seed: int = 0
    """Seed of heads, order, held-out part and crops."""

    def __post_init__(self) -> None:
        for name in ("lrs", "layers", "weight_decays"):
            if not getattr(self, name):
                raise InputError(f"--{name}: give at least one")
        if self.decoder == "cuda" and self.protocol == "cached":
            raise InputError(
                "--decoder cuda: serves --protocol dino only; centre crops are cut on the host"
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
    """Head saved by `linear` (linear_head.safetensors); left out: the weights file holds a
    classifier."""

    def __post_init__(self) -> None:
        if self.target.baselines:
            raise InputError(
                "--baselines: a random network has no classifier; compare by knn or linear, or "
                "leave it out"
            )


@dataclass(frozen=True)
class EmbedConfig:
    """Features of all images of a split, labelled or not, for search, clustering, deduplication:
    features.npy, images.csv and a picture of nearest neighbours."""

    dst: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[DST]")] = None
    """Folder to write; left out: embeddings/SPLIT in the run folder."""
    target: EvalTargetConfig = field(default_factory=EvalTargetConfig)
    split: Literal["train", "val"] = "train"
    """Which shards of --data_path; one set of shards without train/ and val/ is train."""
    examples: int = 8
    """Images shown with their nearest neighbours; 0 draws no picture."""
    seed: int = 0
    """Which images are shown."""

    def __post_init__(self) -> None:
        within(self, 0, 100, "examples")
        within(self, 0, 2**31, "seed")

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        return needs(self.examples, "with --examples 0: nothing is shown", "seed")


@dataclass(frozen=True)
class ReportConfig:
    """One self-contained HTML page of one or more runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders; the page of several compares them. Left out: --output_dir."""
    output_dir: Path = Path("runs/default")
    """The run folder where none is named; stages name it so."""
    output: Path | None = None
    """File to write; left out: report.html in the first run folder."""
    pictures: bool = True
    """Show crops, attention, neighbours, confusions and a map of the features too; they need the
    shards, a checkpoint and the features that `knn` leaves."""

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        return needs(not self.runs, "beside run folders", "output_dir")

    @property
    def folders(self) -> tuple[Path, ...]:
        """Run folders in the order of the page."""
        return self.runs or (self.output_dir,)


@dataclass(frozen=True)
class CompareConfig:
    """Accuracies of runs beside one another, ranked only where their protocols are the same."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Two or more run folders."""

    def __post_init__(self) -> None:
        if len(self.runs) == 1:
            raise InputError(f"report compare {self.runs[0]}: name two run folders or more")


@dataclass(frozen=True)
class AttentionConfig:
    """Class-attention maps of an XCiT, one a head, laid over photos."""

    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")] = tyro.MISSING
    """A photo, an animated GIF or WebP, a video (needs PyAV: pip install av), or a folder of
    them."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")] = Path("attention")
    """Folder for the maps."""
    output_dir: Path = Path("runs/default")
    """The run folder: gives arch and weights where they are left out."""
    pretrained_weights: Path | None = None
    """A file of any kind that `weights` reads, or a run folder."""
    checkpoint_key: NetworkName | None = None
    """Which network of a checkpoint; left out: the teacher of a DINO one, else the only one."""
    arch: str | None = None
    """Model name; left out: the run's."""
    image_size: int = 480
    """Shorter side to which an image is resized (DINO: 480), before its sides are rounded to whole
    patches; 0 keeps its own."""
    mean: tuple[float, float, float] | None = None
    """Subtracted from the channels (values in [0, 1]); left out: the network's own, else
    ImageNet's."""
    std: tuple[float, float, float] | None = None
    """The channels are divided by it; left out: the network's own, else ImageNet's."""
    layer: Literal[1, 2] = 2
    """Class attention layer, the last is 2."""
    threshold: float = 0.0
    """Show only the brightest patches that hold this share of a head's attention (DINO: 0.6);
    0 shows all."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: cuda where there is one."""

    def __post_init__(self) -> None:
        within(self, 0, 1, "threshold", "mean")
        within(self, 1e-3, 1e3, "std")
        within(self, 0, 8192, "image_size")
