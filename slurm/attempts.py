"""What the run folder remembers of a stage's attempts, and what follows from how one ended.

``RUN/launch/STAGE.json`` is the record. It has one writer at a time: whoever brackets an attempt
(the batch script on the first node, or the launcher for local processes) calls :func:`begin` before
and :func:`finish` after it. The ranks in between leave words of their own, a file each in
``RUN/launch/jobs/ID``: that a signal was heard, or why they failed.
"""

from __future__ import annotations

import glob
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

SCRIPT = "script"  # stands for a rank where the job's script leaves a word
RESUMABLE = 75  # exit code of a job that saved itself and is not done (EX_TEMPFAIL of sysexits.h)
State = Literal[
    "waiting", "running", "requeued", "stopped", "done", "failed", "cancelled"
]  # stopped: saved, and started again by nobody but the user
DEATH = r"^(?:srun|local): error: (\S+: tasks? [\d,-]+: .+|Node failure on \S+)$"
TERMINATED, OUR_SIGNAL = "Terminated", "User defined signal 2"  # srun's words
SCHEDULER = ("SIGUSR2", "SIGTERM")  # a scheduler tells a job to stop with these; it shall run again


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
    reason: str = ""  # of the state, in words
    bad_input: bool = False  # the failure is the user's to mend
    failed_at: str = ""  # where the code failed last, and the newest checkpoint then
    config: dict[str, Any] = field(default_factory=dict)  # of the stage when it was done

    @property
    def finished(self) -> bool:
        return self.state in ("stopped", "done", "failed", "cancelled")


def folder(run: Path) -> Path:
    """Where a run's launcher files are."""
    return run / "launch"


def job_folder(run: Path, job_id: str) -> Path:
    """Logs and pickles of one job (submitit writes them there)."""
    return folder(run) / "jobs" / job_id


def progress_file(run: Path, stage: str) -> Path:
    """Where rank 0 of a stage publishes its progress bar."""
    return folder(run) / f"{stage}.progress.json"


def load(run: Path, stage: str) -> Record:
    """The record of a stage; a blank one where it has none."""
    path = folder(run) / f"{stage}.json"
    if not path.is_file():
        return Record(stage)
    known = {f.name for f in fields(Record)}
    return Record(**{k: v for k, v in json.loads(path.read_text()).items() if k in known})


def save(run: Path, record: Record) -> None:
    """Write a record, whole or not at all."""
    write_atomic(folder(run) / f"{record.stage}.json", json.dumps(asdict(record), indent=1) + "\n")


# -- words of the ranks ----------------------------------------------------------------------------


def leave_word(run: Path, job_id: str, restart: int, rank: int | str, **word: Any) -> None:
    """Add to what a rank says of its attempt.

    ``heard``: name of a signal; ``stopped``: it saved itself and left, and why; ``done``: rank 0 is
    through with the stage (srun's exit code is no proof: it is 0 when a node dies); ``error`` and
    ``code``: it failed, ``where`` in the code, ``final`` where a restart cannot help; ``port``:
    where the ranks met.
    """
    path = job_folder(run, job_id) / f"words-{restart}-{rank}.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    word = {**before, "rank": rank, "host": host, "time": time.time(), **word}
    write_atomic(path, json.dumps(word))


def words(run: Path, job_id: str, restart: int) -> list[dict[str, Any]]:
    """What the ranks of an attempt left, in order of time."""
    paths = job_folder(run, job_id).glob(f"words-{restart}-*.json")
    return sorted((json.loads(path.read_text()) for path in paths), key=lambda w: w["time"])


def heard(run: Path, record: Record) -> str:
    """The signal that the attempt was told to stop with, or ''."""
    return next((w["heard"] for w in words(run, record.job_id, record.restart) if "heard" in w), "")


