"""``python slurm/launch.py --arch xcit_small_12_p8 ...``: stages of a run on SLURM, or on this
machine.

The same as ``xcit-dino launch``. The trainer knows nothing of it: this file resolves the command
line, shows what follows from it, finds what is wrong before anything is queued, and hands each
stage to submitit.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from xcit_dino.errors import InputError, warn
from xcit_dino.files import check_writable
from xcit_dino.options import dump_yaml, options
from xcit_dino.slurm import attempts, scheduler
from xcit_dino.slurm.config import Launch, Stage
from xcit_dino.slurm.dry_run import preview, without_effect
from xcit_dino.train.run.folder import CONFIG_FILE, FREE, check_run

OFFICIAL_GPUS = 8  # dino run_with_submitit.py: GPUs of a node where nobody can be asked
Cluster = Literal["slurm", "local", "debug"]


def run(launch: Launch) -> int:
    """Launch the stages; returns the exit code (0 also when jobs are merely queued)."""
    cluster = choose_cluster(launch)
    runs = [with_gpus(one, cluster) for one in (launch, *launch.others)]
    if launch.launch.dry_run:
        preview(runs[0], cluster)
        for other in runs[1:]:
            print(f"and the same in {other.run}")
        return 0
    for line in without_effect(runs[0], cluster):
        warn(line)
    for one in runs:
        check_writable(one.run, "name another folder: --output_dir ELSEWHERE")
        check_input(one)
        refuse_busy(one, cluster)
    return (submit_runs if cluster == "slurm" else run_here)(runs, cluster)


def submit_runs(runs: list[Launch], cluster: Cluster) -> int:
    """Submit what is not done yet; each run waits for the one ``array_parallelism`` before it."""
    last_jobs: list[str | None] = []
    for number, one in enumerate(runs):
        todo = unfinished(one)
        if not todo:
            last_jobs.append(None)
            continue
        earlier = number - one.launch.array_parallelism
        start(one, todo, cluster, last_jobs[earlier] if earlier >= 0 else None)
        last_jobs.append(attempts.read_launch(one.run)["stages"][todo[-1].name]["job_id"] or None)
    return 0


def run_here(runs: list[Launch], cluster: Cluster) -> int:
    """Run what is not done yet, one run after the other; returns the greatest exit code.

    A run that fails or is cancelled does not keep those behind it from running, as on SLURM; a
    signal to the launcher itself ends all.
    """
    from xcit_dino.slurm import local

    waiting = [(one, todo) for one in runs if (todo := unfinished(one))]
    codes = [prepare(one, todo, cluster) for one, todo in waiting]  # so `launch status` knows all
    worst = 0
    for number, (one, todo) in enumerate(waiting):
        if attempts.cancelled(one.run):
            print(f"{one.run}: cancelled before it started")
            continue
        code = local.run_stages(one, todo, codes[number], inside=cluster == "debug")
        worst = max(worst, code)
        if code > 128:
            for other, _ in waiting[number + 1 :]:
                print(f"{other.run}: not started; the same command starts it", file=sys.stderr)
            break
    return worst


def choose_cluster(launch: Launch) -> Cluster:
    """``auto`` resolved: SLURM where it answers, else this machine.

    A dry run asks nobody where SLURM was named, or where several nodes are asked for.

    Raises:
        InputError: several nodes on one machine, or SLURM does not answer.
    """
    wanted, dry_run = launch.launch.cluster, launch.launch.dry_run
    nodes = max(stage.resources.nodes for stage in launch.stages)
    if wanted in ("local", "debug"):
        if nodes > 1:
            raise InputError(f"--nodes {nodes}: one machine is one node; give --cluster slurm")
        return wanted
    if dry_run and (wanted == "slurm" or nodes > 1):
        return "slurm"
    silent = scheduler.answers()
    if silent is None:
        return "slurm"
    if wanted == "slurm":
        raise InputError(f"--cluster slurm: SLURM does not answer ({silent}); use --cluster local")
    if nodes > 1:
        raise InputError(
            f"--nodes {nodes}: one machine is one node, and SLURM does not answer here ({silent}); "
            "log in to the cluster, or leave --nodes out"
        )
    return "local"


def with_gpus(launch: Launch, cluster: Cluster) -> Launch:
    """``--ngpus`` left out becomes the number of GPUs of a node.

    Raises:
        InputError: the first stage asks for more than there are.
    """
    stages = []
    for stage in launch.stages:
        wanted = stage.resources.ngpus
        there = available_gpus(cluster, stage.resources.partition, launch.launch.dry_run)
        if wanted is None:
            wanted = OFFICIAL_GPUS if there is None else there
            wanted = min(wanted, 1) if cluster == "debug" else wanted
        elif there is not None and wanted > there:
            if not stages:
                more = "take fewer, or more --nodes" if cluster == "slurm" else "take fewer"
                remedy = more if there else "leave it out to use CPUs"
                raise InputError(f"--ngpus {wanted}: a node has {there or 'none'}; {remedy}")
            if wanted > 1:  # 1 is the default, and means one where there are some
                warn(f"--{stage.name}.ngpus {wanted}: a node has {there or 'none'}; takes {there}")
            wanted = there
        stages.append(replace(stage, resources=replace(stage.resources, ngpus=wanted)))
        refuse_processes(stages[-1], cluster)
    return replace(launch, stages=tuple(stages))


def refuse_processes(stage: Stage, cluster: Cluster) -> None:
    """Refuse numbers of processes that would not be had.

    Raises:
        InputError: names the option.
    """
    ngpus, nproc = stage.resources.ngpus, stage.resources.nproc
    if ngpus and nproc > 1:
        raise InputError(
            f"--nproc {nproc}: with GPUs, each has one process; leave --nproc out, or give "
            "--ngpus 0 for processes on CPUs"
        )
    if cluster == "debug" and stage.num_tasks > 1:
        name, number = ("ngpus", 1) if ngpus else ("nproc", 1)
        raise InputError(
            f"--{name} {ngpus or nproc}: --cluster debug is one process; give --{name} {number}, "
            "or --cluster local"
        )


def available_gpus(cluster: Cluster, partition: str | None, dry_run: bool) -> int | None:
    """GPUs of a node; None where a dry run cannot know."""
    if cluster != "slurm":
        from xcit_dino.slurm.local import visible_gpus

        return len(visible_gpus())
    if dry_run and scheduler.answers() is not None:
        return None
    return scheduler.gpus_per_node(partition)


# -- what can be found wrong before anything is queued ---------------------------------------------


def check_input(launch: Launch) -> None:
    """Look at data and run folder as the stages will.

    Raises:
        InputError: data are missing or too few, or the folder holds another run.
    """
    from xcit_dino.data.shards.index import ShardIndex, resolve_split

    for stage in launch.stages:
        values = dict(options(stage.config))
        if stage.name != "pretrain":
            continue
        if values["data_path"] is None:
            raise InputError("--data_path: name the folder with the shards (xcit-dino shards make)")
        index = ShardIndex.load(resolve_split(values["data_path"], "train"))
        if {"knn", "linear"} & {later.name for later in launch.stages}:
            resolve_split(values["data_path"], "val")
        batch = global_batch(stage)
        if index.num_samples < batch:
            raise InputError(
                f"--batch_size_per_gpu {values['batch_size_per_gpu']}: the global batch of {batch} "
                f"is more than the {index.num_samples} images of {values['data_path']}; take less"
            )
        check_run(stage.config, stage.config.run)
    pretrains = any(stage.name == "pretrain" for stage in launch.stages)
    if not pretrains and not (launch.run / CONFIG_FILE).is_file():
        raise InputError(f"--output_dir {launch.run}: no run is there; put pretrain into --stages")


def global_batch(stage: Stage) -> int:
    """Images of one optimiser step of a training stage."""
    values = dict(options(stage.config))
    return values["batch_size_per_gpu"] * values.get("accum_iter", 1) * stage.num_tasks


def refuse_busy(launch: Launch, cluster: Cluster) -> None:
    """Refuse a run folder that a job uses, and on SLURM a name that one of the user's jobs has.

    Raises:
        InputError: naming the job.
    """
    from xcit_dino.slurm.status import owner

    if who := owner(launch.run):
        raise InputError(
            f"--output_dir {launch.run}: {who} is at work there; see `xcit-dino launch status`, "
            "end it with `xcit-dino launch cancel`, or choose another folder"
        )
    for stage in launch.stages if cluster == "slurm" else ():
        name = f"{launch.job_name}-{stage.name}"
        if jobs := scheduler.named(name):
            raise InputError(
                f"--job_name {launch.job_name}: job {jobs[0]} is already called {name}; "
                "give another --job_name"
            )


def unfinished(launch: Launch) -> list[Stage]:
    """The stages from the first one that is not done with these very options."""
    for number, stage in enumerate(launch.stages):
        known = attempts.load(launch.run, stage.name)
        if known.state != "done" or differs(known.config, dump(stage.config)):
            return list(launch.stages[number:])
        print(f"{stage.name}: done already")
    print(f"{launch.run}: all stages are done; nothing to run")
    return []


def differs(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two configs differ in more than what may change between two tries of a run.

    Other data are another stage: a training that goes on compares their index itself, and one that
    is not started cannot. Where the probe is the augmented one, the batch is its own.
    """
    free = FREE - {"max_steps", "data_path"}
    if now.get("protocol") == "dino":
        free -= {"batch_size_per_gpu"}
    return any(before.get(name) != value for name, value in now.items() if name not in free)


