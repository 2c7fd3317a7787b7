"""``python slurm/launch.py --arch xcit_small_12_p8 ...``: run stages on SLURM or on this machine.

The same as ``xcit-dino launch``. The trainer does not depend on it: this file resolves the command
line, prints what follows from it, finds errors before anything is queued, and hands each stage to
submitit.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xcit_dino.errors import InputError, warn
from xcit_dino.files import check_writable
from xcit_dino.slurm import attempts, launched, scheduler
from xcit_dino.slurm.checks import check_input, dump, needs, refuse_busy, unfinished
from xcit_dino.slurm.config import Cluster, Launch, Stage
from xcit_dino.slurm.tools.dry_run import ineffective_options, preview

OFFICIAL_GPUS = 8  # per node, as in dino run_with_submitit.py, if SLURM cannot be queried


def run(launch: Launch) -> int:
    """Launch the stages; returns the exit code (0 also if jobs are merely queued)."""
    cluster = choose_cluster(launch)
    if launch.launch.container and cluster != "slurm":
        raise InputError(
            "--container: makes containers on SLURM only; leave it out and start this command "
            "inside one, or give --cluster slurm"
        )
    runs = [with_gpus(one, cluster) for one in (launch, *launch.others)]
    if launch.launch.dry_run:
        preview(runs[0], cluster)
        for other in runs[1:]:
            print(f"and the same in {other.run}")
        return 0
    for line in ineffective_options(runs[0], cluster):
        warn(line)
    for one in runs:
        check_writable(one.run, "name another folder: --output_dir ELSEWHERE")
        check_input(one)
        refuse_busy(one, cluster)
    return (submit_runs if cluster == "slurm" else run_here)(runs, cluster)


def submit_runs(runs: list[Launch], cluster: Cluster) -> int:
    """Submit unfinished stages; each run waits for the one ``array_parallelism`` before it."""
    last_jobs: list[str | None] = []
    for number, one in enumerate(runs):
        todo = unfinished(one)
        if not todo:
            last_jobs.append(None)
            continue
        earlier = number - one.launch.array_parallelism
        start(one, todo, cluster, last_jobs[earlier] if earlier >= 0 else None)
        last_jobs.append(launched.read_launch(one.run)["stages"][todo[-1].name]["job_id"] or None)
    return 0


def run_here(runs: list[Launch], cluster: Cluster) -> int:
    """Run unfinished stages, one run after the other; returns the largest exit code.

    As on SLURM, a run that fails or is cancelled does not prevent later ones from running; a signal
    to the launcher itself ends all.
    """
    from xcit_dino.slurm import local

    waiting = [(one, todo) for one in runs if (todo := unfinished(one))]
    codes = [prepare(one, todo, cluster) for one, todo in waiting]  # so `launch status` shows all
    worst = 0
    for number, (one, todo) in enumerate(waiting):
        if launched.cancelled(one.run):
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
    """Resolve ``auto``: SLURM if it responds, else this machine.

    A dry run with SLURM or several nodes requested does not contact SLURM.

    Raises:
        InputError: several nodes on one machine, or SLURM does not respond.
    """
    requested, dry_run = launch.launch.cluster, launch.launch.dry_run
    nodes = max(stage.resources.nodes for stage in launch.stages)
    if requested in ("local", "debug"):
        if nodes > 1:
            raise InputError(f"--nodes {nodes}: one machine is one node; give --cluster slurm")
        return requested
    if dry_run and (requested == "slurm" or nodes > 1):
        return "slurm"
    unavailable = scheduler.unavailable()
    if unavailable is None:
        return "slurm"
    if requested == "slurm":
        raise InputError(
            f"--cluster slurm: SLURM does not respond ({unavailable}); use --cluster local"
        )
    if nodes > 1:
        raise InputError(
            f"--nodes {nodes}: one machine is one node, and SLURM does not "
            f"respond here ({unavailable}); log in to the cluster, or leave --nodes out"
        )
    return "local"


def with_gpus(launch: Launch, cluster: Cluster) -> Launch:
    """Resolve a missing ``--ngpus`` to the number of GPUs of a node.

    Raises:
        InputError: the first stage requests more than there are.
    """
    stages = []
    for stage in launch.stages:
        requested = stage.resources.ngpus
        available = available_gpus(cluster, stage.resources.partition, launch.launch.dry_run)
        if requested is None:
            requested = OFFICIAL_GPUS if available is None else available
            requested = min(requested, 1) if cluster == "debug" else requested
        elif available is not None and requested > available:
            if not stages:
                more = "take fewer, or more --nodes" if cluster == "slurm" else "take fewer"
                remedy = more if available else "leave it out to use CPUs"
                raise InputError(f"--ngpus {requested}: a node has {available or 'none'}; {remedy}")
            if requested > 1:  # 1 is the default, and means at most one
                warn(
                    f"--{stage.name}.ngpus {requested}: a node has {available or 'none'}; "
                    f"using {available}"
                )
            requested = available
        stages.append(replace(stage, resources=replace(stage.resources, ngpus=requested)))
        refuse_processes(stages[-1], cluster)
    return replace(launch, stages=tuple(stages))


def refuse_processes(stage: Stage, cluster: Cluster) -> None:
    """Refuse a number of processes that the cluster type cannot start.

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
    """GPUs per node; None if a dry run cannot query SLURM."""
    if cluster != "slurm":
        from xcit_dino.slurm.local import visible_gpus

        return len(visible_gpus())
    if dry_run and scheduler.unavailable() is not None:
        return None
    return scheduler.gpus_per_node(partition)


