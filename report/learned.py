"""Did it learn? The report's answer where no accuracy gives it: the run's network beside a randomly
initialized one, on the training images, without labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xcit_dino.errors import InputError
from xcit_dino.eval import neighbors
from xcit_dino.eval.features import eval_mode, feature_blocks
from xcit_dino.eval.pictures import render
from xcit_dino.models.checkpoints import FOLDER, all_checkpoints, step_of
from xcit_dino.options import replace
from xcit_dino.report import compare
from xcit_dino.report.images import Images, tile
from xcit_dino.report.page import Tile, sentence
from xcit_dino.report.training import last_step
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.diagnostics import LOW_RANK, health
from xcit_dino.ssl.forgetting import neighbors_kept
from xcit_dino.train.run.reader import EVALUATIONS, Run
from xcit_dino.train.state import newest_checkpoint

QUERIES, SHOWN = 6, 7
MOST_CACHED = 20_000  # cached features that are compared
MOST_VIEWS = 256  # images of which two crops are compared
FEW_STEPS = 500  # in docs/benchmarks.md, runs of 550 steps are ahead of random weights
NO_SIGN = "No sign of learning."
CONSIDERED = 10  # neighbors of each image that are compared between two networks
Line = tuple[str, str]
"""A verdict and its reasons."""


@dataclass(frozen=True)
class Pair:
    """Features of the same images by the run's network and by a random one."""

    samples: np.ndarray
    """int64 [N], sample numbers of the training split."""
    ours: np.ndarray
    """float32 [N, D]."""
    random: np.ndarray
    """float32 [N, D]."""


def did_it_learn(images: Images) -> dict[str, Any]:
    """The verdict in numbers, and the neighbors of a few images by both networks; {} where an
    accuracy beside that of random weights answers the question."""
    run = images.run
    if run.kind != "pretrain" or beside_random(run):
        return {}
    pair = features_of_both(images)
    matched = views_matched(images, pair.samples)
    (word, reasons), early = verdict(run, pair, matched), too_few(run)
    if early and word == NO_SIGN:
        lines = [*early, ("No sign of learning yet.", reasons)]
    else:
        lines = [(word, reasons), *early]
    return {"lines": lines, "summary": how(images, pair), "groups": {"": shown(images, pair)}}


def beside_random(run: Run) -> bool:
    """Whether a newest accuracy stands beside that of random weights by the same protocol."""
    newest = {name: entry for name in EVALUATIONS if (entry := run.entry(name))}
    return any(compare.baseline(run, entry, f"{name}/random") for name, entry in newest.items())


def features_of_both(images: Images) -> Pair:
    """Features of at most ``MOST_CACHED`` images by both networks."""
    ours, random = features_by(images, "pretrained"), features_by(images, "random")
    samples, a, b = np.intersect1d(ours[0], random[0], return_indices=True)
    chosen = neighbors.evenly_spaced(len(samples), MOST_CACHED)
    return Pair(samples[chosen], ours[1][a[chosen]], random[1][b[chosen]])