def dump(config: Any) -> dict[str, Any]:
    """Options as plain values."""
    import yaml

    return yaml.safe_load(dump_yaml(config))


# -- starting --------------------------------------------------------------------------------------


def start(launch: Launch, todo: list[Stage], cluster: Cluster, after: str | None = None) -> int:
    """Start one run (once the job ``after`` has ended); returns the exit code."""
    from xcit_dino.slurm import local, submit

    code = prepare(launch, todo, cluster)
    if cluster != "slurm":
        return local.run_stages(launch, todo, code, inside=cluster == "debug")
    note = attempts.read_launch(launch.run)
    for name, job_id in submit.submit(launch, todo, code, after).items():
        note["stages"][name]["job_id"] = job_id
    attempts.write_launch(launch.run, note)
    return told(launch, note)


def prepare(launch: Launch, todo: list[Stage], cluster: Cluster) -> Path:
    """Copy the code and note what is launched; returns the folder of the copy.

    Raises:
        InputError: the run folder cannot be written, or SLURM refuses a stage.
    """
    from xcit_dino.slurm import snapshot, submit

    try:
        code = snapshot.copy_code(attempts.folder(launch.run) / "code")
    except OSError as error:
        raise InputError(f"--output_dir {launch.run}: {error.strerror}") from error
    if cluster == "slurm":
        submit.try_out(launch, todo, code)
    stages = {stage.name: {"job_id": "", "config": dump(stage.config)} for stage in todo}
    note: dict[str, Any] = {
        "cluster": cluster,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pid_start": attempts.start_time(os.getpid()),
        "code": str(code),
        "max_requeues": launch.launch.max_requeues,
        "argv": sys.argv,
        "needs": needs(launch),
        "stages": stages,
        "earlier": attempts.earlier_stages(launch.run, stages),
    }
    attempts.allow(launch.run)
    attempts.write_launch(launch.run, note)
    for stage in todo:
        attempts.save(launch.run, attempts.Record(stage.name))
    return code


