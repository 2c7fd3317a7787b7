"""Linear probe on a frozen backbone, as a grid of heads trained in one pass (DINO
``eval_linear.py``, widened).

``--protocol cached`` trains on features of the center crop, extracted once. ``--protocol dino``
computes features of RandomResizedCrop + flip of every image in every epoch, as the official
code does. Both select learning rate, weight decay and layers on a held-out part of the training
images, and report a head with these hyper-parameters trained on all of them.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError
from xcit_dino.eval.config import LinearConfig
from xcit_dino.eval.context import Context
from xcit_dino.eval.features import (
    LAYERS,
    Features,
    count_classes,
    count_labels,
    kind_of_labels,
    load_features,
    wants_deep,
)
from xcit_dino.eval.linear_augmented import state_file, train_augmented
from xcit_dino.eval.linear_grid import (
    CHUNK,
    Choice,
    Heads,
    Probe,
    Table,
    best,
    fast_matmul,
    grid,
    hold_outs,
)
from xcit_dino.eval.results import write_result
from xcit_dino.eval.scores.few import check_classes, draw, mean_and_spread, subset
from xcit_dino.eval.scores.heads import accuracy, of_targets
from xcit_dino.eval.scores.metrics import lines_of
from xcit_dino.eval.scores.several import unscored
from xcit_dino.eval.target import Network, networks, resolve
from xcit_dino.files import locked, write_atomic
from xcit_dino.models.weights import formats
from xcit_dino.progress import progress
from xcit_dino.provenance import LOCK, digest
from xcit_dino.train.distributed import dist
from xcit_dino.train.schedules import cosine

HEAD_FILE = "linear_head.safetensors"


def run(config: LinearConfig) -> None:
    """Train the grid and write ``linear`` (and ``linear/random``, ``linear/pixels``) to
    ``results.json``.

    The head of the pretrained backbone is saved as ``linear_head.safetensors`` for ``evaluate``.

    Raises:
        InputError: bad options, unlabeled data, or too few images to hold some out.
    """
    world = dist.init(config.target.device)
    target, context = resolve(config.target, world)
    train, val = context.index("train"), context.index("val")
    kind = kind_of_labels(train, val)
    if kind and (config.protocol == "dino" or config.few.labels_per_class):
        option = "--protocol dino" if config.protocol == "dino" else "--labels_per_class"
        raise InputError(f"{option}: not for images with several labels or values; leave it out")
    num_classes = (count_labels if kind else count_classes)(train, val)
    name = "linear" if config.protocol == "cached" else "linear-dino"
    for network in networks(config.target, target):
        began = time.monotonic()
        choices = choices_for(config, network)
        facts = protocol(config, context, network, train) | kind
        deep = wants_deep(choice.layers for choice in choices)
        val_features = load_features(network, val, "val", context, deep)
        train_features = None
        if config.protocol == "cached":
            train_features = load_features(network, train, "train", context, deep)
        if train_features is not None and config.few.labels_per_class:
            few_labels(train_features, val_features, choices, num_classes, config, network, world,
                       facts | {"val_index": val.checksum}, began)  # fmt: skip
            continue
        if train_features is not None:
            probe = train_cached(train_features, choices, num_classes, config, world.device)
        elif network.name == "pixels":
            continue  # not defined for crops of raw pixels
        else:
            probe = train_augmented(network, train, context, choices, num_classes, config, facts)
        classes = train.target_classes if kind else train.classes or val.classes
        layers, heads = probe.choice.layers, (probe.weight, probe.bias)
        if kind:
            metrics, lines = of_targets(val_features, layers, *heads, classes or [])
        else:
            metrics, rows = accuracy(val_features, layers, *heads)
            lines = lines_of(rows, classes)
            metrics["holdout_top1"] = probe.scores[probe.chosen][0]
        if world.is_main:
            full_protocol = facts | {"val_index": val.checksum}
            print_result(network, probe.choice, metrics, config)
            if kind and (line := unscored(lines, classes or [])):
                print(line, flush=True)
            write_result(
                config.target.output_dir, f"{name}{network.suffix}", metrics, full_protocol,
                grid=[
                    asdict(choice) | ({"holdout_loss": loss} if kind else {"holdout_top1": top1})
                    for choice, (top1, loss) in zip(choices, probe.scores, strict=True)
                ],
                chosen=asdict(probe.choice),
                per_class=lines,
                val_images=len(val_features),
                weights_file=target.weights.name if network.name == "pretrained" else None,
                wall_seconds=round(time.monotonic() - began, 2),
            )  # fmt: skip
            if network.name == "pretrained":
                save_head(config.target.output_dir / HEAD_FILE, probe, full_protocol, classes)
            state_file(config, network, facts).unlink(missing_ok=True)
    dist.barrier()


def few_labels(
    train: Features,
    val: Features,
    choices: list[Choice],
    num_classes: int,
    config: LinearConfig,
    network: Network,
    world: dist.World,
    facts: dict[str, Any],
    began: float,
) -> None:
    """Train the grid on each draw of few labels, and write the means as ``linear-few``. The head is
    chosen by cross-validation on the few images."""
    few, found, chosen = config.few, [], []
    check_classes(train.labels, few.labels_per_class)
    for number in range(few.draws):
        rows = draw(train.labels, few.labels_per_class, few.draw_seed, number)
        probe = train_cached(subset(train, rows), choices, num_classes, config, world.device)
        metrics, _ = accuracy(val, probe.choice.layers, probe.weight, probe.bias)
        found.append(metrics)
        chosen.append(asdict(probe.choice))
    if world.is_main:
        metrics = mean_and_spread(found)
        shown = "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())
        print(f"linear probe, {network.name}, {few.labels_per_class} labels a class: {shown}")
        write_result(
            config.target.output_dir, f"linear-few{network.suffix}", metrics, facts,
            chosen_in_draws=chosen, val_images=len(val),
            wall_seconds=round(time.monotonic() - began, 2),
        )  # fmt: skip


def choices_for(config: LinearConfig, network: Network) -> list[Choice]:
    """The grid; networks other than XCiT have only the layer choice ``cls``.

    Raises:
        InputError: the options name others.
    """
    layers = config.layers
    if not hasattr(network.model, "get_intermediate"):
        if network.name == "pretrained" and layers not in (("cls",), LinearConfig.layers):
            raise InputError(
                f"--layers {' '.join(layers)}: {network.facts['arch']} has its output only; use "
                "--layers cls"
            )
        layers = ("cls",)
    return grid(layers, config.lrs, config.weight_decays)


def print_result(
    network: Network, choice: Choice, metrics: dict[str, float], config: LinearConfig
) -> None:
    """Print the result, and a hint if the grid was too narrow."""
    shown = [name for name in ("top1", "top5", "map", "r2") if name in metrics]
    print(
        f"linear probe, {network.name}: "
        f"{''.join(f'{name} {metrics[name]:.2f}  ' for name in shown)}"
        f"(lr {choice.lr:g}, weight decay {choice.weight_decay:g}, layers {choice.layers})",
        flush=True,
    )
    if len(config.lrs) > 1 and choice.lr in (min(config.lrs), max(config.lrs)):
        beyond = (2, 5) if choice.lr == max(config.lrs) else (0.5, 0.2)
        wider = sorted({*config.lrs, *(choice.lr * factor for factor in beyond)})
        print(
            f"  lr {choice.lr:g} is at the edge of the grid, and the best may lie beyond it: add "
            f"--lrs {' '.join(f'{lr:g}' for lr in wider)}",
            flush=True,
        )


# -- training on cached features -------------------------------------------------------------------


def train_cached(
    features: Features,
    choices: list[Choice],
    num_classes: int,
    config: LinearConfig,
    device: torch.device,
) -> Probe:
    """Train the grid on extracted features without the held-out images, part after part where they
    are few, then the best choice alone on all of them; every rank does the same work, as the
    heads are small."""
    names = sorted({block for choice in choices for block in LAYERS[choice.layers]})
    table = Table(features, names, device)
    mean, std = table.standardize()
    parts = hold_outs(table.labels, config.holdout, config.seed)
    scores = score_choices(table, parts, choices, num_classes, config)
    chosen = best(scores, by_loss=table.labels.ndim == 2 or not parts)
    everyone, chosen_one = torch.arange(len(features)), [choices[chosen]]
    what = "the best head, on all images"
    final = fit(table, everyone, chosen_one, num_classes, config, what)
    weight, bias = final.head(0)
    return Probe(choices, scores, chosen, weight * std[:, None], bias * std + mean)


def score_choices(
    table: Table, parts: list[Tensor], choices: list[Choice], num_classes: int, config: LinearConfig
) -> list[tuple[float, float]]:
    """(accuracy, cross-entropy) of each choice on the held-out images, trained on the others; the
    mean over all that are held out in a part. Without a part: on the images trained on."""
    everyone = torch.ones(len(table.labels), dtype=torch.bool)
    found, weights = [], []
    turns = [(~part, part) for part in parts] or [(everyone, everyone)]
    for number, (trained, tried) in enumerate(turns, start=1):
        what = f"{len(choices)} linear heads"
        what += f", part {number} of {len(turns)} held out" if len(turns) > 1 else ""
        heads = fit(table, torch.nonzero(trained).squeeze(1), choices, num_classes, config, what)
        rows = torch.nonzero(tried).squeeze(1)
        found.append(heads.score(table.rows(some) for some in rows.split(CHUNK)))
        weights.append(len(rows))
    if len(found) == 1:
        return found[0]
    means = np.average(np.array(found), axis=0, weights=weights)
    return [(float(top1), float(loss)) for top1, loss in means]


def fit(
    table: Table,
    images: Tensor,
    choices: list[Choice],
    num_classes: int,
    config: LinearConfig,
    what: str,
) -> Heads:
    """Train heads on some rows of a table. images: int64 (n,); what: they are called."""
    size = min(config.probe_batch_size, len(images))
    heads = Heads(choices, table.dims, num_classes, size, config.seed, table.device)
    steps = len(images) // size  # an epoch's last, smaller batch is dropped
    generator = torch.Generator().manual_seed(config.seed)
    with progress(what, config.epochs, "epochs") as bar, fast_matmul():
        for epoch in range(config.epochs):
            order = images[torch.randperm(len(images), generator=generator)[: steps * size]]
            for step, rows in enumerate(order.view(steps, size)):
                factor = cosine(epoch * steps + step, config.epochs * steps, 1.0, 0.0)
                heads.step(*table.rows(rows), factor)
            bar.advance()
    return heads


# -- saving a head ---------------------------------------------------------------------------------


def save_head(path: Path, probe: Probe, facts: dict[str, Any], classes: list[str] | None) -> None:
    """``weight`` (C, D) and ``bias`` (C,) as safetensors; metadata: layers, protocol, class names.

    As in results.json, the head of another protocol moves to ``linear_head@DIGEST.safetensors``.
    A file called ``path`` exists at every moment, as `evaluate` may read it.
    """
    from safetensors.torch import save

    tensors = {"weight": probe.weight.cpu().contiguous(), "bias": probe.bias.cpu().contiguous()}
    metadata = {
        "layers": probe.choice.layers,
        "protocol": json.dumps(facts),
        "classes": json.dumps(classes),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent / LOCK):
        if before := protocol_of(path):
            write_atomic(
                path.with_stem(f"{path.stem}@{digest(json.loads(before))}"), path.read_bytes()
            )
        path.with_stem(f"{path.stem}@{digest(facts)}").unlink(missing_ok=True)
        write_atomic(path, save(tensors, metadata))


def protocol_of(path: Path) -> str:
    """The protocol of a saved head, as JSON; empty if there is none."""
    try:
        return formats.metadata(path).get("protocol", "")
    except (OSError, SafetensorError):
        return ""


def protocol(
    config: LinearConfig, context: Context, network: Network, train: ShardIndex
) -> dict[str, Any]:
    """Everything that must match for two linear accuracies to be comparable, apart from the
    validation images; and everything that the training of the heads depends on."""
    dino = config.protocol == "dino"
    return (
        network.facts
        | context.protocol
        | config.few.protocol
        | {
            "evaluation": "linear",
            "protocol": config.protocol,
            "epochs": config.epochs,
            "batch": context.batch_size * context.world.size if dino else config.probe_batch_size,
            "lrs": sorted(config.lrs),
            "weight_decays": sorted(config.weight_decays),
            "layers": list(config.layers),
            "chosen_on": "the few images, cross-validated"
            if config.few.labels_per_class
            else f"{100 * config.holdout:g} % of the training images, held out",
            "augmentation": "RandomResizedCrop + flip" if dino else "none",
            "precision": config.target.precision,
            "seed": config.seed,
            "train_index": train.checksum,
        }
    )
