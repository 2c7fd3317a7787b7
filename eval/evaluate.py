"""Accuracy of a classifier on the validation images: a checkpoint, or a backbone and a linear
head."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.data.targets.several import target_table
from xcit_dino.errors import InputError, warn
from xcit_dino.eval.config import EvaluateConfig
from xcit_dino.eval.context import Context
from xcit_dino.eval.features import (
    LAYERS,
    count_classes,
    count_labels,
    kind_of_labels,
    load_features,
    wants_deep,
)
from xcit_dino.eval.ranges import OutputRange, warn_constant
from xcit_dino.eval.results import write_result
from xcit_dino.eval.scores.heads import accuracy, of_targets, target_scores, topk_hits
from xcit_dino.eval.scores.label_map import LabelMap, read_map
from xcit_dino.eval.scores.metrics import Scores, class_means, class_rows, lines_of
from xcit_dino.eval.scores.several import unscored
from xcit_dino.eval.target import EvalTarget, Network, pretrained, resolve
from xcit_dino.files import file_checksum
from xcit_dino.models.weights import formats
from xcit_dino.models.weights.load import LoadReport, count_outputs, load_backbone, load_linear
from xcit_dino.models.zoo import create_model
from xcit_dino.train.distributed import dist

Scored = tuple[dict[str, float], list[str], dict[str, object]]
"""Metrics, lines of each class (label, value), facts for the protocol."""


def run(config: EvaluateConfig) -> None:
    """Write ``evaluate`` (or ``evaluate/head``) to ``results.json``: top-1, top-5 and metrics over
    classes, or the metrics of several labels or values an image.

    Raises:
        InputError: bad options, unlabeled data, or weights of another architecture or class count.
    """
    world = dist.init(config.target.device)
    target, context = resolve(config.target, world)
    val = context.index("val")
    kind = kind_of_labels(val)
    if kind and config.label_map:
        raise InputError("--label_map: not for images with several labels or values; leave it out")
    num_classes = (count_labels if kind else count_classes)(val)
    began = time.monotonic()
    if config.head is not None:
        metrics, lines, facts = head_accuracy(
            config.head, target, context, val, num_classes, config.label_map
        )
    elif kind:
        metrics, lines, facts = classifier_targets(target, context, val)
    else:
        metrics, lines, facts = classifier_accuracy(
            target, context, val, num_classes, config.label_map
        )
    if world.is_main:
        print("  ".join(f"{name} {value:.2f}" for name, value in metrics.items()), flush=True)
        if kind and (line := unscored(lines, val.target_classes or [])):
            print(line, flush=True)
        write_result(
            config.target.output_dir,
            "evaluate" if config.head is None else "evaluate/head",
            metrics,
            facts
            | kind
            | context.protocol
            | {
                "evaluation": "evaluate",
                "precision": config.target.precision,
                "val_index": val.checksum,
            },
            per_class=lines,
            weights_file=target.weights.name,
            wall_seconds=round(time.monotonic() - began, 2),
        )
    dist.barrier()


def classifier_accuracy(
    target: EvalTarget,
    context: Context,
    val: ShardIndex,
    num_classes: int,
    map_file: Path | None = None,
) -> Scored:
    """Of a checkpoint with its own head; ranks split the images."""
    world, outputs, label_map = context.world, num_classes, None
    if map_file is not None:
        empty = create_model(target.arch, num_classes=num_classes, in_chans=target.channels)
        outputs = count_outputs(target.weights, target.checkpoint_key, empty)
        label_map = read_map(map_file, val.classes, outputs)
    model, report = load_classifier(target, context, outputs)
    first, last = (val.num_samples * (world.rank + i) // world.size for i in (0, 1))
    hits = torch.zeros(3, dtype=torch.float64)  # top-1, top-5, images
    ranges = OutputRange(num_classes, world.device)
    scores = Scores(val.num_samples, num_classes)
    with torch.inference_mode():
        for found, samples in context.batches(
            lambda images: {"logits": mapped(model(images), label_map)},
            val,
            np.arange(first, last),
            "evaluate",
        ):
            ranges.add(found["logits"])
            labels = torch.from_numpy(val.labels[samples].astype(np.int64)).to(world.device)
            hits[:2] += topk_hits(found["logits"], labels)
            hits[2] += len(samples)
            scores.add(found["logits"].softmax(1), labels)
    if ranges.constant() and world.is_main:
        warn_constant("the classifier's outputs")
    if world.size > 1:
        torch.distributed.all_reduce(hits)
    top1, top5, count = hits.tolist()
    facts = classifier_facts(report, target, int(count))
    facts |= {"label_map": label_map.checksum} if label_map else {}
    rows = class_rows(scores.gathered())
    metrics = {"top1": 100 * top1 / count, "top5": 100 * top5 / count} | class_means(rows)
    return metrics, lines_of(rows, val.classes), facts


def classifier_targets(target: EvalTarget, context: Context, val: ShardIndex) -> Scored:
    """Of a checkpoint whose own head has an output for each of several labels or values; ranks
    split the images."""
    world, names = context.world, val.target_classes or []
    model, report = load_classifier(target, context, len(names))
    table, known = target_table(val, context.loader)
    own = np.array_split(np.flatnonzero(known), world.size)[world.rank]
    parts = [(np.empty((0, len(names)), np.float32), np.empty(0, np.int64))]
    with torch.inference_mode():
        batches = context.batches(
            lambda images: {"outputs": model(images)}, val, own, "evaluate", labeled=False
        )
        for found, samples in batches:
            parts.append((found["outputs"].float().cpu().numpy(), np.asarray(samples)))
    every: list[Any] = [parts] * world.size
    if world.size > 1:
        torch.distributed.all_gather_object(every, parts)
    outputs, samples = map(
        np.concatenate, zip(*(part for parts in every for part in parts), strict=True)
    )
    metrics, lines = target_scores(outputs, table[samples], names, logits=True)
    return metrics, lines, classifier_facts(report, target, len(samples))


def load_classifier(
    target: EvalTarget, context: Context, outputs: int
) -> tuple[nn.Module, LoadReport]:
    """A network with its own head, of so many outputs, in evaluation mode on the device."""
    model = create_model(target.arch, num_classes=outputs, in_chans=target.channels)
    report = load_backbone(target.weights, model, target.checkpoint_key, head="required")
    if context.world.is_main:
        print(report, flush=True)
    return model.to(context.device).eval(), report


def classifier_facts(report: LoadReport, target: EvalTarget, images: int) -> dict[str, object]:
    """Of the protocol."""
    return {
        **report.facts,
        "arch": target.arch,
        "weights": file_checksum(target.weights),
        "val_images": images,
    }


def head_accuracy(
    head: Path,
    target: EvalTarget,
    context: Context,
    val: ShardIndex,
    num_classes: int,
    map_file: Path | None = None,
) -> Scored:
    """Of a backbone and a head saved by a linear probe."""
    network = pretrained(target)
    checksum, facts, weight, bias = read_head(head)
    layers = facts.get("layers", "cls")
    check_kind(head, facts, val)
    warn_of_others(head, facts, network.facts | context.protocol)
    features = load_features(network, val, "val", context, wants_deep([layers]))
    label_map = None if map_file is None else read_map(map_file, val.classes, len(weight))
    outputs = num_classes if label_map is None else len(weight)
    check_head(head, layers, weight, network, features.blocks, outputs)
    weight, bias = weight.to(context.device), bias.to(context.device)
    if kind_of_labels(val):
        metrics, lines = of_targets(features, layers, weight, bias, val.target_classes or [])
    else:
        metrics, rows = accuracy(features, layers, weight, bias, label_map)
        lines = lines_of(rows, val.classes)
    found = {"head": checksum, "layers": layers, "val_images": len(features)}
    found |= {"label_map": label_map.checksum} if label_map else {}
    return metrics, lines, network.facts | found


def mapped(logits: Tensor, label_map: LabelMap | None) -> Tensor:
    """Logits of the data's classes."""
    return logits if label_map is None else label_map(logits)


