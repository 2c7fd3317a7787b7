"""Accuracy of a classifier on the validation images: a checkpoint, or a backbone and a linear
head."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError
from xcit_dino.eval.config import EvaluateConfig
from xcit_dino.eval.context import Context
from xcit_dino.eval.features import LAYERS, count_classes, load_features
from xcit_dino.eval.ranges import OutputRange, warn_constant
from xcit_dino.eval.results import write_result
from xcit_dino.eval.scores.heads import accuracy, topk_hits
from xcit_dino.eval.scores.label_map import LabelMap, read_map
from xcit_dino.eval.scores.metrics import ClassRow, Scores, class_means, class_rows, lines_of
from xcit_dino.eval.target import EvalTarget, Network, pretrained, resolve
from xcit_dino.files import file_checksum
from xcit_dino.models.weights import formats
from xcit_dino.models.weights.load import count_outputs, load_backbone, load_linear
from xcit_dino.models.zoo import create_model
from xcit_dino.train.distributed import dist


def run(config: EvaluateConfig) -> None:
    """Write ``evaluate`` (or ``evaluate/head``) with top-1, top-5 and metrics over classes to
    ``results.json``.

    Raises:
        InputError: bad options, unlabeled data, or weights of another architecture or class count.
    """
    world = dist.init(config.target.device)
    target, context = resolve(config.target, world)
    val = context.index("val")
    num_classes = count_classes(val)
    began = time.monotonic()
    if config.head is None:
        metrics, rows, facts = classifier_accuracy(
            target, context, val, num_classes, config.label_map
        )
    else:
        metrics, rows, facts = head_accuracy(
            config.head, target, context, val, num_classes, config.label_map
        )
    if world.is_main:
        print("  ".join(f"{name} {value:.2f}" for name, value in metrics.items()), flush=True)
        write_result(
            config.target.output_dir,
            "evaluate" if config.head is None else "evaluate/head",
            metrics,
            facts
            | context.protocol
            | {
                "evaluation": "evaluate",
                "precision": config.target.precision,
                "val_index": val.checksum,
            },
            per_class=lines_of(rows, val.classes),
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
) -> tuple[dict[str, float], list[ClassRow], dict[str, object]]:
    """(metrics in percent, each class, facts) of a checkpoint with its own head; ranks split the
    images."""
    world = context.world
    model = create_model(target.arch, num_classes=num_classes, in_chans=target.channels)
    label_map = None
    if map_file is not None:
        outputs = count_outputs(target.weights, target.checkpoint_key, model)
        label_map = read_map(map_file, val.classes, outputs)
        model = create_model(target.arch, num_classes=outputs, in_chans=target.channels)
    report = load_backbone(target.weights, model, target.checkpoint_key, head="required")
    if world.is_main:
        print(report, flush=True)
    model = model.to(world.device).eval()
    first, last = (val.num_samples * (world.rank + i) // world.size for i in (0, 1))
    hits = torch.zeros(3, dtype=torch.float64)  # top-1, top-5, images
    ranges = OutputRange(num_classes, world.device)
    scores = Scores(val.num_samples, num_classes)
    with torch.inference_mode():
        for outputs, samples in context.batches(
            lambda images: {"logits": mapped(model(images), label_map)},
            val,
            np.arange(first, last),
            "evaluate",
        ):
            ranges.add(outputs["logits"])
            labels = torch.from_numpy(val.labels[samples].astype(np.int64)).to(world.device)
            hits[:2] += topk_hits(outputs["logits"], labels)
            hits[2] += len(samples)
            scores.add(outputs["logits"].softmax(1), labels)
    if ranges.constant() and world.is_main:
        warn_constant("the classifier's outputs")
    if world.size > 1:
        torch.distributed.all_reduce(hits)
    top1, top5, count = hits.tolist()
    facts = {
        **report.facts,
        "arch": target.arch,
        "weights": file_checksum(target.weights),
        "val_images": int(count),
        **({"label_map": label_map.checksum} if label_map else {}),
    }
    rows = class_rows(scores.gathered())
    metrics = {"top1": 100 * top1 / count, "top5": 100 * top5 / count} | class_means(rows)
    return metrics, rows, facts


def head_accuracy(
    head: Path,
    target: EvalTarget,
    context: Context,
    val: ShardIndex,
    num_classes: int,
    map_file: Path | None = None,
) -> tuple[dict[str, float], list[ClassRow], dict[str, object]]:
    """(metrics in percent, each class, facts) of a backbone and a head saved by a linear probe."""
    network = pretrained(target)
    checksum, layers, weight, bias = read_head(head)
    features = load_features(network, val, "val", context)
    label_map = None if map_file is None else read_map(map_file, val.classes, len(weight))
    outputs = num_classes if label_map is None else len(weight)
    check_head(head, layers, weight, network, features.blocks, outputs)
    metrics, rows = accuracy(
        features, layers, weight.to(context.device), bias.to(context.device), label_map
    )
    facts = {"head": checksum, "layers": layers, "val_images": len(features)}
    facts |= {"label_map": label_map.checksum} if label_map else {}
    return metrics, rows, network.facts | facts


def mapped(logits: Tensor, label_map: LabelMap | None) -> Tensor:
    """Logits of the data's classes."""
    return logits if label_map is None else label_map(logits)


def read_head(path: Path) -> tuple[str, str, Tensor, Tensor]:
    """(checksum, layer choice, weight (C, D), bias (C,)) of a head of ours, or of an official one;
    read consistently, even if `linear` replaces the file meanwhile."""
    checksum = ""
    while True:
        weight, bias = load_linear(path)
        facts = formats.metadata(path) if path.suffix == ".safetensors" else {}
        before, checksum = checksum, file_checksum(path)
        if checksum == before:
            return checksum, facts.get("layers", "cls"), weight.float(), bias.float()


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
