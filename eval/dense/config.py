"""Options of ``xcit-dino masks``; free of torch, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from xcit_dino.errors import needs, within
from xcit_dino.eval.config import EvalTargetConfig


@dataclass(frozen=True)
class MasksConfig:
    """Class attention of an XCiT as masks of objects, without training: the Jaccard index with the
    masks that are packed beside the images (DINO)."""

    target: EvalTargetConfig = field(default_factory=EvalTargetConfig)
    split: Literal["train", "val"] = "val"
    """Shards of --data_path to use."""
    background: tuple[int, ...] = (0,)
    """Classes that are no objects (Pascal VOC: 0)."""
    image_size: int = 480
    """Shorter side to which an image is resized (DINO: 480), before its sides are rounded to whole
    patches; 0 keeps its size."""
    layer: Literal[1, 2] = 2
    """Class attention layer; the last one is 2."""
    threshold: float = 0.6
    """A mask consists of the strongest patches that make up this fraction of a head's attention
    (DINO: 0.6)."""

    def __post_init__(self) -> None:
        within(self, 0, 65_535, "background")
        within(self, 0, 8192, "image_size")
        within(self, 0.001, 1, "threshold")

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        why = "for masks: images are whole, and resized by --image_size"
        alone = "for masks: one image after another"
        return {
            **needs(False, why, "crop_size", "resize_size", "interpolation"),
            **needs(False, alone, "batch_size_per_gpu"),
        }
