"""SLURM's own commands. Arguments are lists: nothing here passes through a shell."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence

from xcit_dino.errors import InputError, suggest

SECONDS = 60  # an overloaded controller answers slowly
TRIES, PAUSE = 20, 15.0  # times, and seconds between them, that a job insists on its requeue
CHECK = 'for path; do [ -r "$path" ] || echo "$SLURMD_NODENAME $path"; done'


class SlurmError(RuntimeError):
    """A command failed; the text is SLURM's."""


def ask(*command: str, stdin: str | None = None) -> str:
    """Output of one of SLURM's commands.

    Raises:
        SlurmError: its own words.
    """
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise SlurmError(words(done.stderr or done.stdout))
    return done.stdout + done.stderr


def words(output: str) -> str:
    """SLURM's message on one line, without ``sbatch: error:`` in front of each part."""
    lines = [re.sub(r"^\w+: (error|fatal): ", "", line).strip() for line in output.splitlines()]
    return "; ".join(line for line in lines if line)


def answers() -> str | None:
    """None where SLURM is there and answers; otherwise why not."""
    if shutil.which("sbatch") is None:
        return "no sbatch on this machine"
    try:
        ask("sinfo", "--noheader", "--format=%P")
    except SlurmError as error:
        return str(error)
    return None


def partitions() -> dict[str, int]:
    """``partition -> GPUs of its richest node``; the default partition is also there as ''."""
    found: dict[str, int] = {}
    for line in ask("sinfo", "--noheader", "--format=%P|%G").splitlines():
        name, _, gres = line.partition("|")
        gpus = sum(int(n) for n in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres))
        for key in [name.rstrip("*")] + [""] * name.endswith("*"):
            found[key] = max(found.get(key, 0), gpus)
    return found


def gpus_per_node(partition: str | None) -> int:
    """GPUs of a node of a partition (None: the default one).

    Raises:
        InputError: no such partition.
    """
    known = partitions()
    if (partition or "") not in known:
        raise InputError(
            f"--partition {partition}: no such partition{suggest(partition or '', known)} "
            f"(there are {', '.join(name for name in known if name)})"
        )
    return known[partition or ""]


def try_out(script: str) -> str:
    """What SLURM would do with a script, without queueing it (``sbatch --test-only``)."""
    return words(ask("sbatch", "--test-only", stdin=script))


def facts(job_id: str) -> dict[str, str]:
    """``scontrol show job``, name by name.

    Raises:
        SlurmError: the controller has forgotten the job, or does not answer.
    """
    return dict(re.findall(r"(\S+?)=(\S*)", ask("scontrol", "show", "job", "--oneliner", job_id)))


def job_state(job_id: str) -> str:
    """State of a job that the controller still remembers, or ''."""
    try:
        return facts(job_id).get("JobState", "")
    except SlurmError:
        return ""


def queue(job_ids: Sequence[str]) -> dict[str, dict[str, str]]:
    """``job id -> state, reason, nodes, restarts`` of jobs that wait or run."""
    if not job_ids:
        return {}
    columns = "%i|%T|%R|%N|%S"
    try:
        output = ask("squeue", "--noheader", f"--jobs={','.join(job_ids)}", f"--format={columns}")
    except SlurmError as error:
        if "Invalid job id" in str(error):  # all of them have left
            return {}
        raise
    rows = [line.split("|", 4) for line in output.splitlines() if line.count("|") >= 4]
    return {
        row[0]: dict(zip(("state", "reason", "nodes", "start"), row[1:], strict=True))
        for row in rows
    }


def named(job_name: str) -> list[str]:
    """Ids of this user's jobs of a name that wait or run."""
    return ask(
        "squeue", "--noheader", f"--user={os.getuid()}", f"--name={job_name}", "--format=%i"
    ).split()


def requeue(job_id: str, restart: int) -> bool:
    """Run in a job: put it back into the queue, unless SLURM has done so (preemption, dead node).

    A controller that is busy or away is asked again for a while: what is not requeued now never is.

    Args:
        restart: how often the job had been restarted when this attempt began.

    Returns:
        Whether it will run again; not so where somebody has cancelled it.

    Raises:
        SlurmError: its words.
    """
    for patience in reversed(range(TRIES)):
        try:
            known = facts(job_id)
            if int(known["Restarts"]) > restart:
                return True
            if known["JobState"] != "RUNNING" and known["Reason"] != "TimeLimit":
                return False
            ask("scontrol", "requeue", job_id)
            return True
        except SlurmError:
            if not patience:
                raise
            time.sleep(PAUSE)
    raise AssertionError("unreachable")


def signal_step(job_id: str, name: str) -> None:
    """Send a signal to the ranks of a job, and not to its script: SIGKILL to a whole job ends it
    for good."""
    steps = ask("squeue", "--steps", "--noheader", f"--jobs={job_id}", "--format=%i").split()
    ask("scancel", f"--signal={name}", *[step for step in steps if step.split(".")[1].isdigit()])


def cancel(job_ids: Sequence[str]) -> None:
    """End jobs; those that have ended are no error."""
    if job_ids:
        ask("scancel", "--quiet", *job_ids)


def lacking(paths: Sequence[str], nodes: int) -> str:
    """Run in a job: what some of its nodes cannot read, in words; '' when all read all."""
    if nodes == 1:
        here = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        missing = [f"{here} {path}" for path in paths if not os.access(path, os.R_OK)]
    else:
        step = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
        missing = ask(*step, "sh", "-c", CHECK, "check", *paths).splitlines()
    lacks: dict[str, list[str]] = {}
    for line in sorted(missing):
        node, _, path = line.partition(" ")
        lacks.setdefault(node, []).append(path)
    if not lacks:
        return ""
    first, *others = lacks
    where = f"{first} (and {len(others)} other nodes)" if others else first
    return (
        f"{', '.join(lacks[first])} cannot be read on {where}; keep --output_dir, --data_path "
        "and the Python environment in folders that all nodes share, at the same path"
    )
