"""Checks before anything is queued: data, run folder, job names, and what is already done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xcit_dino.errors import InputError
from xcit_dino.options import dump_yaml, options
from xcit_dino.paths import NOT_PATHS
from xcit_dino.slurm import attempts, scheduler
from xcit_dino.slurm.config import Cluster, Launch, Stage
from xcit_dino.train.run.folder import CONFIG_FILE, FREE, check_run, holder

DATA = ("data_path", "knn_data_path")
FILES = (
    "init_from", "pretrained_weights", "teacher_path", "head", "shard_url", "videos", "masks",
    "bank", "queries", "relevant", "distractors", "whitening",
)  # fmt: skip
TARGETS = {"segment": "mask", "masks": "mask", "detect": "boxes"}  # of stages
LABELED = ("knn", "linear", "evaluate", "finetune", "distill")


def check_input(launch: Launch) -> None:
    """Check data and run folder as the stages will.

    Raises:
        InputError: data are missing or too few, or the folder contains another run.
    """
    from xcit_dino.data.shards.index import ShardIndex, resolve_split

    shards = dict(options(launch.stages[0].config)).get("data_path")
    for stage in launch.stages:
        values = dict(options(stage.config))
        if stage.name == "propagate":
            check_folder("propagate.videos", values["videos"], "of DAVIS 2017 or of frames")
        if stage.name == "retrieve":
            check_folder("retrieve.bank", values["bank"], "of the images to search")
        check_images(stage.name, values.get("data_path") or shards, values.get("split"))
        if stage.name != "pretrain":
            continue
        if values["data_path"] is None:
            raise InputError("--data_path: name the folder with the shards (xcit-dino shards make)")
        index = ShardIndex.load(resolve_split(values["data_path"], "train"))
        batch = global_batch(stage)
        if index.num_samples < batch:
            raise InputError(
                f"--batch_size_per_gpu {values['batch_size_per_gpu']}: the global batch of {batch} "
                f"exceeds the {index.num_samples} images of {values['data_path']}; lower it"
            )
        check_run(stage.config, stage.config.run)
    pretrains = any(stage.name == "pretrain" for stage in launch.stages)
    if not pretrains and not (launch.run / CONFIG_FILE).is_file():
        raise InputError(f"--output_dir {launch.run}: contains no run; add pretrain to --stages")


def check_images(stage: str, shards: Path | str | None, split: str | None) -> None:
    """Check that the images of a stage have the labels, masks or boxes that it needs: it would find
    out only after the stages before it.

    Args:
        split: the one that it reads; None: that of its kind.

    Raises:
        InputError: they have not.
    """
    if shards is None or stage not in (*TARGETS, *LABELED):
        return
    from xcit_dino.data.shards.index import ShardIndex, resolve_split
    from xcit_dino.data.targets.checks import SEVERAL, check_labels, require_targets

    of_kind = ("val",) if stage == "evaluate" else ("train", "val")
    for name in (split,) if split else of_kind:
        index = ShardIndex.load(resolve_split(shards, name))
        if stage in TARGETS:
            require_targets(index, TARGETS[stage])
        elif index.targets not in SEVERAL or stage in ("finetune", "distill"):
            check_labels(index)


def check_folder(option: str, folder: Path | None, what: str) -> None:
    """Raise InputError where a stage's folder is not named or is missing."""
    if folder is None or not folder.is_dir():
        missing = "is missing" if folder is None else f"{folder}: no such folder"
        raise InputError(f"--{option} {missing}; name the folder {what}")


def global_batch(stage: Stage) -> int:
    """Images per optimizer step of a training stage."""
    values = dict(options(stage.config))
    return values["batch_size_per_gpu"] * values.get("accum_iter", 1) * stage.num_tasks


def refuse_busy(launch: Launch, cluster: Cluster) -> None:
    """Refuse a run folder in use, and on SLURM a name that one of the user's jobs has.

    Raises:
        InputError: names the job.
    """
    from xcit_dino.slurm.status import owner

    if user := owner(launch.run):
        raise InputError(
            f"--output_dir {launch.run}: in use by {user}; see `xcit-dino launch status`, "
            "end it with `xcit-dino launch cancel`, or choose another folder"
        )
    if user := holder(launch.run):  # a command that no launcher started
        raise InputError(
            f"--output_dir {launch.run} is in use by {user}; wait for it, stop it, or choose "
            "another folder"
        )
    for stage in launch.stages if cluster == "slurm" else ():
        name = f"{launch.job_name}-{stage.name}"
        if jobs := scheduler.jobs_named(name):
            raise InputError(
                f"--job_name {launch.job_name}: job {jobs[0]} is already called {name}; "
                "give another --job_name"
            )


def unfinished(launch: Launch) -> list[Stage]:
    """The stages from the first one not yet done with exactly these options."""
    for number, stage in enumerate(launch.stages):
        known = attempts.load(launch.run, stage.name)
        if known.state != "done" or differ(known.config, dump(stage.config)):
            return list(launch.stages[number:])
        print(f"{stage.name}: already done")
    print(f"{launch.run}: all stages are done; nothing to run")
    return []


def differ(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two configs differ in more than may change between two attempts of a run.

    Different data make a different stage: a training that resumes compares the index itself, but
    one that is not started cannot. With the augmented linear probe, so does the batch size.
    """
    free = FREE - {"max_steps", "data_path"}
    if now.get("protocol") == "dino":
        free -= {"batch_size_per_gpu"}
    return any(before.get(name) != value for name, value in now.items() if name not in free)


def dump(config: Any) -> dict[str, Any]:
    """Options as plain YAML values."""
    import yaml

    return yaml.safe_load(dump_yaml(config))


def needs(launch: Launch) -> list[str]:
    """Files and folders that every node must be able to read: the index of each data set, weights,
    shards; only those on a file system, without what stages write to the run folder."""
    from xcit_dino.data.shards.index import is_url, resolve_split

    def given(names: tuple[str, ...]) -> set[str]:
        stages = (dict(options(stage.config)) for stage in launch.stages)
        paths = {str(values[name]) for values in stages for name in names if values.get(name)}
        return {path for path in paths if not is_url(path) and not path.startswith(NOT_PATHS)}

    indexes = {f"{resolve_split(folder, 'train')}/index.json" for folder in given(DATA)}
    files = {path.replace("{split}", "train") for path in given(FILES)}
    return sorted(indexes | {path for path in files if not Path(path).is_relative_to(launch.run)})
