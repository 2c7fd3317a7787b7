"""Accuracy of classifiers in training, on all ranks together, and its place in ``results.json``."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from xcit_dino.data.index import ShardIndex
from xcit_dino.data.loader import ImageLoader
from xcit_dino.eval.features import evaluating, normalise
from xcit_dino.eval.linear import top_hits
from xcit_dino.eval.results import write_result
from xcit_dino.eval.supervised_data import LabelledData
from xcit_dino.eval.train_config import FinetuneConfig
from xcit_dino.train import dist
from xcit_dino.train.config import options
from xcit_dino.train.provenance import file_checksum

Results = dict[str, dict[str, float]]
OF_THE_MACHINE = frozenset(  # options that are no part of a protocol
    "output_dir data_path shard_url cache_dir cache_gb num_workers prefetch_factor device "
    "pretrained_weights teacher_path checkpoint_minutes saveckp_freq keep_checkpoints log_every "
    "max_steps may_change eval_every eval_batch_size max_bad_fraction".split()
)


def accuracies(
    networks: dict[str, nn.Module], config: FinetuneConfig, val: ShardIndex, world: dist.World
) -> Results:
    """``top1`` and ``top5`` in percent of each network, in fp32 over one pass of the images."""
    first, last = (val.num_samples * (world.rank + i) // world.size for i in (0, 1))
    size = config.regularization.input_size
    loader = ImageLoader(
        val,
        replace(config.loader, shard_url=None),  # that is the training shards'
        resize=round(size / config.validation.eval_crop_ratio),
        crop=size,
        batch_size=config.validation.eval_batch_size,
        indices=np.arange(first, last),
        labelled=True,
    )
    hits = torch.zeros(len(networks) + 1, 2, dtype=torch.float64)
    with ExitStack() as modes, torch.inference_mode():
        for network in networks.values():
            modes.enter_context(evaluating(network))
        for images, labels, _ in loader:
            images, labels = normalise(images, world.device), labels.to(world.device)
            for row, network in enumerate(networks.values()):
                hits[row] += top_hits(network(images), labels)
            hits[-1] += len(labels)
    if world.size > 1:
        torch.distributed.all_reduce(hits)
    percent = (100 * hits[:-1] / hits[-1]).tolist()
    return {
        name: {"top1": top1, "top5": top5}
        for name, (top1, top5) in zip(networks, percent, strict=True)
    }


def record(
    name: str,
    network: str,
    config: FinetuneConfig,
    data: LabelledData,
    results: Results,
    facts: dict[str, Any],
    checkpoint: Path,
) -> None:
    """Write ``finetune`` and ``finetune/ema`` (or ``distill`` ...) to ``results.json``."""
    recipe = {key: value for key, value in options(config) if key not in OF_THE_MACHINE}
    size = config.regularization.input_size
    protocol = facts | {
        "evaluation": name,
        "arch": config.model.arch,
        "crop": size,
        "resize": round(size / config.validation.eval_crop_ratio),
        "precision": "fp32",
        "num_classes": data.num_classes,
        "train_index": data.train.checksum,
        "val_index": data.val.checksum,
        "val_images": data.val.num_samples,
        "recipe": {k: list(v) if isinstance(v, tuple) else v for k, v in recipe.items()},
    }
    weights = file_checksum(checkpoint)
    for which, metrics in results.items():
        shown = "  ".join(f"{key} {value:.2f}" for key, value in metrics.items())
        print(f"{name}{' (averaged weights)' if which else ''}: {shown}", flush=True)
        write_result(
            config.run.output_dir,
            f"{name}/{which}" if which else name,
            metrics,
            protocol | {"network": f"model_{which}" if which else network, "weights": weights},
            weights_file=checkpoint.name,
        )