DATA = ("data_path", "knn_data_path")
FILES = ("init_from", "pretrained_weights", "teacher_path", "head", "shard_url")


def needs(launch: Launch) -> list[str]:
    """Files and folders that every node has to see: the index of each data set, weights, shards;
    those on a file system, and not what stages make in the run folder."""
    from xcit_dino.data.shards.index import is_url, resolve_split

    def given(names: tuple[str, ...]) -> set[str]:
        stages = (dict(options(stage.config)) for stage in launch.stages)
        paths = {str(values[name]) for values in stages for name in names if values.get(name)}
        return {path for path in paths if not is_url(path) and not path.startswith("pipe:")}

    indexes = {f"{resolve_split(folder, 'train')}/index.json" for folder in given(DATA)}
    files = {path.replace("{split}", "train") for path in given(FILES)}
    return sorted(indexes | {path for path in files if not Path(path).is_relative_to(launch.run)})


def told(launch: Launch, note: dict[str, Any]) -> int:
    """Say what was submitted, and how to follow it."""
    for name, stage in note["stages"].items():
        print(f"{name}: job {stage['job_id']}")
    print(f"follow with: xcit-dino launch status {launch.run}   (logs, cancel likewise)")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """``xcit-dino launch`` with these arguments."""
    from xcit_dino import cli

    return cli.main(["launch", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    # a script's own folder is first on the path; only the package is meant to be found
    sys.path[:] = [
        entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent
    ]
    sys.exit(main())