def failure(run: Path, record: Record) -> str:
    """Why an attempt failed, naming rank and host: what failed first, the others only follow."""
    died = first_death(run, record)
    if killed(run, record):
        reason = died.replace(
            OUR_SIGNAL, "told to save itself before it had started (raise --timeout)"
        )
        return f"{reason}{last_seen(run, record.stage)}"
    errors = [w for w in words(run, record.job_id, record.restart) if "error" in w]
    if not errors:
        return died
    first = errors[0]
    if first["rank"] == SCRIPT:
        return first["error"]
    return f"rank {first['rank']} on {first['host']}: {first['error']}"


def killed(run: Path, record: Record) -> bool:
    """Whether an attempt was ended from outside: a signal, or a node that died."""
    died = first_death(run, record)
    return bool(died) and "xited with exit code" not in died


def first_death(run: Path, record: Record) -> str:
    """What srun (or our own controller) says of the first task of an attempt that failed."""
    log = job_folder(run, record.job_id) / f"{record.job_id}_0_log.err"
    if not log.is_file():
        return ""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 262144))
        tail = file.read().decode(errors="replace").rpartition(marker(record))[2]
    found = re.search(DEATH, tail, re.MULTILINE)
    return found[1] if found else ""


def marker(record: Record) -> str:
    """The line that begins an attempt in the first rank's log; a job's attempts share it."""
    return f"{record.stage}: attempt {record.attempts} on {record.hosts}"


# -- attempts --------------------------------------------------------------------------------------


def begin(run: Path, stage: str, job_id: str, restart: int, hosts: str) -> Record:
    """Count an attempt that is about to start.

    An attempt before it that ended without a word, and had not been told to stop, was a failure:
    its node died.

    Raises:
        InputError: the run was cancelled, or has failed too often.
    """
    record, max_requeues = load(run, stage), read_launch(run)["max_requeues"]
    if record.state == "running" and not heard(run, record):
        record.failures += 1
        record.reason = f"the job ended without a word on {record.hosts}{last_seen(run, stage)}"
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
    """Note how an attempt ended; the state is then ``requeued`` where it has to be started again.

    Args:
        code: exit code of the ranks together: 0 where all left in good order.
    """
    record, launch = load(run, stage), read_launch(run)
    said = words(run, record.job_id, record.restart)
    stopped = next((w["stopped"] for w in said if "stopped" in w), "")
    record.ended, record.reason = now(), ""
    if code == 0 and any("done" in w for w in said):
        record.state, record.config = "done", launch["stages"][stage]["config"]
    elif cancelled(run):
        record.state, record.reason = "cancelled", "by `launch cancel`"
    elif code == 0 and stopped:
        by_scheduler = heard(run, record) in SCHEDULER
        record.state, record.reason = "requeued" if by_scheduler else "stopped", stopped
    elif first_death(run, record).endswith(TERMINATED):
        record.state, record.reason = "requeued", "ended by the scheduler before it could save"
    else:
        judge_failure(run, record, said, code, launch)
    save(run, record)
    return record


def judge_failure(
    run: Path, record: Record, said: list[dict[str, Any]], code: int, launch: dict[str, Any]
) -> None:
    """Count a failure; the run starts again unless that cannot help."""
    record.failures += 1
    record.reason = failure(run, record) or f"exit code {code}, and not a word"
    record.bad_input = any(w.get("code") == 2 for w in said)
    final = any(w.get("final") for w in said)
    place = "" if killed(run, record) else place_of_failure(said, code)
    failed_at = place and f"{place} | {newest_checkpoint(run, record.stage, launch)}"
    if failed_at and failed_at == record.failed_at:  # a mistake in the code comes back each time
        final, record.reason = True, f"{record.reason} (twice at the same place)"
    record.failed_at = failed_at
    again = not final and record.failures <= launch["max_requeues"]
    record.state = "requeued" if again else "failed"


