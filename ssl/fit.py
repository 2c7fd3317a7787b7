"""Whether the options of a pretraining fit its data: a line for each that does not.

Free of torch and NumPy: ``launch --dry_run`` prints the same lines as the run itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from xcit_dino.data.shards.describe import Description, describe
from xcit_dino.models.zoo import TIMM_PREFIX, model_spec
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.recipe.rules import prototypes

ENLARGED = 1.25
"""Crops that exceed the shorter side of nearly all images by this factor show no more, at a cost
that grows with the square."""
NEARLY_ALL = 0.9
WARM_UP = 1 / 3
"""Share of a run from which a warm-up takes the steps that training needs."""
GRID = 2
"""Patches on a side of a global crop at most, where nothing is left to attend to."""


def misfits(config: PretrainConfig, root: str, processes: int = 1) -> list[str]:
    """Warnings on a run of ``processes`` on the training split at ``root``, one line each; none
    that need the data where they cannot be read from here."""
    lines = list(_of_options(config))
    if "://" in root or (config.loader.shard_url or "").startswith("pipe:"):
        return lines
    try:
        data = describe(Path(root))
    except (OSError, KeyError, ValueError, TypeError):  # refused, in words, by those who read it
        return lines
    return [*_of_data(config, data, processes), *lines]


def _of_data(config: PretrainConfig, data: Description, processes: int) -> Iterator[str]:
    run, images = config.run, data.images
    batch = run.batch_size_per_gpu * run.accum_iter * processes
    if batch > images:
        yield (
            f"--batch_size_per_gpu {run.batch_size_per_gpu}: fewer images ({images:,}) than a "
            f"global batch of {batch:,}; lower it"
        )
    if config.objective.dino and config.head.out_dim > images:
        yield (
            f"--out_dim {config.head.out_dim}: more prototypes than images ({images:,}); take "
            f"--out_dim {prototypes(images)}"
        )
    size = max(crops.global_crops_size for _, crops in config.stages)
    if data.sides and size > ENLARGED * (side := data.side(NEARLY_ALL)):
        yield (
            f"--global_crops_size {size}: nearly all images have a shorter side of at most {side} "
            "pixels and are enlarged, which costs time and shows nothing more; "
            "xcit-dino recipe SHARDS OUT.yaml chooses crops and network for them"
        )


def _of_options(config: PretrainConfig) -> Iterator[str]:
    epochs, warm_up, crops = config.run.epochs, config.optim.warmup_epochs, config.crops
    if WARM_UP * epochs < warm_up < epochs:  # longer ones: OptimConfig.remarks
        yield (
            f"--warmup_epochs {warm_up:g} with --epochs {epochs}: the warm-up takes "
            f"{warm_up / epochs:.0%} of the run; take a tenth, --warmup_epochs {epochs / 10:g}"
        )
    if crops.local_crops_number and crops.local_crops_size > crops.global_crops_size:
        yield (
            f"--local_crops_size {crops.local_crops_size}: larger than --global_crops_size "
            f"{crops.global_crops_size}; take --local_crops_size {crops.global_crops_size}"
        )
    if config.model.arch.startswith(TIMM_PREFIX):
        return
    patch = model_spec(config.model.arch).patch_size
    size = min(stage.global_crops_size for _, stage in config.stages)
    if size <= GRID * patch:
        yield (
            f"--global_crops_size {size}: {size // patch} x {size // patch} patches of {patch} "
            f"pixels leave little to learn from; take --global_crops_size {8 * patch} or smaller "
            "patches"
        )
