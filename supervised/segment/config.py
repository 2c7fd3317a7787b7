"""Options of ``xcit-dino segment``; torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from xcit_dino.command_line import parse, pop_option, pop_path
from xcit_dino.data.config import LoaderConfig
from xcit_dino.errors import InputError, needs, within
from xcit_dino.eval.config import NetworkName
from xcit_dino.inputs import Scaled, check_window
from xcit_dino.models.zoo import TIMM_PREFIX, ModelConfig, canonical_name, model_spec
from xcit_dino.options import read_yaml, replace
from xcit_dino.supervised.config import passed_on
from xcit_dino.train.config import RunConfig


@dataclass(frozen=True)
class SegmentStartConfig:
    """The backbone's weights."""

    pretrained_weights: Path | None = None
    """A run folder (its newest checkpoint, arch and data), or a file of any kind that `weights`
    reads. Left out: random weights."""
    checkpoint_key: NetworkName | None = None
    """Network of a checkpoint. Default: the teacher of a DINO checkpoint, else the only one."""

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        return needs(self.pretrained_weights, "without --pretrained_weights", "checkpoint_key")


@dataclass(frozen=True)
class SegmentOptimConfig:
    """AdamW with a polynomial schedule (mmsegmentation)."""

    lr: float = 6e-5
    """Peak learning rate for 16 images, scaled linearly with the global batch (XCiT: 6e-5)."""
    lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """Learning rates of the linear head, for 16 images: a head each, trained in one pass; the best
    on the validation images is reported, as in DINOv2."""
    min_lr: float = 0.0
    """Learning rate at the end; not scaled."""
    power: float = 1.0
    """Power of the schedule: 1 is a line from the peak to the end."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up (XCiT: 1,500 iterations of 16 images, 1.2 epochs of ADE20k)."""
    weight_decay: float = 0.01
    """Weight decay; none on biases, norms, `temperature` and `cls_token`."""
    clip_grad: float = 0.0
    """Maximum gradient norm over all parameters; 0 disables clipping."""

    def __post_init__(self) -> None:
        within(self, 0, 1e3, "lr", "min_lr", "weight_decay")
        within(self, 1e-9, 1e3, "lrs")
        within(self, 0.01, 100, "power")
        within(self, 0, 1e6, "warmup_epochs", "clip_grad")
        if not self.lrs or len(set(self.lrs)) < len(self.lrs):
            raise InputError("--lrs: give one or more learning rates, each once")

    def remarks(self, epochs: int) -> list[str]:
        """What the options do together that one would not expect, a line each."""
        if self.warmup_epochs < epochs:
            return []
        return [
            f"--warmup_epochs {self.warmup_epochs:g} with --epochs {epochs}: the learning rate "
            "never falls"
        ]


@dataclass(frozen=True)
class SegmentationConfig(Scaled):
    """The head, and what images and masks go through."""

    head: Literal["linear", "fpn", "upernet"] = "linear"
    """linear: batch-norm and a 1x1 convolution. fpn: Semantic FPN. upernet: UperNet, with its
    auxiliary loss."""
    finetune: bool = False
    """Train the backbone too; by default it is frozen."""
    taps: tuple[int, ...] = ()
    """Layers whose features the head gets: blocks (or stages) counted from 0, -1 the output. By
    default -1 for linear, XCiT's 3 5 7 11 of 12 (7 11 15 23 of 24) for the others."""
    crop_size: int = 512
    """Side of training crops and of the evaluation's windows in pixels."""
    resize_size: int = 0
    """Shorter side of images before crops are cut, and in evaluation; 0: crop_size."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the factor by which training images are resized further."""
    cat_max_ratio: float = 0.75
    """A crop of which one class covers more than this share is drawn again, up to ten times."""
    hflip: float = 0.5
    """Probability of a left-right flip."""
    color_jitter: tuple[float, float, float] = (0.125, 0.5, 0.5)
    """Brightness (+- a share of the window), contrast and saturation (factors from 1-s to 1+s),
    each with probability 1/2; 0 0 0 switches them off."""
    auxiliary_weight: float = 0.4
    """Weight of UperNet's auxiliary loss."""
    stride: float = 2 / 3
    """Step of the evaluation's sliding window, as a share of crop_size."""
    eval_every: int = 0
    """Epochs between evaluations; 0: at the end only."""
    window: tuple[float | str, ...] | None = None
    """Values that become 0 and 1, LOW HIGH or such a pair for each channel; others are clipped. A
    number, or a percentile of each channel in the data (p0.1 p99.9). By default as the weights to
    start from were trained, else by the data: 0 255 of 8 bits, 0 4095 where 12 bits are used."""
    mean: tuple[float, ...] | None = None
    """Of each channel (values in [0, 1]), subtracted; by default as the weights to start from were
    trained, else that of the data, and ImageNet's of 8-bit RGB."""
    std: tuple[float, ...] | None = None
    """The channels are divided by it; by default as for mean."""

    def __post_init__(self) -> None:
        within(self, 8, 8192, "crop_size")
        within(self, 0, 16384, "resize_size")
        within(self, 0, 1, "hflip", "color_jitter", "mean")
        within(self, 0.01, 1, "cat_max_ratio", "stride")
        within(self, 1e-3, 1e3, "std")
        check_window(self.window)
        within(self, 0, 1e6, "eval_every")
        within(self, 0, 100, "auxiliary_weight")
        low, high = self.scale
        if not 0.01 <= low <= high <= 100:
            raise InputError("--scale must be two factors, 0.01 <= from <= to <= 100")
        if self.head != "linear" and len(self.taps) not in (0, 4):
            raise InputError(f"--taps: --head {self.head} takes four layers")

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        return needs(self.head == "upernet", f"with --head {self.head}", "auxiliary_weight")

    @property
    def short_side(self) -> int:
        """Shorter side of resized images."""
        return self.resize_size or self.crop_size


