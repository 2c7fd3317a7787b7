"""``--dry_run``: what a command line comes to, without torch and without SLURM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xcit_dino.errors import InputError
from xcit_dino.slurm import record
from xcit_dino.slurm.config import Launch, Stage
from xcit_dino.train.config import dump_yaml


def preview(launch: Launch, cluster: str) -> None:
    """Print the run, each stage's resources and script, and the resolved recipe."""
    print(f"run folder      {launch.run}\ncluster         {cluster}")
    for stage in launch.stages:
        print(f"\n== {stage.name}: {resources(stage)}")
        if stage.name == "pretrain":
            for name, value in training_facts(stage).items():
                print(f"{name:<26}{value}")
        print(f"\n-- options\n{dump_yaml(stage.config)}", end="")
        if cluster == "slurm":
            from xcit_dino.slurm.submit import script

            code = record.folder(launch.run) / "code" / "HASH"
            after = "afterok:JOB" if stage is not launch.stages[0] else None
            print(f"\n-- submission script\n{script(launch, stage, code, after)}")


def resources(stage: Stage) -> str:
    """``"2 nodes x 8 GPUs, 16 processes"``."""
    asked = stage.resources
    devices = counted(asked.ngpus, "GPU") if asked.ngpus else "CPUs"
    return f"{counted(asked.nodes, 'node')} x {devices}, {counted(stage.num_tasks, 'process')}"


def counted(number: int, noun: str) -> str:
    """``"1 node"``, ``"2 nodes"``, ``"2 processes"``."""
    ending = "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number} {noun}{ending if number != 1 else ''}"


def training_facts(stage: Stage) -> dict[str, Any]:
    """What follows from recipe, resources and index."""
    config = stage.config
    images_per_step = config.run.batch_size_per_gpu * config.run.accum_iter
    batch = images_per_step * stage.num_tasks
    lr = config.optim.lr
    facts: dict[str, Any] = {
        "global batch": " x ".join(
            [
                f"{batch} = {counted(config.run.batch_size_per_gpu, 'image')}",
                counted(config.run.accum_iter, "micro-batch"),
                counted(stage.num_tasks, "process"),
            ]
        ),
        "effective learning rate": f"{lr * batch / 256:.6g} = {lr:g} x {batch} / 256",
    }
    try:
        samples, shards = count_images(config.loader.data_path)
    except (InputError, OSError, KeyError, ValueError) as error:
        return facts | {"images": f"unknown ({error})"}
    steps = samples // batch + (config.loader.last_batch == "wrap" and samples % batch > 0)
    few = "; fewer images than a global batch: lower --batch_size_per_gpu" if not steps else ""
    return facts | {
        "images": f"{samples} in {counted(shards, 'shard')}",
        "steps per epoch": f"{steps}, {steps * config.run.epochs} in {config.run.epochs} epochs"
        + few,
        "images per rank": f"{steps * images_per_step} an epoch",
    }


def count_images(data_path: Path | None) -> tuple[int, int]:
    """(images, shards) of the training set, from its index alone: importing numpy is slow."""
    if data_path is None:
        raise InputError("--data_path is not given")
    place = data_path / "train" / "index.json"
    place = place if place.is_file() else data_path / "index.json"
    if not place.is_file():
        raise InputError(f"--data_path {data_path}: no index.json is there, seen from this machine")
    index = json.loads(place.read_text())
    return int(index["samples"]), len(index["shards"])
