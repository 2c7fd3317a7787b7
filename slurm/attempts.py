"""The record of a stage's attempts in the run folder, and what happens after each.

``RUN/launch/STAGE.json`` is the record. It has one writer at a time (the batch script on the first
node, or the launcher of local processes), which calls :func:`begin` before and :func:`finish` after
each attempt. In between, each rank writes its status to its own file in ``RUN/launch/jobs/ID``:
that it received a signal, or why it failed.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from xcit_dino.errors import InputError
from xcit_dino.files import write_atomic
from xcit_dino.provenance import now
from xcit_dino.slurm.launched import all_stages, cancelled, folder, is_launched, read_launch

SCRIPT = "script"  # in place of a rank in statuses written by the job's script
RESUMABLE = 75  # exit code of a job that saved a checkpoint before it was done (EX_TEMPFAIL)
State = Literal[
    "waiting", "running", "requeued", "stopped", "done", "failed", "cancelled"
]  # stopped: saved, restarted only by the user
DEATH = r"^(?:srun|local): error: (\S+: tasks? [\d,-]+: .+|Node failure on \S+)$"
TERMINATED, OUR_SIGNAL = "Terminated", "User defined signal 2"  # as srun prints them
SCHEDULER = ("SIGUSR2", "SIGTERM")  # sent by a scheduler to stop a job that is to be requeued


@dataclass
class Record:
    """One stage of one run."""

    stage: str
    state: State = "waiting"
    job_id: str = ""
    restart: int = 0  # of this job id
    attempts: int = 0
    failures: int = 0
    hosts: str = ""
    began: str = ""
    ended: str = ""
    reason: str = ""  # of the state
    bad_input: bool = False  # the failure is for the user to fix
    failed_at: str = ""  # location of the last failure, and the newest checkpoint at that time
    config: dict[str, Any] = field(default_factory=dict)  # with which the stage was completed

    @property
    def finished(self) -> bool:
        return self.state in ("stopped", "done", "failed", "cancelled")


def job_folder(run: Path, job_id: str) -> Path:
    """Logs and pickles of one job (submitit writes them there)."""
    return folder(run) / "jobs" / job_id


def progress_file(run: Path, stage: str) -> Path:
    """The file to which rank 0 of a stage publishes its progress."""
    return folder(run) / f"{stage}.progress.json"


def load(run: Path, stage: str) -> Record:
    """Read the record of a stage; a new one if it has none."""
    path = folder(run) / f"{stage}.json"
    if not path.is_file():
        return Record(stage)
    known = {f.name for f in fields(Record)}
    return Record(**{k: v for k, v in json.loads(path.read_text()).items() if k in known})


def save(run: Path, record: Record) -> None:
    """Write a record atomically."""
    write_atomic(folder(run) / f"{record.stage}.json", json.dumps(asdict(record), indent=1) + "\n")


# -- status of the ranks ---------------------------------------------------------------------------


def write_status(run: Path, job_id: str, restart: int, rank: int | str, **status: Any) -> None:
    """Add entries to a rank's status of this attempt.

    ``heard``: name of the received signal; ``stopped``: why it saved a checkpoint and exited;
    ``done``: rank 0 has completed the stage (srun's exit code is no proof: it is 0 when a node
    dies); ``error`` and ``code``: it failed, ``where`` in the code, ``final`` if a restart cannot
    help; ``port``: of the rendezvous.
    """
    path = job_folder(run, job_id) / f"words-{restart}-{rank}.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    status = {**before, "rank": rank, "host": host, "time": time.time(), **status}
    write_atomic(path, json.dumps(status))


def read_statuses(run: Path, job_id: str, restart: int) -> list[dict[str, Any]]:
    """Statuses of the ranks of an attempt, ordered by time."""
    paths = job_folder(run, job_id).glob(f"words-{restart}-*.json")
    return sorted((json.loads(path.read_text()) for path in paths), key=lambda w: w["time"])


def received_signal(run: Path, record: Record) -> str:
    """Name of the signal that stopped the attempt, or ''."""
    return next(
        (w["heard"] for w in read_statuses(run, record.job_id, record.restart) if "heard" in w), ""
    )


def failure(run: Path, record: Record) -> str:
    """Why an attempt failed, with rank and host: the first failure, of which others are results."""
    died = first_death(run, record)
    if killed(run, record):
        reason = died.replace(
            OUR_SIGNAL, "signaled to stop before it had started (raise --timeout)"
        )
        return f"{reason}{last_seen(run, record.stage)}"
    errors = [w for w in read_statuses(run, record.job_id, record.restart) if "error" in w]
    if not errors:
        return died
    first = errors[0]
    if first["rank"] == SCRIPT:
        return first["error"]
    return f"rank {first['rank']} on {first['host']}: {first['error']}"


def killed(run: Path, record: Record) -> bool:
    """Whether an attempt was ended from outside, by a signal or the death of a node."""
    died = first_death(run, record)
    return bool(died) and "xited with exit code" not in died


def first_death(run: Path, record: Record) -> str:
    """The message of srun (or our own controller) about the first failed task of an attempt."""
    log = job_folder(run, record.job_id) / f"{record.job_id}_0_log.err"
    if not log.is_file():
        return ""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 262144))
        tail = file.read().decode(errors="replace").rpartition(marker(record))[2]
    found = re.search(DEATH, tail, re.MULTILINE)
    return found[1] if found else ""


def marker(record: Record) -> str:
    """The line that begins an attempt in the first rank's log, which a job's attempts share."""
    return f"{record.stage}: attempt {record.attempts} on {record.hosts}"


# -- attempts --------------------------------------------------------------------------------------


def begin(run: Path, stage: str, job_id: str, restart: int, hosts: str) -> Record:
    """Record the start of an attempt.

    An earlier attempt that ended without a report, and had not been signaled to stop, counts as a
    failure: its node died.

    Raises:
        InputError: the run was cancelled, or has failed too often.
    """
    record, max_requeues = load(run, stage), read_launch(run)["max_requeues"]
    if record.state == "running" and not received_signal(run, record):
        record.failures += 1
        record.reason = f"the job ended without a report on {record.hosts}{last_seen(run, stage)}"
    record.job_id, record.restart, record.hosts = job_id, restart, hosts
    if cancelled(run):
        record.state, record.reason, record.ended = "cancelled", "by `launch cancel`", now()
    elif record.failures > max_requeues:
        record.state, record.ended = "failed", now()
        record.reason = (
            f"failed {record.failures} times (--max_requeues {max_requeues}); {record.reason}"
        )
    else:
        progress_file(run, stage).unlink(missing_ok=True)
        record.state, record.began, record.ended = "running", now(), ""
        record.attempts += 1
    save(run, record)
    if record.state != "running":
        raise InputError(f"{stage} is not started: {record.state} ({record.reason})")
    return record


def finish(run: Path, stage: str, code: int) -> Record:
    """Record how an attempt ended; the state is then ``requeued`` if it has to be restarted.

    Args:
        code: exit code of all ranks together: 0 if all exited cleanly.
    """
    record, launch = load(run, stage), read_launch(run)
    statuses = read_statuses(run, record.job_id, record.restart)
    stopped = next((w["stopped"] for w in statuses if "stopped" in w), "")
    record.ended, record.reason = now(), ""
    if code == 0 and any("done" in w for w in statuses):
        record.state, record.config = "done", launch["stages"][stage]["config"]
    elif cancelled(run):
        record.state, record.reason = "cancelled", "by `launch cancel`"
    elif code == 0 and stopped:
        by_scheduler = received_signal(run, record) in SCHEDULER
        record.state, record.reason = "requeued" if by_scheduler else "stopped", stopped
    elif first_death(run, record).endswith(TERMINATED):
        record.state, record.reason = "requeued", "ended by the scheduler before it could save"
    else:
        record_failure(run, record, statuses, code, launch)
    save(run, record)
    return record


def record_failure(
    run: Path, record: Record, statuses: list[dict[str, Any]], code: int, launch: dict[str, Any]
) -> None:
    """Record a failure; the run is restarted unless that cannot help."""
    record.failures += 1
    record.reason = failure(run, record) or f"exit code {code}, without a report"
    record.bad_input = any(w.get("code") == 2 for w in statuses)
    final = any(w.get("final") for w in statuses)
    place = "" if killed(run, record) else failure_location(statuses, code)
    failed_at = place and f"{place} | {newest_checkpoint(run, record.stage, launch)}"
    if failed_at and failed_at == record.failed_at:  # a bug in the code recurs each time
        final, record.reason = True, f"{record.reason} (twice at the same place)"
    record.failed_at = failed_at
    again = not final and record.failures <= launch["max_requeues"]
    record.state = "requeued" if again else "failed"


def failure_location(statuses: list[dict[str, Any]], code: int) -> str:
    """Where the code failed, comparable between attempts: messages contain process ids, ports and
    times.

    '' if the code was not at fault: SLURM started no processes, or a signal ended them all.
    """
    errors = [w for w in statuses if "error" in w]
    if errors:
        first = errors[0]
        return "" if first["rank"] == SCRIPT else first.get("where") or first["error"]
    return f"exit code {code}" if 0 <= code < 128 else ""


def newest_checkpoint(run: Path, stage: str, launch: dict[str, Any]) -> str:
    """Name of the newest checkpoint in a stage's output folder, or ''."""
    folder = Path(launch["stages"][stage]["config"].get("output_dir") or run)
    return max((path.name for path in folder.glob("checkpoints/checkpoint-*.pth")), default="")


def last_seen(run: Path, stage: str) -> str:
    """``", last seen alive at 2026-11-28 20:03:11 (pretraining 120/400 steps)"``, from the progress
    that an attempt published last; '' if it had published none."""
    try:
        state = json.loads(progress_file(run, stage).read_text())
    except (OSError, ValueError):
        return ""
    moment = datetime.fromtimestamp(state["time"]).isoformat(" ", "seconds")
    done = f"{state['done']:,.0f}/{state['total']:,.0f} {state['unit']}".rstrip()
    return f", last seen alive at {moment} ({state['label']} {done})"


def earlier_stages(run: Path, todo: Iterable[str]) -> dict[str, Any]:
    """Stages started by previous launches, except those in ``todo``."""
    if not is_launched(run):
        return {}
    known = all_stages(read_launch(run))
    return {k: v for k, v in known.items() if k not in todo and load(run, k).attempts}
