"""``xcit-dino masks``: class attention as masks of objects, and its Jaccard index with true masks.

DINO's comparison on Pascal VOC 2012 (arXiv:2104.14294, figure 4): a head's mask consists of the
strongest patches that hold 60 % of its attention (``visualize_attention.py``). The code of that
table was not published; ``jaccard`` is computed as by IPViT (arXiv:2105.10497,
``evaluate_segmentation.py``), which repeats it: of each class in an image the best head counts, the
mean over an image's classes, then over images. Ignored pixels do not count.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.data.targets.checks import require_targets
from xcit_dino.data.targets.formats import Mask, ignored_value
from xcit_dino.data.targets.loader import Key, Pixels, one_pass
from xcit_dino.errors import InputError
from xcit_dino.eval.context import Context
from xcit_dino.eval.dense.config import MasksConfig
from xcit_dino.eval.pictures.attention import head_maps
from xcit_dino.eval.pictures.media import resize_to_patches
from xcit_dino.eval.results import write_result
from xcit_dino.eval.target import Network, networks, resolve
from xcit_dino.inputs import BYTES
from xcit_dino.models.xcit import XCiT
from xcit_dino.progress import track
from xcit_dino.train.amp import autocast, resolve_precision
from xcit_dino.train.distributed import dist

LISTED = 20  # classes in a message


@dataclass(frozen=True)
class Jaccards:
    """Sums over images with objects."""

    images: int
    without: int
    """Images without an object, which do not count."""
    best: float
    """Of the best head of each class, its mean over the classes of an image."""
    heads: NDArray[np.float64]
    """[h]: of each head, its mean over the classes of an image."""

    @property
    def metrics(self) -> dict[str, float]:
        """In percent."""
        heads = 100 * self.heads / self.images
        return {
            "jaccard": 100 * self.best / self.images,
            "jaccard_best_head": float(heads.max()),
            "jaccard_mean": float(heads.mean()),
        }


def run(config: MasksConfig) -> None:
    """Write ``masks`` (and ``masks/random``) to ``results.json``.

    Raises:
        InputError: not an XCiT, shards without masks, or none with an object.
    """
    world = dist.init(config.target.device)
    target, context = resolve(config.target, world)
    index = context.index(config.split)
    require_targets(index, "mask")
    check_background(config, index)
    for network in networks(config.target, target):
        if network.name == "pixels":
            continue  # they have no attention
        if not isinstance(network.model, XCiT):
            raise InputError(f"--arch {target.arch}: only XCiT has class attention to show")
        began = time.monotonic()
        found = measure(network, index, config, context)
        if not world.is_main:
            continue
        metrics = found.metrics
        shown = "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())
        print(f"masks, {network.name}: {shown}", flush=True)
        write_result(
            config.target.output_dir, f"masks{network.suffix}", metrics,
            protocol(config, context, network, index, found),
            heads=[round(100 * float(value) / found.images, 4) for value in found.heads],
            weights_file=target.weights.name if network.name == "pretrained" else None,
            wall_seconds=round(time.monotonic() - began, 2),
        )  # fmt: skip
    dist.barrier()


def check_background(config: MasksConfig, index: ShardIndex) -> None:
    """Raise InputError where ``--background`` names classes that there are not."""
    names = index.target_classes or []
    unknown = [number for number in config.background if names and number >= len(names)]
    if unknown:
        listed = ", ".join(f"{number} {name}" for number, name in enumerate(names[:LISTED]))
        raise InputError(f"--background {unknown[0]}: no such class; there are {listed}")


@dataclass(frozen=True)
class MaskedImage:
    """Loader transform: an image as the network takes it, and its mask in its own size."""

    image_size: int
    patch: int

    def __call__(self, pixels: Pixels, mask: Mask, key: Key) -> tuple[Pixels, Mask]:
        return np.array(resize_to_patches(pixels, self.image_size, self.patch)), mask


def measure(network: Network, index: ShardIndex, config: MasksConfig, context: Context) -> Jaccards:
    """The Jaccard indices of a network over a split, by all ranks together.

    Raises:
        InputError: no image has an object.
    """
    model, world = network.model.to(context.device), context.world
    assert isinstance(model, XCiT)
    dtype = resolve_precision(context.precision, context.device)
    first, last = (index.num_samples * (world.rank + i) // world.size for i in (0, 1))
    rows = []
    with dist.together():
        transform = MaskedImage(config.image_size, model.patch_size)
        samples = one_pass(index, context.loader, transform, range(first, last))
        for _, (image, mask) in track(samples, f"masks {network.name}", last - first, "images"):
            with autocast(context.device, dtype):
                maps = head_maps(model, image, config.layer, config.threshold, context)
            rows.append(jaccards(maps > 0, mask, config.background))
    found = [row for row in rows if len(row)]
    sums = np.zeros(3 + model.num_heads)
    sums[:2] = len(found), len(rows) - len(found)
    for row in found:
        sums[2] += row.max(1).mean()
        sums[3:] += row.mean(0)
    images, without, best, *heads = dist.on_all_ranks(torch.from_numpy(sums)).sum(0).tolist()
    if not images:
        raise InputError(
            f"--data_path {index.root}: no mask has a class besides --background "
            f"{' '.join(map(str, config.background))}"
        )
    return Jaccards(int(images), int(without), best, np.array(heads))


def jaccards(
    heads: NDArray[np.bool_], mask: Mask, background: tuple[int, ...]
) -> NDArray[np.float64]:
    """Intersection over union of each class of a mask [H, W] that is not background with the masks
    [h, rows, columns] of all heads, which are enlarged by nearest neighbors: [classes, h].
    """
    y, x = (
        ((np.arange(side) + 0.5) * cells / side).astype(np.int64)
        for side, cells in zip(mask.shape, heads.shape[1:], strict=True)
    )
    counts = mask != ignored_value(mask)
    large = heads[:, y[:, None], x] & counts
    found = [mask == value for value in np.unique(mask[counts]) if value not in background]
    return np.array(
        [(large & one).sum((1, 2)) / (large | one).sum((1, 2)) for one in found]
    ).reshape(len(found), len(heads))


def protocol(
    config: MasksConfig, context: Context, network: Network, index: ShardIndex, found: Jaccards
) -> dict[str, Any]:
    """Everything that affects the result."""
    inputs = context.inputs
    facts = network.facts | {
        "evaluation": "masks", "image_size": config.image_size, "layer": config.layer,
        "threshold": config.threshold, "background": list(config.background),
        "interpolation": "bicubic", "mean": list(inputs.mean), "std": list(inputs.std),
        "precision": config.target.precision, "val_index": index.checksum,
        "val_images": found.images, "images_without_objects": found.without,
        "unreadable": index.num_samples - found.images - found.without,
    }  # fmt: skip
    if inputs.window != BYTES:
        facts["window"] = [list(bounds) for bounds in inputs.window]
    if context.loader.bands:
        facts["bands"] = list(context.loader.bands)
    return facts
