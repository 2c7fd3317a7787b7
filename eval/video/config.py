"""Options of ``xcit-dino propagate``; free of torch. Names and defaults are those of DINO's
``eval_video_segmentation.py``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from xcit_dino.errors import InputError, within
from xcit_dino.eval.config import NetworkName
from xcit_dino.inputs import check_window
from xcit_dino.train.config import Device


@dataclass(frozen=True)
class LabelPropagation:
    """How labels pass from frame to frame."""

    n_last_frames: int = 7
    """Preceding frames whose labels count, besides the first; 0: the first alone."""
    size_mask_neighborhood: int = 12
    """Patches to each side in which similar ones are searched for; 0: the whole frame."""
    topk: int = 5
    """Most similar patches of all these frames whose labels are averaged."""
    temperature: float = 0.1
    """Temperature T of a patch's weight exp(cosine / T)."""

    def __post_init__(self) -> None:
        within(self, 0, 1000, "n_last_frames", "size_mask_neighborhood")
        within(self, 1, 1e6, "topk")
        within(self, 0.02, 1e4, "temperature")  # exp(1 / T) fits into float32


@dataclass(frozen=True)
class PropagateConfig:
    """DAVIS 2017 label propagation: objects of a video's first frame, followed by features alone;
    J, F and J&F, and the predicted masks as indexed PNGs."""

    output_dir: Path = Path("runs/default")
    """The run folder: provides defaults for arch and weights; results.json and the masks (in
    propagate/) are written there."""
    videos: Path | None = None
    """DAVIS 2017 (the folder with JPEGImages, Annotations and ImageSets), or a folder of frames, or
    a folder of such folders; the last two with --masks."""
    masks: Path | None = None
    """Mask of the first frame, an indexed or gray PNG with a number per object; or a folder of
    masks named like their frames; or, for several videos, a folder of such folders."""
    pretrained_weights: Path | None = None
    """A file of any kind that `weights` reads, or a run folder. Default: the run's newest
    checkpoint."""
    checkpoint_key: NetworkName | None = None
    """Network of a checkpoint. Default: the teacher of a DINO checkpoint, else the only one."""
    arch: str | None = None
    """Model name. Default: the run's."""
    tap: int = -1
    """Layer whose features are used: a block or stage, counted from 0; -1: the network's output."""
    image_size: int = 480
    """Shorter side to which frames are resized; the longer one becomes a multiple of 64 (DINO)."""
    propagation: LabelPropagation = field(default_factory=LabelPropagation)
    window: tuple[float | str, ...] | None = None
    """Values that become 0 and 1, LOW HIGH or such a pair for each channel: numbers, or percentiles
    of the data (p0.1 p99.9). Default: the network's own, else by the data."""
    mean: tuple[float, ...] | None = None
    """Mean of the channels (values in [0, 1]), subtracted. Default: the network's own, else that of
    the data, and ImageNet's of 8-bit RGB."""
    std: tuple[float, ...] | None = None
    """Standard deviation of the channels, the divisor. Default: as for mean."""
    baselines: bool = False
    """Also propagate with a randomly initialized backbone and with raw pixels, and repeat the first
    mask in every frame, for comparison."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Precision of the forward pass; published numbers use fp32."""
    device: Device = "auto"
    """auto: cuda if available."""

    def __post_init__(self) -> None:
        within(self, -1, 1000, "tap")
        within(self, 16, 8192, "image_size")
        within(self, 0, 1, "mean")
        within(self, 1e-3, 1e3, "std")
        check_window(self.window)
        if self.videos is None and self.masks is not None:
            raise InputError("--masks: name the frames with --videos too")

    def remarks(self) -> list[str]:
        """Warnings of a dry run."""
        return [] if self.videos else ["--propagate.videos is missing"]