def features_by(images: Images, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(sample numbers, features) of a network: those in the cache (of ``embed``, with
    ``--baselines true`` of a random network too), else computed for some images."""
    try:
        with neighbors.load_cached(images.context, "train", images.train, network=name) as found:
            table, seen, _ = found
            return seen, table if len(seen) == len(table) else table[seen]
    except InputError:
        found = images.embedded if name == "pretrained" else images.embed(images.untrained)
        return found.samples, found.features


def views_matched(images: Images, samples: np.ndarray) -> tuple[float, float, int] | None:
    """(ours, random, images): share of images whose second augmented crop is nearer to the first
    than that of any other image; None without a checkpoint, or without two global crops."""
    config = replace(PretrainConfig(), images.options | {"cache_dir": None})
    weights = newest_checkpoint(images.run.folder)
    if config.crops.global_crops_number < 2 or weights is None:
        return None
    most = min(MOST_VIEWS, images.affordable(images.untrained))
    numbers = samples[neighbors.evenly_spaced(len(samples), most)].tolist()
    made = render.TrainingCrops(config.stages, config.augment, config.loader, config.run.seed)
    epoch = max(0, config.run.epochs - 1)
    crops = render.network_crops(made, images.train, numbers, epoch)[0][: 2 * len(numbers)]
    ours, random = (match(network, crops) for network in (images.network, images.untrained))
    return ours, random, len(numbers)


@torch.inference_mode()
def match(network: nn.Module, crops: Tensor) -> float:
    """Share of the first crops of N images whose nearest second crop is of the same image.

    Args:
        network: a backbone.
        crops: [2N, C, H, W], the first crop of each image, then the second.
    """
    with eval_mode(network):
        found = [feature_blocks(network, part)["cls"] for part in crops.split(64)]
    first, second = np.split(neighbors.centered_rows(torch.cat(found).float().numpy()), 2)
    return float(((first @ second.T).argmax(1) == np.arange(len(first))).mean())


def effective_rank(features: np.ndarray) -> float:
    """Directions in use, as logged during training (ssl/diagnostics.py)."""
    return float(health(torch.zeros(()), None, torch.from_numpy(features))["effective_rank"])


def verdict(run: Run, pair: Pair, matched: tuple[float, float, int] | None) -> Line:
    """A word, and the numbers behind it."""
    ranks = effective_rank(pair.ours), effective_rank(pair.random)
    kept = neighbors_kept(pair.random, pair.ours, CONSIDERED)
    facts = [
        f"effective rank of the features {ranks[0]:.1f}, of a random network {ranks[1]:.1f}",
        f"{1 - kept:.0%} of each image's {min(CONSIDERED, len(pair.samples) - 1)} nearest "
        "neighbors are others than by the random network",
        *loss_facts(run),
    ]
    word = "The network differs from a random one."
    if matched:
        ours, random, count = matched
        facts.insert(
            0,
            f"of {count:,} images, {ours:.0%} are recognized in another augmented crop (their "
            f"nearest is of the same image), {random:.0%} by a random network",
        )
        word = "It learned." if clearly(ours, random, count) else NO_SIGN
    if ranks[0] < LOW_RANK:
        word = "The features have collapsed."
    return word, sentence("; ".join(facts))


def clearly(share: float, other: float, count: int) -> bool:
    """Whether a share of ``count`` images is larger than another by two standard errors."""
    variance = (share * (1 - share) + other * (1 - other)) / count
    return share - other > 2 * math.sqrt(variance)


def loss_facts(run: Run) -> list[str]:
    """The last loss beside that of outputs that are the same for every image."""
    lines = [line for line in run.metrics if {"kl", "teacher_entropy"} <= line.keys()]
    prototypes = run.config.get("out_dim")
    if not lines or not prototypes:
        return []
    loss = lines[-1]["kl"] + lines[-1]["teacher_entropy"]
    uniform = math.log(prototypes)
    return [f"loss {loss:.2f}, of uniform outputs {uniform:.2f} (ln {prototypes:,})"]


def too_few(run: Run) -> list[Line]:
    """A line where the run is too short to judge."""
    saved = [step_of(path) for path in all_checkpoints(run.folder / FOLDER)]
    steps = max(last_step(run), *saved, 0)
    total = next((t["total_steps"] for t in run.tries if "total_steps" in t), 0)
    warmup = total * run.config.get("warmup_epochs", 0) / max(run.config.get("epochs", 1), 1)
    if steps < warmup:
        reason = f"{steps:,} steps: the learning rate is still rising, until step {warmup:,.0f}."
    elif steps < FEW_STEPS:
        reason = f"{steps:,} steps; differences below {FEW_STEPS:,} steps say little either way."
    else:
        return []
    return [("Too few steps to judge.", reason)]


def how(images: Images, pair: Pair) -> str:
    """What the pictures are."""
    count, total = len(pair.samples), images.train.num_samples
    among = f"all {total:,}" if count == total else f"{count:,} of the {total:,}"
    return (
        f"The most similar of {among} training images, by the trained network and by a random one, "
        "with the cosine similarity of their features once the mean feature is subtracted: 0 is "
        "any two images, 1 the same."
    )


def shown(images: Images, pair: Pair) -> list[list[Tile]]:
    """Two rows per query: its neighbors by the trained network, and by the random one."""
    queries = neighbors.evenly_spaced(len(pair.samples), QUERIES)
    found = [nearest(features, queries) for features in (pair.ours, pair.random)]
    used = {int(n) for rows, _ in found for n in pair.samples[rows].ravel()}
    photos = images.photos(images.train, sorted(used | set(pair.samples[queries].tolist())))
    tiles = []
    for place, query in enumerate(pair.samples[queries].tolist()):
        if query not in photos:
            continue
        for name, (rows, cosines) in zip(("trained", "random weights"), found, strict=True):
            numbers = zip(pair.samples[rows[place]].tolist(), cosines[place].tolist(), strict=True)
            row = [tile(photos[n], f"{cosine:.2f}") for n, cosine in numbers if n in photos]
            tiles.append([tile(photos[query], name, "query"), *row])
    return tiles


def nearest(
    features: np.ndarray, rows: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [Q, k] rows, float32 [Q, k] cosines relative to the mean feature) of the most similar
    others of some rows of a table."""
    return neighbors.nearest_others(neighbors.centered_rows(features), np.asarray(rows), SHOWN)
