"""SLURM's own commands, called with argument lists: nothing here passes through a shell."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence

from xcit_dino.errors import InputError, suggest

TIMEOUT = 60  # seconds; an overloaded controller responds slowly
REQUEUE_ATTEMPTS, PAUSE = 20, 15.0  # number of attempts to requeue, and seconds between them
CHECK = 'for path; do [ -r "$path" ] || echo "$SLURMD_NODENAME $path"; done'


class SlurmError(RuntimeError):
    """A command failed; the message is SLURM's."""


def run_command(*command: str, stdin: str | None = None) -> str:
    """Run one of SLURM's commands and return its output.

    Raises:
        SlurmError: with its error message.
    """
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise SlurmError(error_text(done.stderr or done.stdout))
    return done.stdout + done.stderr


def error_text(output: str) -> str:
    """SLURM's message on one line, without the prefixes ``sbatch: error:``."""
    lines = [re.sub(r"^\w+: (error|fatal): ", "", line).strip() for line in output.splitlines()]
    return "; ".join(line for line in lines if line)


def unavailable() -> str | None:
    """None if SLURM is installed and responds, otherwise the reason why not."""
    if shutil.which("sbatch") is None:
        return "no sbatch on this machine"
    try:
        run_command("sinfo", "--noheader", "--format=%P")
    except SlurmError as error:
        return str(error)
    return None


def partitions() -> dict[str, int]:
    """``partition -> largest number of GPUs of a node``; '' is the default partition."""
    found: dict[str, int] = {}
    for line in run_command("sinfo", "--noheader", "--format=%P|%G").splitlines():
        name, _, gres = line.partition("|")
        gpus = sum(int(n) for n in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres))
        for key in [name.rstrip("*")] + [""] * name.endswith("*"):
            found[key] = max(found.get(key, 0), gpus)
    return found


def gpus_per_node(partition: str | None) -> int:
    """GPUs per node of a partition (None: the default one).

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


def test_only(script: str) -> str:
    """SLURM's answer to a script, without queueing it (``sbatch --test-only``)."""
    return error_text(run_command("sbatch", "--test-only", stdin=script))


def job_fields(job_id: str) -> dict[str, str]:
    """Fields of ``scontrol show job`` as a dict.

    Raises:
        SlurmError: the controller has forgotten the job, or does not respond.
    """
    return dict(
        re.findall(r"(\S+?)=(\S*)", run_command("scontrol", "show", "job", "--oneliner", job_id))
    )


def job_state(job_id: str) -> str:
    """State of a job, or '' if the controller has forgotten it."""
    try:
        return job_fields(job_id).get("JobState", "")
    except SlurmError:
        return ""


def queue(job_ids: Sequence[str]) -> dict[str, dict[str, str]]:
    """``job id -> state, reason, nodes, start`` of pending and running jobs."""
    if not job_ids:
        return {}
    columns = "%i|%T|%R|%N|%S"
    try:
        output = run_command(
            "squeue", "--noheader", f"--jobs={','.join(job_ids)}", f"--format={columns}"
        )
    except SlurmError as error:
        if "Invalid job id" in str(error):  # all of them have ended
            return {}
        raise
    rows = [line.split("|", 4) for line in output.splitlines() if line.count("|") >= 4]
    return {
        row[0]: dict(zip(("state", "reason", "nodes", "start"), row[1:], strict=True))
        for row in rows
    }


def jobs_named(job_name: str) -> list[str]:
    """Ids of this user's pending and running jobs with a given name."""
    return run_command(
        "squeue", "--noheader", f"--user={os.getuid()}", f"--name={job_name}", "--format=%i"
    ).split()


def requeue(job_id: str, restart: int) -> bool:
    """Called in a job: requeue it, unless SLURM has already done so (preemption, dead node).

    Retried while the controller is busy or unreachable: a job not requeued now never will be.

    Args:
        restart: how often the job had been restarted when this attempt began.

    Returns:
        Whether it will run again; False if it was cancelled.

    Raises:
        SlurmError: with its error message.
    """
    for patience in reversed(range(REQUEUE_ATTEMPTS)):
        try:
            known = job_fields(job_id)
            if int(known["Restarts"]) > restart:
                return True
            if known["JobState"] != "RUNNING" and known["Reason"] != "TimeLimit":
                return False
            run_command("scontrol", "requeue", job_id)
            return True
        except SlurmError:
            if not patience:
                raise
            time.sleep(PAUSE)
    raise AssertionError("unreachable")


def signal_step(job_id: str, name: str) -> None:
    """Send a signal to the ranks of a job, but not to its script: SIGKILL to the whole job would
    end it for good."""
    steps = run_command(
        "squeue", "--steps", "--noheader", f"--jobs={job_id}", "--format=%i"
    ).split()
    run_command(
        "scancel", f"--signal={name}", *[step for step in steps if step.split(".")[1].isdigit()]
    )


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs; those already ended are ignored."""
    if job_ids:
        run_command("scancel", "--quiet", *job_ids)


def unreadable(paths: Sequence[str], nodes: int) -> str:
    """Called in a job: a message that names what some of its nodes cannot read; '' if none."""
    if nodes == 1:
        here = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        missing = [f"{here} {path}" for path in paths if not os.access(path, os.R_OK)]
    else:
        step = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
        missing = run_command(*step, "sh", "-c", CHECK, "check", *paths).splitlines()
    by_node: dict[str, list[str]] = {}
    for line in sorted(missing):
        node, _, path = line.partition(" ")
        by_node.setdefault(node, []).append(path)
    if not by_node:
        return ""
    first, *others = by_node
    where = f"{first} (and {len(others)} other nodes)" if others else first
    return (
        f"{', '.join(by_node[first])} cannot be read on {where}; keep --output_dir, --data_path "
        "and the Python environment in folders that all nodes share, at the same path"
    )
