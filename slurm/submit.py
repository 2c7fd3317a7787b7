"""Stages as SLURM jobs, each waiting for the one before to succeed."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import SlurmExecutor

from xcit_dino.errors import InputError
from xcit_dino.progress import STATE_FILE
from xcit_dino.slurm import attempts, scheduler
from xcit_dino.slurm.config import Launch, Stage, slurm_option
from xcit_dino.slurm.job import job_of

TIMEOUT = 1440  # minutes


class Executor(SlurmExecutor):
    """submitit's, able to write its script where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def executor(launch: Launch, stage: Stage, code: Path, after: str | None = None) -> Executor:
    """The executor that submits one stage; ``after`` is what it waits for (``afterok:123``)."""
    made = Executor(folder=attempts.job_folder(launch.run, "%j"), max_num_timeout=0)
    made.update_parameters(**parameters(launch, stage, code, after))
    return made


def parameters(launch: Launch, stage: Stage, code: Path, after: str | None) -> dict[str, Any]:
    """submitit's parameters for one stage."""
    asked, options = stage.resources, launch.launch
    own = {
        name: getattr(asked, name)
        for name in ("partition", "account", "qos", "constraint", "exclude", "comment", "mem")
    }
    extra: dict[str, Any] = {"requeue": True, "kill-on-invalid-dep": "yes"}
    extra |= {k.replace("_", "-"): v for k, v in map(slurm_option, asked.slurm)}
    return {name: value for name, value in own.items() if value is not None} | {
        "job_name": f"{launch.job_name}-{stage.name}",
        "nodes": asked.nodes,
        "ntasks_per_node": stage.tasks_per_node,
        "cpus_per_task": stage.cpus_per_task,
        "gpus_per_node": asked.ngpus or None,
        "time": asked.timeout or TIMEOUT,
        "signal_delay_s": options.signal_delay,
        "dependency": after,
        # one dead rank ends all; since 22.05 srun does not take --cpus-per-task over from sbatch
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={stage.cpus_per_task}"],
        "setup": before(launch, stage, code),
        "teardown": behind(launch, stage),
        "additional_parameters": extra,
    }


def before(launch: Launch, stage: Stage, code: Path) -> list[str]:
    """Shell lines in front of srun: the run's own code, the user's lines, the attempt counted."""
    progress = attempts.progress_file(launch.run, stage.name)
    tasks = f"$((SLURM_JOB_NUM_NODES * {stage.tasks_per_node}))"  # a requeued job may have shrunk
    return [
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
        f"export {STATE_FILE}={shlex.quote(str(progress))}",
        f"export SLURM_NTASKS={tasks} SLURM_NPROCS={tasks}",
        "trap : TERM  # preemption ends the ranks; this script still has to say how it ended",
        *launch.launch.setup,
        f"{bracket('begin', launch, stage)} || exit $?",
    ]


def behind(launch: Launch, stage: Stage) -> list[str]:
    """Shell lines after srun: judge the attempt, put the job back into the queue if need be."""
    return [f"{bracket('finish', launch, stage)} $?", "exit $?"]


def bracket(action: str, launch: Launch, stage: Stage) -> str:
    """The command that brackets an attempt."""
    words = [sys.executable, "-m", "xcit_dino.slurm.job", action, str(launch.run), stage.name]
    return shlex.join(words)


def script(launch: Launch, stage: Stage, code: Path, after: str | None = None) -> str:
    """The submission script, letter by letter."""
    made = executor(launch, stage, code, after)
    return made._make_submission_file_text(made._submitit_command_str, "")


def try_out(launch: Launch, stages: list[Stage], code: Path) -> None:
    """Ask SLURM what it thinks of the jobs, before anything is written or queued.

    Raises:
        InputError: SLURM refuses one, in its own words.
    """
    for stage in stages:
        try:
            scheduler.try_out(script(launch, stage, code))
        except scheduler.SlurmError as error:
            raise refused(stage, error) from error


def submit(
    launch: Launch, stages: list[Stage], code: Path, after: str | None = None
) -> dict[str, str]:
    """Submit stages as a chain, or none of them.

    Args:
        after: a job that has to end first, however it ends.

    Returns:
        stage -> job id.

    Raises:
        InputError: SLURM refused one, in its own words.
    """
    jobs: dict[str, str] = {}
    wait_for = f"afterany:{after}" if after else None
    for stage in stages:
        job = job_of(launch, stage)
        try:
            jobs[stage.name] = executor(launch, stage, code, wait_for).submit(job).job_id
        except FailedJobError as error:
            scheduler.cancel(list(jobs.values()))
            raise refused(stage, error) from error
        wait_for = f"afterok:{jobs[stage.name]}"
    return jobs


def refused(stage: Stage, error: Exception) -> InputError:
    """SLURM's words as bad input."""
    return InputError(f"SLURM refuses the job of stage {stage.name}: {scheduler.words(str(error))}")
