"""Options of ``xcit-dino segment``; torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from xcit_dino.data.config import LoaderConfig
from xcit_dino.errors import InputError, needs, within
from xcit_dino.models.zoo import TIMM_PREFIX, ModelConfig, model_spec
from xcit_dino.supervised.target_config import (
    BackboneStartConfig,
    TaskConfig,
    check_scale,
    never_falls,
    refuse_unsupported,
    task_config,
)
from xcit_dino.train.config import RunConfig


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
        return never_falls(self.warmup_epochs, epochs)


@dataclass(frozen=True)
class SegmentationConfig(TaskConfig):
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
    color_jitter: tuple[float, float, float] = (0.125, 0.5, 0.5)
    """Brightness (+- a share of the window), contrast and saturation (factors from 1-s to 1+s),
    each with probability 1/2; 0 0 0 switches them off."""
    auxiliary_weight: float = 0.4
    """Weight of UperNet's auxiliary loss."""
    stride: float = 2 / 3
    """Step of the evaluation's sliding window, as a share of crop_size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, 8, 8192, "crop_size")
        within(self, 0, 16384, "resize_size")
        within(self, 0, 1, "color_jitter")
        within(self, 0.01, 1, "cat_max_ratio", "stride")
        within(self, 0, 100, "auxiliary_weight")
        check_scale(*self.scale)
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
    start: BackboneStartConfig = field(default_factory=BackboneStartConfig)
    optim: SegmentOptimConfig = field(default_factory=SegmentOptimConfig)
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        task = self.segmentation
        refuse_unsupported(self.run, self.loader, "segment", "masks")
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
    """The command line; see :func:`task_config`."""
    about = "Train and evaluate semantic segmentation on a backbone (a recipe with --config FILE)."
    return task_config(SegmentConfig(), "segment", argv, prog, about)
