"""Submit stages as SLURM jobs, each of which waits for the previous one to succeed."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import SlurmExecutor

from xcit_dino.errors import InputError
from xcit_dino.progress import STATE_FILE
from xcit_dino.slurm import attempts, container, scheduler
from xcit_dino.slurm.config import Launch, Stage, slurm_option
from xcit_dino.slurm.job import make_job

TIMEOUT = 1440  # minutes


class Executor(SlurmExecutor):
    """submitit's SLURM executor, able to write its script on machines without SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def executor(launch: Launch, stage: Stage, code: Path, after: str | None = None) -> Executor:
    """The executor that submits one stage; ``after`` is its dependency (``afterok:123``)."""
    folder, python = attempts.job_folder(launch.run, "%j"), container.python(launch, stage)
    made = Executor(folder=folder, max_num_timeout=0, python=python)
    made.update_parameters(**parameters(launch, stage, code, after))
    return made


def parameters(launch: Launch, stage: Stage, code: Path, after: str | None) -> dict[str, Any]:
    """submitit's parameters for one stage."""
    requested, options = stage.resources, launch.launch
    own = {
        name: getattr(requested, name)
        for name in ("partition", "account", "qos", "constraint", "exclude", "comment", "mem")
    }
    extra: dict[str, Any] = {"requeue": True, "kill-on-invalid-dep": "yes"}
    extra |= {k.replace("_", "-"): v for k, v in map(slurm_option, requested.slurm)}
    return {name: value for name, value in own.items() if value is not None} | {
        "job_name": f"{launch.job_name}-{stage.name}",
        "nodes": requested.nodes,
        "ntasks_per_node": stage.tasks_per_node,
        "cpus_per_task": stage.cpus_per_task,
        "gpus_per_node": requested.ngpus or None,
        "time": requested.timeout or TIMEOUT,
        "signal_delay_s": options.signal_delay,
        "dependency": after,
        # one dead rank ends all; since 22.05 srun does not inherit --cpus-per-task from sbatch
        "srun_args": [
            "--kill-on-bad-exit=1",
            f"--cpus-per-task={stage.cpus_per_task}",
            *container.srun_args(launch),
        ],
        "setup": before_srun(launch, stage, code),
        "teardown": after_srun(launch, stage),
        "additional_parameters": extra,
    }


def before_srun(launch: Launch, stage: Stage, code: Path) -> list[str]:
    """Shell lines before srun: the path to the copy of the code, the user's lines, ``begin``."""
    progress = attempts.progress_file(launch.run, stage.name)
    tasks = f"$((SLURM_JOB_NUM_NODES * {stage.tasks_per_node}))"  # a requeued job may have shrunk
    return [
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
        f"export {STATE_FILE}={shlex.quote(str(progress))}",
        f"export SLURM_NTASKS={tasks} SLURM_NPROCS={tasks}",
        "trap : TERM  # preemption ends the ranks; this script still has to record the outcome",
        *launch.launch.setup,
        f"{bracket('begin', launch, stage)} || exit $?",
    ]


def after_srun(launch: Launch, stage: Stage) -> list[str]:
    """Shell lines after srun: ``finish``, which requeues the job if necessary."""
    return [f"{bracket('finish', launch, stage)} $?", "exit $?"]


def bracket(action: str, launch: Launch, stage: Stage) -> str:
    """The command that runs before (``begin``) or after (``finish``) an attempt."""
    argv = [sys.executable, "-m", "xcit_dino.slurm.job", action, str(launch.run), stage.name]
    return shlex.join(argv)


def script(launch: Launch, stage: Stage, code: Path, after: str | None = None) -> str:
    """The submission script."""
    made = executor(launch, stage, code, after)
    return made._make_submission_file_text(made._submitit_command_str, "")


def check_accepted(launch: Launch, stages: list[Stage], code: Path) -> None:
    """Check that SLURM would accept the jobs, before anything is written or queued.

    Raises:
        InputError: SLURM refuses one; with its message.
    """
    for stage in stages:
        try:
            scheduler.test_only(script(launch, stage, code))
        except scheduler.SlurmError as error:
            raise refused(stage, error) from error


def submit(
    launch: Launch, stages: list[Stage], code: Path, after: str | None = None
) -> dict[str, str]:
    """Submit stages as a chain, all or none.

    Args:
        after: a job that has to end first, whatever its outcome.

    Returns:
        stage -> job id.

    Raises:
        InputError: SLURM refused one; with its message.
    """
    jobs: dict[str, str] = {}
    wait_for = f"afterany:{after}" if after else None
    for stage in stages:
        job = make_job(launch, stage)
        try:
            jobs[stage.name] = executor(launch, stage, code, wait_for).submit(job).job_id
        except FailedJobError as error:
            scheduler.cancel(list(jobs.values()))
            raise refused(stage, error) from error
        wait_for = f"afterok:{jobs[stage.name]}"
    return jobs


def refused(stage: Stage, error: Exception) -> InputError:
    """SLURM's message as an :class:`InputError`."""
    return InputError(
        f"SLURM refuses the job of stage {stage.name}: {scheduler.error_text(str(error))}"
    )
