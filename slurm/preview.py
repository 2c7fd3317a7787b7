"""``--dry_run``: what a command line comes to, without torch and without SLURM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xcit_dino.data.index import ShardIndex, resolve_split
from xcit_dino.data.plan import Plan
from xcit_dino.errors import InputError
from xcit_dino.slurm import record
from xcit_dino.slurm.config import Launch, Stage
from xcit_dino.ssl.schedule import Schedule
from xcit_dino.train.config import dump_yaml


def preview(launch: Launch, cluster: str) -> None:
    """Print the run, each stage's resources and script, and the resolved recipe."""
    print(f"run folder      {launch.run}\ncluster         {cluster}")
    for stage in launch.stages:
        print(f"\n== {stage.name}: {resources(stage)}")
        if stage.name == "pretrain":
            for name, value in training_facts(stage).items():
                print(f"{name:<24}{value}")
        print(f"\n-- options\n{dump_yaml(stage.config)}", end="")
        if cluster == "slurm":
            from xcit_dino.slurm.submit import script

            code = record.folder(launch.run) / "code" / "HASH"
            after = "JOB" if stage is not launch.stages[0] else None
            print(f"\n-- submission script\n{script(launch, stage, code, after)}")


def resources(stage: Stage) -> str:
    """``"2 nodes x 8 GPUs, 16 processes"``."""
    asked = stage.resources
    devices = f"{asked.ngpus} GPUs" if asked.ngpus else "CPUs"
    return f"{asked.nodes} nodes x {devices}, {stage.num_tasks} processes"


def training_facts(stage: Stage) -> dict[str, Any]:
    """What follows from recipe, resources and index."""
    config = stage.config
    images_per_step = config.run.batch_size_per_gpu * config.run.accum_iter
    batch = images_per_step * stage.num_tasks
    facts: dict[str, Any] = {
        "global batch": f"{batch} = {config.run.batch_size_per_gpu} images x {config.run.accum_iter} "
        f"micro-batches x {stage.num_tasks} processes",
        "effective learning rate": f"{config.optim.lr * batch / 256:.6g} = {config.optim.lr:g} x {batch} / 256",
    }
    try:
        index = open_index(config.loader.data_path)
        plan = Plan(index.counts, seed=0, batch_size=batch, last_batch=config.loader.last_batch)
    except InputError as error:
        return facts | {"images": f"unknown: {error}"}
    schedule = Schedule(config, plan.steps_per_epoch, batch)
    return facts | {
        "images": f"{index.num_samples} in {len(index.shards)} shards (index {index.checksum[:12]})",
        "steps per epoch": f"{plan.steps_per_epoch}, {schedule.total_steps} in {config.run.epochs} epochs",
        "images per rank": f"{plan.steps_per_epoch * images_per_step} an epoch",
    }


def open_index(data_path: Path | None) -> ShardIndex:
    """The training set's index."""
    if data_path is None:
        raise InputError("--data_path is not given")
    return ShardIndex.load(resolve_split(data_path, "train"))