@dataclass(frozen=True)
class SegmentConfig:
    """Semantic segmentation on a backbone."""

    run: RunConfig = field(default_factory=lambda: RunConfig(epochs=32, batch_size_per_gpu=16))
    model: ModelConfig = field(default_factory=ModelConfig)
    start: SegmentStartConfig = field(default_factory=SegmentStartConfig)
    optim: SegmentOptimConfig = field(default_factory=SegmentOptimConfig)
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        task = self.segmentation
        if self.loader.decoder != "host":
            raise InputError("--decoder cuda: masks are read on the host; use --decoder host")
        if self.run.fsdp:
            raise InputError("--fsdp: segment keeps all weights in each process; leave it out")
        if task.finetune and task.head == "linear" and len(self.optim.lrs) > 1:
            raise InputError(
                "--finetune: a grid of learning rates shares one backbone; give one with --lrs "
                f"{self.optim.lrs[0]:g}"
            )
        if not self.model.arch.startswith(TIMM_PREFIX):
            patch = model_spec(self.model.arch).patch_size
            unit = patch if task.head == "linear" else 32
            if task.crop_size % unit:
                near = max(unit, round(task.crop_size / unit) * unit)
                raise InputError(
                    f"--crop_size {task.crop_size}: {self.model.arch} with --head {task.head} "
                    f"needs a multiple of {unit}, such as {near}"
                )

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        linear = self.segmentation.head == "linear"
        name = f"with --head {self.segmentation.head}"
        return {
            **needs(not linear, name, "lr"),
            **needs(linear, name, "lrs"),
            **needs(self.segmentation.finetune, "without --finetune", "drop_path_rate"),
            **self.loader.unused_cache(),
        }

    def remarks(self) -> list[str]:
        """What the options do together that one would not expect, a line each."""
        return self.optim.remarks(self.run.epochs)

    @property
    def peak_lr(self) -> float:
        """Of the head with the highest learning rate, for 16 images."""
        return max(self.optim.lrs) if self.segmentation.head == "linear" else self.optim.lr


def segment_config(argv: Sequence[str], prog: str = "xcit-dino segment") -> SegmentConfig:
    """Recipe (``--config FILE``) plus command-line overrides; a run folder to start from passes on
    its arch and the location of its data, as in finetuning.

    Raises:
        InputError: unknown model, file, option or value, in one line.
    """
    file, argv = pop_path(argv, "config")
    folder = pop_path(argv, "pretrained_weights")[0]
    known = passed_on(folder)
    config = replace(SegmentConfig(), known, source=f"{folder}/config.yaml")
    if file is not None:
        recipe = read_yaml(file)
        if pop_option(argv, "arch")[0] or known.get("arch"):
            recipe.pop("arch", None)
        config = replace(config, recipe, source=str(file))
    about = "Train and evaluate semantic segmentation on a backbone (a recipe with --config FILE)."
    config = parse(config, argv, prog, about)
    name = canonical_name(config.model.arch)
    values: dict[str, Any] = {"arch": name}
    if config.run.output_dir == RunConfig.output_dir:
        runs = folder if folder and known else Path("runs") / name.replace("/", "_")
        values["output_dir"] = runs / "segment"
    return replace(config, values)
