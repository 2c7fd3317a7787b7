"""``launch status | logs | cancel RUN``."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from xcit_dino.errors import InputError
from xcit_dino.files import check_writable
from xcit_dino.progress import clock
from xcit_dino.provenance import read_results
from xcit_dino.slurm import attempts, launched, scheduler, watch
from xcit_dino.slurm.config import CancelConfig, LogsConfig, StatusConfig

Queue = dict[str, dict[str, str]]
STALE = 60.0  # age of a stage's progress, in seconds, from which it is shown


def owner(run: Path) -> str:
    """The job or process that uses a run folder, as text; '' if none."""
    if not launched.is_launched(run):
        return ""
    launch = launched.read_launch(run)
    if launch["cluster"] == "slurm":
        jobs = sorted(queue(launch).items(), key=lambda pair: pair[1]["state"] != "RUNNING")
        return next((f"SLURM job {number} ({job['state']})" for number, job in jobs), "")
    if local_owner(launch):
        return f"process {launch['pid']} on {launch['host']}"
    return ""


def queue(launch: dict[str, Any]) -> Queue:
    """The run's pending and running SLURM jobs."""
    jobs = [stage["job_id"] for stage in launch["stages"].values() if stage["job_id"]]
    return scheduler.queue(jobs) if launch["cluster"] == "slurm" else {}


def local_owner(launch: dict[str, Any]) -> bool:
    """Whether the launcher of local processes still runs on this machine."""
    here = launch["host"] == socket.gethostname()
    return here and launched.process_start_time(launch["pid"]) == launch["pid_start"]


# -- status ----------------------------------------------------------------------------------------


def status(config: StatusConfig) -> None:
    """Print a table with one row per stage, and below it the progress of the stages that have
    started; for every run of ``--seeds``."""
    for run in launched.seed_runs(config.run) or [config.run]:
        show_status(run)


def show_status(run: Path) -> None:
    """Print the table of one run: stages of earlier launches first."""
    from rich.console import Console
    from rich.table import Table

    launch = launched.read_launch(run)
    jobs = queue(launch)
    table = Table(box=None)
    for column in ("stage", "state", "job", "nodes", "restarts", "failures"):
        table.add_column(column, overflow="fold")
    previous, lines = None, []
    for stage in launched.all_stages(launch):
        row = describe(run, stage, launch, jobs, previous)
        if progress := row.pop("progress"):
            lines.append(f"{stage}: {progress}")
        table.add_row(*row.values())
        previous = row if stage in launch["stages"] else None
    print(f"{run} ({launch['cluster']})", flush=True)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    print(*lines, f"next stage: {next_stage(run, launch) or 'none'}", sep="\n")


def state(run: Path, stage: str) -> str:
    """A stage's state with its reason: ``pending: (Resources)``."""
    launch = launched.read_launch(run)
    return describe(run, stage, launch, queue(launch), None)["state"]


def describe(
    run: Path, stage: str, launch: dict[str, Any], jobs: Queue, previous: dict[str, str] | None
) -> dict[str, str]:
    """One row of the table; ``previous`` is the row of the stage on which this one depends."""
    record = attempts.load(run, stage)
    job_id = launched.all_stages(launch)[stage]["job_id"] or record.job_id
    job = jobs.get(job_id)
    state, reason = record.state, record.reason
    if job is not None:
        state = {"PENDING": record.state, "RUNNING": "running"}.get(
            job["state"], job["state"].lower()
        )
        reason = job["reason"].replace("(None)", "") if job["state"] == "PENDING" else ""
    elif record.state == "waiting" and launched.cancelled(run):
        state, reason = "cancelled", "by `launch cancel`"
    elif not record.finished and not local_owner(launch):
        state, reason = infer_state(run, record, previous, submitted=bool(job_id))
    if state == "running":
        reason = ""  # that of an earlier attempt
    shown = progress(run, stage) if state in ("running", "requeued", "stopped") else ""
    return {
        "stage": stage,
        "state": f"{state}: {reason}" if reason else state,
        "job": job_id,
        "nodes": record.hosts,
        "restarts": str(max(0, record.attempts - 1)),
        "failures": str(record.failures),
        "progress": shown or outcome(run, stage, launch, record),
    }


