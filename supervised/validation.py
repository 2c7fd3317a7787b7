"""Accuracy of classifiers in training, on all ranks together, and its place in ``results.json``."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError
from xcit_dino.eval.config import EvalTargetConfig
from xcit_dino.eval.context import Context, make_context
from xcit_dino.eval.features import eval_mode
from xcit_dino.eval.results import write_result
from xcit_dino.eval.scores.heads import topk_hits
from xcit_dino.eval.scores.metrics import ClassRow, Scores, class_means, class_rows, lines_of
from xcit_dino.files import file_checksum
from xcit_dino.inputs import InputSettings
from xcit_dino.options import options
from xcit_dino.provenance import read_results
from xcit_dino.supervised.config import FinetuneConfig
from xcit_dino.supervised.data import LabeledData
from xcit_dino.supervised.trainer import Method, SupervisedTrainer
from xcit_dino.train.distributed import dist
from xcit_dino.train.run.log import RunLog
from xcit_dino.train.schedules import Schedule
from xcit_dino.train.state import Checkpoints

Results = dict[str, dict[str, float]]
Tables = dict[str, list[ClassRow]]
OF_THE_MACHINE = frozenset(  # options that are not part of a protocol
    "output_dir data_path shard_url cache_dir cache_gb num_workers prefetch_factor device fsdp "
    "pretrained_weights teacher_path checkpoint_minutes saveckp_freq keep_checkpoints log_every "
    "max_steps may_change eval_every eval_batch_size max_bad_fraction "
    "window mean std".split()  # these three stand in the protocol by themselves
)


@dataclass(frozen=True)
class Validation:
    """Validation of a training run, between steps and at the end."""

    method: Method
    trainer: SupervisedTrainer
    data: LabeledData
    schedule: Schedule

    def __call__(self, step: int = 0) -> dict[str, float]:
        """Accuracies of the current networks, with the names under which they are logged."""
        return shown(self.measure())

    def due(self, step: int) -> bool:
        """Whether an epoch with a validation ends with this step, except the last epoch."""
        every, epochs = self.trainer.config.validation.eval_every, self.schedule.config.run.epochs
        epoch, into_epoch = divmod(step, self.schedule.steps_per_epoch)
        return into_epoch == 0 and 0 < epoch < epochs and every > 0 and epoch % every == 0

    def finish(self, log: RunLog, checkpoints: Checkpoints, facts: dict[str, Any]) -> None:
        """Log the final accuracies and write them to ``results.json``, once."""
        if self.recorded(checkpoints.newest()):  # by an earlier attempt
            return
        tables: Tables = {}
        results, config = self.measure(tables), self.trainer.config
        log.write(self.schedule.total_steps, shown(results))
        newest = checkpoints.newest()
        if self.trainer.world.is_main:
            assert newest is not None
            record(
                self.method.name, self.method.network, config, self.data, results, tables, facts,
                newest,
            )  # fmt: skip

    def recorded(self, checkpoint: Path | None) -> bool:
        """See :func:`is_recorded`."""
        return is_recorded(self.method.name, self.trainer.config, self.data.val, checkpoint)

    def measure(self, tables: Tables | None = None) -> Results:
        """Accuracies; with ``tables``, which receives each class, also metrics over classes."""
        trainer, val = self.trainer, self.data.val
        networks = trainer.networks()
        scores = None
        if tables is not None:
            scores = {name: Scores(val.num_samples, self.data.num_classes) for name in networks}
        results = accuracies(networks, trainer.config, val, trainer.world, scores)
        if scores is None or tables is None:
            return results
        for name, metrics in results.items():
            tables[name] = class_rows(scores[name].gathered())
            metrics |= class_means(tables[name])
        return results


def is_recorded(name: str, config: Any, val: ShardIndex, checkpoint: Path | None) -> bool:
    """Whether ``results.json`` has a training's results: with its options, of these validation
    images and of its newest checkpoint. To be called on all ranks."""

    def found() -> bool:
        protocol = read_results(config.run.output_dir).get(name, {}).get("protocol", {})
        before, now = protocol.get("recipe", {}), json.loads(json.dumps(recipe_of(config)))
        same = all(before[key] == value for key, value in now.items() if key in before)
        same = same and protocol.get("val_index") == val.checksum
        return same and checkpoint is not None and protocol["weights"] == file_checksum(checkpoint)

    return dist.from_main(found)


def recipe_of(config: Any) -> dict[str, Any]:
    """The options that are part of a protocol."""
    recipe = {key: value for key, value in options(config) if key not in OF_THE_MACHINE}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in recipe.items()}


def shown(results: Results) -> dict[str, float]:
    """``{"": {"top1": 3.0}, "ema": ...}`` -> ``{"val_top1": 3.0, "val_ema_top1": ...}``."""
    return {
        "_".join(filter(None, ("val", network, name))): value
        for network, metrics in results.items()
        for name, value in metrics.items()
    }


def accuracies(
    networks: dict[str, nn.Module],
    config: FinetuneConfig,
    val: ShardIndex,
    world: dist.World,
    scores: dict[str, Scores] | None = None,
) -> Results:
    """``top1`` and ``top5`` in percent of each network, in fp32 over one pass of the images.

    scores: one for each network, which receives those of this rank's images.
    """
    first, last = (val.num_samples * (world.rank + i) // world.size for i in (0, 1))
    context = context_of(config, world)
    loader = context.images(val, np.arange(first, last))
    hits = torch.zeros(len(networks) + 1, 2, dtype=torch.float64)
    with dist.together(), ExitStack() as modes, torch.inference_mode():
        for network in networks.values():
            modes.enter_context(eval_mode(network))
        for images, labels, _ in loader:
            images, labels = context.normalize(images), labels.to(world.device)
            for row, (name, network) in enumerate(networks.items()):
                logits = network(images)
                hits[row] += topk_hits(logits, labels)
                if scores is not None:
                    scores[name].add(logits.float().softmax(1), labels)
            hits[-1] += len(labels)
    if world.size > 1:
        torch.distributed.all_reduce(hits)
    if not hits[-1].all():
        raise InputError(f"--data_path {val.root}: not one image can be read")
    percent = (100 * hits[:-1] / hits[-1]).tolist()
    return {
        name: {"top1": top1, "top5": top5}
        for name, (top1, top5) in zip(networks, percent, strict=True)
    }


def context_of(config: FinetuneConfig, world: dist.World) -> Context:
    """How validation images are prepared: as in evaluations of the finished run."""
    run = dict(options(config))
    given = EvalTargetConfig(
        config.run.output_dir,
        batch_size_per_gpu=config.validation.eval_batch_size,
        num_workers=config.loader.num_workers,
    )
    settings = InputSettings.from_run(run)
    return make_context(given, settings, run, config.loader.data_path or "", world)


def record(
    name: str,
    network: str,
    config: FinetuneConfig,
    data: LabeledData,
    results: Results,
    tables: Tables,
    facts: dict[str, Any],
    checkpoint: Path,
) -> None:
    """Write ``finetune`` and ``finetune/ema`` (or ``distill`` ...) to ``results.json``."""
    context = context_of(config, dist.World(0, 1, torch.device("cpu")))
    protocol = (
        facts
        | context.protocol
        | {
            "evaluation": name,
            "arch": config.model.arch,
            "precision": "fp32",
            "num_classes": data.num_classes,
            "train_index": data.train.checksum,
            "val_index": data.val.checksum,
            "val_images": data.val.num_samples,
            "recipe": recipe_of(config),
        }
    )
    weights = file_checksum(checkpoint)
    for which, metrics in results.items():
        shown = "  ".join(f"{key} {value:.2f}" for key, value in metrics.items())
        print(f"{name}{' (averaged weights)' if which else ''}: {shown}", flush=True)
        write_result(
            config.run.output_dir,
            f"{name}/{which}" if which else name,
            metrics,
            protocol | {"network": f"model_{which}" if which else network, "weights": weights},
            per_class=lines_of(tables[which], data.val.classes),
            weights_file=checkpoint.name,
        )
