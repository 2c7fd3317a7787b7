"""Options of ``xcit-dino recipe``. No torch here: ``--help`` reads this class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from xcit_dino.errors import within
from xcit_dino.paths import Location


@dataclass(frozen=True)
class RecipeConfig:
    """``xcit-dino recipe SHARDS OUT.yaml``: options of a pretraining that fit data, machine, time.

    The speed is measured by training on the shards for some seconds; nothing is kept of that."""

    shards: Annotated[Location, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")] = (
        tyro.MISSING
    )
    """Folder or URL of shards with their index (``xcit-dino shards make`` writes one)."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.yaml")] = tyro.MISSING
    """The recipe to write, for ``--config`` of pretrain and launch; an existing file is kept."""
    hours: float = 2.0
    """Time that the training may take on this machine."""
    kind: Literal["auto", "photographs", "grayscale", "xray", "satellite", "microscopy"] = "auto"
    """What the images show, which decides the augmentation: photographs: DINO's; the others: that
    of configs/images/KIND.yaml. auto: by channels and depth: one channel is grayscale (8 bits) or
    xray (deeper), three are photographs, others satellite."""
    gpus: int = 1
    """GPUs that will train, on one or several nodes; the speed is measured on one."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: cuda if available."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of the forward pass; auto: bf16 if supported, else fp32."""
    num_workers: int | None = None
    """Processes that decode and crop, for each GPU; by default one core less than there are, at
    most 10."""

    def __post_init__(self) -> None:
        within(self, 0.01, 1e5, "hours")
        within(self, 1, 65536, "gpus")
        within(self, 0, 4096, "num_workers")
