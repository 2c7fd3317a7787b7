"""``--dry_run``: what a command line resolves to, without torch and without SLURM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xcit_dino.errors import InputError
from xcit_dino.options import dump_yaml, options
from xcit_dino.slurm import launched
from xcit_dino.slurm.config import Launch, LaunchConfig, Stage


def preview(launch: Launch, cluster: str) -> None:
    """Print the run, each stage's resources and script, and the resolved recipe."""
    print(f"run folder      {launch.run}\ncluster         {cluster}")
    for line in ineffective_options(launch, cluster):
        print(f"WARNING         {line}")
    for stage in launch.stages:
        print(f"\n== {stage.name}: {resources(stage)}")
        facts = training_facts(stage) if stage.name == "pretrain" else neighbor_facts(launch, stage)
        for name, value in facts.items():
            print(f"{name:<26}{value}")
        for remark in remarks(stage):
            print(f"{'WARNING':<26}{remark}")
        print(f"\n-- options\n{dump_yaml(stage.config)}", end="")
        if cluster == "slurm":
            from xcit_dino.slurm.submit import script

            code = launched.folder(launch.run) / "code" / "HASH"
            after = "afterok:JOB" if stage is not launch.stages[0] else None
            print(f"\n-- submission script\n{script(launch, stage, code, after)}")


def resources(stage: Stage) -> str:
    """``"2 nodes x 8 GPUs, 16 processes"``."""
    requested = stage.resources
    devices = counted(requested.ngpus, "GPU") if requested.ngpus else "CPUs"
    return f"{counted(requested.nodes, 'node')} x {devices}, {counted(stage.num_tasks, 'process')}"


def counted(number: int, noun: str) -> str:
    """``"1 node"``, ``"2 nodes"``, ``"2 processes"``."""
    ending = "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number} {noun}{ending if number != 1 else ''}"


def remarks(stage: Stage) -> list[str]:
    """Unexpected effects of the options, and those that do not fit the data, as the stage itself
    will warn of them."""
    found = getattr(stage.config, "remarks", list)()
    if stage.name != "pretrain" or (data_path := stage.config.loader.data_path) is None:
        return found
    from xcit_dino.ssl.fit import misfits

    return [*found, *misfits(stage.config, train_split(data_path), stage.num_tasks)]


def training_facts(stage: Stage) -> dict[str, Any]:
    """Values derived from recipe, resources and index."""
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
    if len(stages := config.stages) > 1:
        ends = [first for first, _ in stages[1:]] + [config.run.epochs]
        facts["stages"] = "; ".join(
            f"epochs {first + 1} to {end}: {crops.sizes}"
            for (first, crops), end in zip(stages, ends, strict=True)
        )
    try:
        samples, shards = count_images(config.loader.data_path)
    except (InputError, OSError, KeyError, ValueError) as error:
        return facts | {"images": f"unknown ({error})"}
    steps = samples // batch + (config.loader.last_batch == "wrap" and samples % batch > 0)
    return facts | {
        "images": f"{samples} in {counted(shards, 'shard')}",
        "steps per epoch": f"{steps}, {steps * config.run.epochs} in {config.run.epochs} epochs",
        "images per rank": f"{steps * images_per_step} an epoch",
    }


def neighbor_facts(launch: Launch, stage: Stage) -> dict[str, str]:
    """Values of ``--nb_knn`` that exceed the training set and are therefore skipped."""
    values = dict(options(stage.config))
    if "nb_knn" not in values:
        return {}
    run = dict(options(launch.stages[0].config))
    data_path = values["data_path"] or (run.get("data_path") if launch.stages[0] != stage else None)
    try:
        images = count_images(data_path)[0]
    except (InputError, OSError, KeyError, ValueError):
        return {}
    large = ", ".join(str(k) for k in values["nb_knn"] if k > images)
    if not large:
        return {}
    return {"--knn.nb_knn": f"{large} skipped: the training split has only {images} images"}


def count_images(data_path: Path | str | None) -> tuple[int, int]:
    """(images, shards) of the training set, read from its index without numpy, which is slow to
    import."""
    if data_path is None:
        raise InputError("--data_path is not given")
    if "://" in str(data_path):
        raise InputError(f"{data_path} is read when the run starts, not in a dry run")
    place = Path(train_split(data_path)) / "index.json"
    if not place.is_file():
        raise InputError(f"--data_path {data_path}: no index.json there, as seen from this machine")
    index = json.loads(place.read_text())
    return int(index["samples"]), len(index["shards"])


def train_split(data_path: Path | str) -> str:
    """The folder of the training split, without NumPy; a URL as it is."""
    if "://" in str(data_path):
        return str(data_path)
    inside = Path(data_path) / "train"
    return str(inside if (inside / "index.json").is_file() else data_path)


SLURM_ONLY = (
    "partition", "account", "qos", "constraint", "exclude", "comment", "mem", "slurm", "job_name",
)  # fmt: skip
NOT_IN_DEBUG = ("cpus_per_task", "timeout", "setup", "max_requeues")


def ineffective_options(launch: Launch, cluster: str) -> list[str]:
    """Warnings that name the given options without effect on this kind of launch."""
    if cluster == "slurm":
        return []
    names = {*SLURM_ONLY, *(NOT_IN_DEBUG if cluster == "debug" else ())}
    if launch.others:
        names.add("array_parallelism")
    if cluster == "debug" or not any(stage.resources.timeout for stage in launch.stages):
        names.add("signal_delay")
    plain, general = dict(options(LaunchConfig())), dict(options(launch.launch))
    given = [f"--{name}" for name in general if name in names and general[name] != plain[name]]
    for stage in launch.stages:
        own = dict(options(stage.resources)).items()
        given += [f"--{stage.name}.{k}" for k, v in own if k in names and v != general[k]]
    return [f"without effect on a {cluster} run: {', '.join(given)}"] if given else []
