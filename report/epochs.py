"""The report's slider through the training: crops, attention and nearest neighbors of the same
images by every checkpoint that the run has kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError
from xcit_dino.eval import neighbors
from xcit_dino.eval.pictures import render
from xcit_dino.models.checkpoints import FOLDER, all_checkpoints, is_intact, step_of
from xcit_dino.models.xcit import XCiT
from xcit_dino.options import replace
from xcit_dino.report.images import Images, tile
from xcit_dino.report.learned import effective_rank, nearest
from xcit_dino.report.page import Tile, sentence
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.forgetting import neighbors_kept
from xcit_dino.train.run.reader import Run

MOST_FRAMES = 6  # checkpoints that are shown, evenly spaced; each costs as much as COMPUTED says
PHOTOS, QUERIES = 4, 4


@dataclass(frozen=True)
class Frame:
    """What one checkpoint shows."""

    title: str
    facts: str
    parts: dict[str, list[list[Tile]]]
    """Title -> rows of tiles."""


def through_epochs(images: Images) -> dict[str, Any]:
    """A frame per kept checkpoint, oldest first; {} where fewer than two are intact."""
    run = images.run
    if run.kind != "pretrain":
        return {}
    kept = all_checkpoints(run.folder / FOLDER)
    kept = [kept[n] for n in neighbors.evenly_spaced(len(kept), MOST_FRAMES)]
    frames, before = [], None
    for path in kept if len(kept) > 1 else ():
        if is_intact(path):
            frame, before = frame_of(images, path, before)
            frames.append(frame)
    return {"frames": frames} if len(frames) > 1 else {}


def frame_of(images: Images, weights: Path, before: np.ndarray | None) -> tuple[Frame, np.ndarray]:
    """What a checkpoint shows, and its features, float32 [N, D].

    before: features of the same images by the previous one.
    """
    network, step = images.network_of(weights), step_of(weights)
    found = images.embed(network)
    facts = [f"effective rank of the features {effective_rank(found.features):.1f}"]
    if (accuracy := logged(images.run, "knn_top1", step)) is not None:
        facts.insert(0, f"k-NN, top-1, {accuracy:.1f} %")
    if before is not None and len(before) == len(found.features):
        kept = neighbors_kept(before, found.features)
        facts.append(
            f"{1 - kept:.0%} of the nearest neighbors are others than by the checkpoint before"
        )
    epoch = epoch_of(images.run, step)
    title = f"step {step:,}" if epoch is None else f"epoch {epoch:g}, step {step:,}"
    parts = {"Nearest neighbors": neighbor_rows(images, found.samples, found.features)}
    if isinstance(network, XCiT):
        parts = {"Attention, mean of the heads": attention_row(images, network)} | parts
    parts["Crops"] = crop_rows(images, epoch)
    return Frame(title, sentence("; ".join(facts)), parts), found.features


def logged(run: Run, name: str, step: int) -> float | None:
    """The value of a metric at a step."""
    return next((line[name] for line in run.metrics if line["step"] == step and name in line), None)


def epoch_of(run: Run, step: int) -> float | None:
    """Epochs done at a step; None where the length of the run is not known."""
    total = next((line["total_steps"] for line in run.tries if "total_steps" in line), 0)
    epochs = run.config.get("epochs")
    return round(step * epochs / total, 2) if total and epochs else None


def photo_index(images: Images) -> ShardIndex:
    """Validation images, else those of training."""
    try:
        return images.val
    except InputError:
        return images.train


def attention_row(images: Images, network: XCiT) -> list[list[Tile]]:
    """Pairs of a photo and the mean attention of its heads, in one row."""
    index = photo_index(images)
    samples = neighbors.evenly_spaced(index.num_samples, PHOTOS + 2)[1:-1].tolist()
    rows = render.attention_rows(
        network, list(images.views(index, samples).values()), images.context
    )
    pairs = ((tile(row[0], "photo"), tile(row[-1], "attention")) for row in rows)
    return [[each for pair in pairs for each in pair]]


def neighbor_rows(images: Images, samples: np.ndarray, features: np.ndarray) -> list[list[Tile]]:
    """One row per query: the image and its nearest others."""
    queries = neighbors.evenly_spaced(len(samples), QUERIES)
    rows, cosines = nearest(features, queries)
    numbers = samples[np.column_stack((queries, rows))]
    photos = images.photos(images.train, numbers.ravel().tolist())
    shown = []
    for (query, *others), values in zip(numbers.tolist(), cosines.tolist(), strict=True):
        if query in photos:
            pairs = [(n, v) for n, v in zip(others, values, strict=True) if n in photos]
            row = [tile(photos[n], f"{value:.2f}") for n, value in pairs]
            shown.append([tile(photos[query], "image", "query"), *row])
    return shown


def crop_rows(images: Images, epoch: float | None) -> list[list[Tile]]:
    """The crops of one training image in the epoch that led to a checkpoint."""
    config = replace(PretrainConfig(), images.options | {"cache_dir": None})
    made = render.TrainingCrops(config.stages, config.augment, config.loader, config.run.seed)
    sample = neighbors.evenly_spaced(images.train.num_samples, 3)[1:2].tolist()
    at = max(0, int(np.ceil(epoch or 1)) - 1)
    (row,) = render.training_crops(made, images.train, sample, at, images.context)
    count = config.crops.global_crops_number
    names = [f"global {n + 1}" for n in range(count)]
    names += [f"local {n + 1}" for n in range(len(row) - count)]
    return [[tile(crop, name) for crop, name in zip(row, names, strict=True)]]