# -- starting --------------------------------------------------------------------------------------


def start(launch: Launch, todo: list[Stage], cluster: Cluster, after: str | None = None) -> int:
    """Start one run (after the job ``after`` has ended); returns the exit code."""
    from xcit_dino.slurm import local, submit

    code = prepare(launch, todo, cluster)
    if cluster != "slurm":
        return local.run_stages(launch, todo, code, inside=cluster == "debug")
    record = launched.read_launch(launch.run)
    for name, job_id in submit.submit(launch, todo, code, after).items():
        record["stages"][name]["job_id"] = job_id
    launched.write_launch(launch.run, record)
    return print_submitted(launch, record)


def prepare(launch: Launch, todo: list[Stage], cluster: Cluster) -> Path:
    """Copy the code and record the launch; returns the folder of the copy.

    Raises:
        InputError: the run folder cannot be written, or SLURM refuses a stage.
    """
    from xcit_dino.slurm import snapshot, submit

    try:
        code = snapshot.copy_code(launched.folder(launch.run) / "code")
    except OSError as error:
        raise InputError(f"--output_dir {launch.run}: {error.strerror}") from error
    if cluster == "slurm":
        submit.check_accepted(launch, todo, code)
    stages = {stage.name: {"job_id": "", "config": dump(stage.config)} for stage in todo}
    record: dict[str, Any] = {
        "cluster": cluster,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pid_start": launched.process_start_time(os.getpid()),
        "code": str(code),
        "max_requeues": launch.launch.max_requeues,
        "argv": sys.argv,
        "needs": needs(launch),
        "stages": stages,
        "earlier": attempts.earlier_stages(launch.run, stages),
    }
    launched.clear_cancel(launch.run)
    launched.write_launch(launch.run, record)
    for stage in todo:
        attempts.save(launch.run, attempts.Record(stage.name))
    return code


def print_submitted(launch: Launch, record: dict[str, Any]) -> int:
    """Print the submitted jobs and how to follow them."""
    for name, stage in record["stages"].items():
        print(f"{name}: job {stage['job_id']}")
    print(f"follow with: xcit-dino launch status {launch.run}   (logs, cancel likewise)")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """``xcit-dino launch`` with these arguments."""
    from xcit_dino import cli

    return cli.main(["launch", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    # a script's own folder is first on sys.path; modules are to be found in the package only
    sys.path[:] = [
        entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent
    ]
    sys.exit(main())