def infer_state(
    run: Path, record: attempts.Record, previous: dict[str, str] | None, *, submitted: bool
) -> tuple[str, str]:
    """State and reason of a stage whose job ended without a report."""
    if launched.cancelled(run):
        return "cancelled", "by `launch cancel`"
    before = previous["state"] if previous else "done"
    if record.state == "waiting" and not (record.began or submitted):
        if before.startswith(("done", "not started")):
            return "not started", "launch it again"
    if record.state == "waiting" and previous and not before.startswith("done"):
        return "cancelled", f"{previous['stage']} is {previous['state']}"
    state = scheduler.job_state(record.job_id).lower() if record.job_id else ""
    seen = attempts.last_seen(run, record.stage) if record.began else ""
    where = record.hosts or "any node"
    return state or "lost", f"ended without a report on {where}{seen}; launch it again"


def progress(run: Path, stage: str) -> str:
    """``pretraining 120/400 steps  eta 0:12:10  epoch 3.00  loss 4.31 ...  knn 45.2``."""
    state = watch.read_state(attempts.progress_file(run, stage))
    if state is None:
        return "starting"
    rate = (state["done"] - state["start"]) / max(state["seconds"], 1e-9)
    age = time.time() - state["time"]
    left = (state["total"] - state["done"]) / rate - age if rate else 0
    parts = [
        f"{state['label']} {state['done']:,.0f}/{state['total']:,.0f} {state['unit']}".rstrip(),
        f"eta {clock(max(left, 0))}" if rate else "",
        state["shown"],
        f"(as of {clock(age)} ago)" if age > STALE else "",
    ]
    return "  ".join(filter(None, parts))


def outcome(run: Path, stage: str, launch: dict[str, Any], record: attempts.Record) -> str:
    """``took 0:12:10  top1_k20 41.20``: duration of a stage's last attempt, and its results."""
    if not (record.began and record.ended):
        return ""
    seconds = datetime.fromisoformat(record.ended) - datetime.fromisoformat(record.began)
    parts = [f"took {clock(seconds.total_seconds())}"]
    if record.state == "done":
        folder = Path(launched.all_stages(launch)[stage]["config"].get("output_dir", run))
        metrics = read_results(folder).get(stage, {}).get("metrics", {})
        last = watch.read_state(attempts.progress_file(run, stage)) or {"shown": ""}
        parts += [f"{name} {value:.2f}" for name, value in metrics.items()] or [last["shown"]]
    return "  ".join(filter(None, parts))


def next_stage(run: Path, launch: dict[str, Any]) -> str:
    """The first stage that has not started."""
    waiting = (stage for stage in launch["stages"] if attempts.load(run, stage).state == "waiting")
    return next(waiting, "")


# -- logs ------------------------------------------------------------------------------------------


def logs(config: LogsConfig) -> None:
    """Print a rank's log, by default of the stage started last."""
    launch = launched.read_launch(config.run)
    records = {stage: attempts.load(config.run, stage) for stage in launched.all_stages(launch)}
    begun = {stage: record for stage, record in records.items() if record.job_id}
    stage = config.stage or next(reversed(begun), None)
    if stage is None or stage not in begun:
        raise InputError(f"{config.run}: {stage or 'no stage'} has not started; see launch status")
    job_id = begun[stage].job_id
    paths = [watch.log_path(config.run, job_id, config.rank, kind) for kind in ("out", "err")]
    if not any(path.is_file() for path in paths):
        raise InputError(
            f"--rank {config.rank}: job {job_id} of {stage} has no such log ({paths[0]})"
        )

    def active() -> bool:
        return (
            config.follow
            and bool(owner(config.run))
            and not attempts.load(config.run, stage).finished
        )

    watch.show(config.run, stage, job_id, active, config.rank)


# -- cancel ----------------------------------------------------------------------------------------


def cancel(config: CancelConfig) -> None:
    """End the jobs of a run, or of all runs of ``--seeds``; a running stage first saves a
    checkpoint."""
    for run in reversed(launched.seed_runs(config.run) or [config.run]):  # pending ones first
        cancel_run(run)


def cancel_run(run: Path) -> None:
    """End one run's jobs, without affecting other runs of the same launcher."""
    launch = launched.read_launch(run)
    user = owner(run)
    remedy = "call `launch cancel` where and as whom the run was launched"
    check_writable(launched.folder(run), remedy, str(run))
    launched.cancel(run)
    if launch["cluster"] == "slurm":
        scheduler.cancel(list(reversed(queue(launch))))
    elif user and all(attempts.load(run, stage).state == "waiting" for stage in launch["stages"]):
        user = f"{run}, which had not started"
    elif user and not all(attempts.load(run, stage).finished for stage in launch["stages"]):
        os.kill(launch["pid"], signal.SIGTERM)
    elif user:
        user = ""  # done; the launcher is running another run
    elif launch["host"] != socket.gethostname():
        raise InputError(f"{run}: its processes are on {launch['host']}; cancel it there")
    print(f"cancelled {user}" if user else f"{run}: nothing is running")