def place_of_failure(said: list[dict[str, Any]], code: int) -> str:
    """Where the code failed, comparable between attempts: texts hold process ids, ports and times.

    '' where it was not the code: SLURM started no processes, or a signal ended them all.
    """
    errors = [w for w in said if "error" in w]
    if errors:
        first = errors[0]
        return "" if first["rank"] == SCRIPT else first.get("where") or first["error"]
    return f"exit code {code}" if 0 <= code < 128 else ""


def newest_checkpoint(run: Path, stage: str, launch: dict[str, Any]) -> str:
    """Name of the newest checkpoint of a stage, in the folder that this stage trains in; or ''."""
    folder = Path(launch["stages"][stage]["config"].get("output_dir") or run)
    return max((path.name for path in folder.glob("checkpoints/checkpoint-*.pth")), default="")


def last_seen(run: Path, stage: str) -> str:
    """``", last seen alive at 2026-11-28 20:03:11 (pretraining 120/400 steps)"``: what the progress
    bar of an attempt said last; '' where it had not begun."""
    try:
        state = json.loads(progress_file(run, stage).read_text())
    except (OSError, ValueError):
        return ""
    moment = datetime.fromtimestamp(state["time"]).isoformat(" ", "seconds")
    done = f"{state['done']:,.0f}/{state['total']:,.0f} {state['unit']}".rstrip()
    return f", last seen alive at {moment} ({state['label']} {done})"


# -- the launch ------------------------------------------------------------------------------------


def write_launch(run: Path, launch: dict[str, Any]) -> None:
    """Keep what was launched: cluster, host, code, stages with job ids and configs; and in
    ``earlier`` the stages of launches before this one."""
    write_atomic(folder(run) / "launch.json", json.dumps(launch, indent=1) + "\n")


def is_launched(run: Path) -> bool:
    """Whether anything was launched in a folder."""
    return (folder(run) / "launch.json").is_file()


def seed_of(run: Path) -> str:
    """What follows ``-seed`` in a run folder's name."""
    return run.name.rpartition("-seed")[2]


def read_launch(run: Path) -> dict[str, Any]:
    """What was launched last in a run folder.

    Raises:
        InputError: nothing was.
    """
    if not is_launched(run):
        seeds = ", ".join(map(str, seed_runs(run)))
        raise InputError(
            f"{run}: not a run folder of the launcher (it has no launch/launch.json)"
            + (f"; there are {seeds}" if seeds else "")
        )
    return json.loads((folder(run) / "launch.json").read_text())


def earlier_stages(run: Path, todo: Iterable[str]) -> dict[str, Any]:
    """Stages that launches before this one have begun, other than those in ``todo``."""
    if not is_launched(run):
        return {}
    known = all_stages(read_launch(run))
    return {k: v for k, v in known.items() if k not in todo and load(run, k).attempts}


def all_stages(launch: dict[str, Any]) -> dict[str, Any]:
    """Stages of this launch and, before them, of those before it."""
    return launch.get("earlier", {}) | launch["stages"]


def seed_runs(run: Path) -> list[Path]:
    """The runs ``RUN-seed0``, ``RUN-seed1`` ... of ``--seeds``, where ``run`` itself is none."""
    if is_launched(run):
        return []
    found = (p for p in run.parent.glob(f"{glob.escape(run.name)}-seed*") if is_launched(p))
    return sorted((p for p in found if seed_of(p).isdigit()), key=lambda p: int(seed_of(p)))


def cancel(run: Path) -> None:
    """Let no job of this run start, or start again."""
    write_atomic(folder(run) / "cancelled", now() + "\n")


def cancelled(run: Path) -> bool:
    """Whether :func:`cancel` was called since the last submission."""
    return (folder(run) / "cancelled").is_file()


def allow(run: Path) -> None:
    """Take :func:`cancel` back."""
    (folder(run) / "cancelled").unlink(missing_ok=True)


def start_time(pid: int | None = None) -> str:
    """Start of a process in clock ticks since boot, '' where there is none: pids come round."""
    try:
        stat = Path(f"/proc/{pid or os.getpid()}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]
