"""Options of ``xcit-dino detect``; torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from xcit_dino.data.config import LoaderConfig
from xcit_dino.errors import InputError, needs, within
from xcit_dino.models.zoo import ModelConfig
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
class DetectOptimConfig:
    """AdamW with steps (XCiT ``detection/configs/xcit``)."""

    lr: float = 1e-4
    """Learning rate for 16 images, scaled linearly with the global batch (XCiT: 1e-4)."""
    lr_drops: tuple[float, ...] = (0.75, 0.917)
    """Shares of the training after which the learning rate is divided by ten (XCiT: after 27 and
    33 of 36 epochs)."""
    warmup_epochs: float = 0.07
    """Epochs of linear warm-up (XCiT: 500 iterations of 16 images, 0.07 epochs of COCO)."""
    weight_decay: float = 0.05
    """Weight decay; none on biases, norms, `temperature` and `cls_token`."""
    clip_grad: float = 0.0
    """Maximum gradient norm over all parameters; 0 disables clipping."""

    def __post_init__(self) -> None:
        within(self, 0, 1e3, "lr", "weight_decay")
        within(self, 0, 1, "lr_drops")
        within(self, 0, 1e6, "warmup_epochs", "clip_grad")

    def remarks(self, epochs: int) -> list[str]:
        """What the options do together that one would not expect, a line each."""
        return never_falls(self.warmup_epochs, epochs)


@dataclass(frozen=True)
class DetectionConfig(TaskConfig):
    """The detector, and what images and boxes go through."""

    masks: bool = False
    """Mask R-CNN: predict a mask for each box too. The shards hold COCO's polygons or run
    lengths."""
    finetune: bool = True
    """Train the backbone too; false: it is frozen."""
    short_sides: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Shorter sides in pixels of which one is drawn for each training image."""
    long_side: int = 1333
    """Limit of the longer side, in training and evaluation."""
    eval_side: int = 800
    """Shorter side of images in evaluation."""
    crop_size: int = 0
    """Large-scale jitter instead of short_sides: training images are resized by a factor from scale
    and cropped to a square of this side (1024 is usual). 0: off."""
    scale: tuple[float, float] = (0.1, 2.0)
    """Range of that factor; at 1 the longer side is crop_size."""
    fpn_dim: int = 256
    """Channels of the feature pyramid."""
    anchor_sizes: tuple[int, int, int, int, int] = (32, 64, 128, 256, 512)
    """Sides in pixels of the anchors of the pyramid's levels (strides 4 to 64)."""
    roi_samples: int = 512
    """Proposals of an image that the box head is trained on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, 16, 16384, "short_sides", "long_side", "eval_side")
        within(self, 1, 16384, "anchor_sizes")
        within(self, 0, 8192, "crop_size")
        within(self, 1, 4096, "fpn_dim", "roi_samples")
        check_scale(*self.scale)
        if not self.short_sides:
            raise InputError("--short_sides: give one or more sides in pixels")
        if len(self.taps) not in (0, 4):
            raise InputError("--taps: a pyramid takes four layers")

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        jitter = self.crop_size > 0
        return {
            **needs(jitter, "without --crop_size", "scale"),
            **needs(not jitter, "with --crop_size", "short_sides"),
        }


@dataclass(frozen=True)
class DetectConfig:
    """Object detection on a backbone."""

    run: RunConfig = field(default_factory=lambda: RunConfig(epochs=36, batch_size_per_gpu=2))
    model: ModelConfig = field(default_factory=ModelConfig)
    start: BackboneStartConfig = field(default_factory=BackboneStartConfig)
    optim: DetectOptimConfig = field(default_factory=DetectOptimConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        refuse_unsupported(self.run, self.loader, "detect", "boxes")

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        return {
            **needs(self.detection.finetune, "with --finetune false", "drop_path_rate"),
            **self.loader.unused_cache(),
        }

    def remarks(self) -> list[str]:
        """What the options do together that one would not expect, a line each."""
        return self.optim.remarks(self.run.epochs)


def detect_config(argv: Sequence[str], prog: str = "xcit-dino detect") -> DetectConfig:
    """The command line; see :func:`task_config`."""
    about = "Train and evaluate object detection on a backbone (a recipe with --config FILE)."
    return task_config(DetectConfig(), "detect", argv, prog, about)