def read_head(path: Path) -> tuple[str, dict[str, str], Tensor, Tensor]:
    """(checksum, what the file says of itself, weight (C, D), bias (C,)) of a head of ours, or of
    an official one; read consistently, even if `linear` replaces the file meanwhile."""
    checksum = ""
    while True:
        weight, bias = load_linear(path)
        facts = formats.metadata(path) if path.suffix == ".safetensors" else {}
        before, checksum = checksum, file_checksum(path)
        if checksum == before:
            return checksum, facts, weight.float(), bias.float()


def check_kind(path: Path, facts: dict[str, str], val: ShardIndex) -> None:
    """Check that a head of ours was trained on what the images have: one label, the same several
    labels, or the same values.

    Raises:
        InputError: it was not.
    """
    if "protocol" not in facts:
        return
    trained = json.loads(facts["protocol"]).get("labels", "one an image")
    found = kind_of_labels(val).get("labels", "one an image")
    names = json.loads(facts.get("classes", "null")) if found != "one an image" else None
    if trained != found or names != (val.target_classes if names else None):
        mine, theirs = (
            f"{kind} ({', '.join(of[:5])})" if of else kind
            for kind, of in ((trained, names), (found, val.target_classes))
        )
        raise InputError(
            f"--head {path}: its labels are {mine}, and those of the data {theirs}; train a head "
            "on these data with xcit-dino linear"
        )


def warn_of_others(path: Path, facts: dict[str, str], now: dict[str, Any]) -> None:
    """Print in what the features that a head of ours was trained on differ from these."""
    trained = json.loads(facts.get("protocol", "{}"))
    now = json.loads(json.dumps(now))
    names = [name for name in now if name in trained and trained[name] != now[name]]
    if names and dist.is_main():
        found = " and ".join("weights file" if name == "weights" else name for name in names)
        warn(f"--head {path}: was trained on features of another {found}")


def check_head(
    path: Path,
    layers: str,
    weight: Tensor,
    network: Network,
    blocks: dict[str, np.ndarray],
    num_classes: int,
) -> None:
    """Check that the head fits backbone and data.

    Raises:
        InputError: other features or other classes; names both.
    """
    missing = [block for block in LAYERS.get(layers, (layers,)) if block not in blocks]
    width = 0 if missing else sum(blocks[block].shape[1] for block in LAYERS[layers])
    if missing or width != weight.shape[1]:
        raise InputError(
            f"--head {path}: was trained on {weight.shape[1]} features ({layers}), and "
            f"{network.facts['arch']} has {width or 'no such features'}; name the backbone it "
            "belongs to with --arch and --pretrained_weights"
        )
    if len(weight) != num_classes:
        raise InputError(
            f"--head {path}: has {len(weight)} classes, and the data have {num_classes}; "
            "train a head on these data with xcit-dino linear, or give a --label_map"
        )
