"""The job: one stage, one process of it; the same code on SLURM, locally and in the debugger.

``StageJob`` is what submitit pickles and each rank calls. Around the ranks, a job's script on the
first node runs ``python -m xcit_dino.slurm.job begin|finish``: there, and nowhere else, it is
decided whether the job starts and whether it is put back into the queue. So the decision is taken
once, and also when rank 0 was the one that died.

Signals: SLURM sends SIGUSR2 (ours, before the time limit) or SIGTERM (preemption) to every rank;
each only notes it, and the training loop stops all ranks after the same step. NCCL is known to
catch SIGUSR1.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from pkgutil import resolve_name
from types import FrameType
from typing import Any

import submitit

from xcit_dino.errors import InputError, RunError, Stopped
from xcit_dino.options import options, replace
from xcit_dino.slurm import attempts, env, scheduler
from xcit_dino.slurm.config import RESUMES, Launch, Stage
from xcit_dino.train import signals

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCONT)


class Interrupted(BaseException):
    """A signal ended a stage that has nothing to save; no ``except Exception`` holds it up."""


@dataclass(frozen=True)
class StageJob:
    """One stage of a run; calling it does the work of this rank."""

    stage: str
    entry: str
    """``module:function`` that takes the config."""
    config: Any
    run: Path
    num_tasks: int
    """Processes that the config was made for."""

    def __call__(self) -> None:
        here = Rank(self, submitit.JobEnvironment())
        here.listen()
        try:
            store = here.join()  # kept until the end: it is the group's meeting point
            resolve_name(self.entry)(here.fitted(self.config))
            leave_group()
            del store
            if here.place.global_rank == 0:
                here.say(done=True)
        except (InputError, RunError) as error:  # would come again: no restart helps
            code = 2 if isinstance(error, InputError) else 1
            here.say(error=str(error), code=code, final=True)
            print(f"xcit-dino: {error}", file=sys.stderr, flush=True)
            sys.exit(code)
        except (Stopped, Interrupted) as reason:
            here.say(stopped=str(reason))
            print(f"stopped: {reason}", file=sys.stderr, flush=True)
            leave_group()
        except Exception as error:
            words = f"{type(error).__name__}: {first_line(error)}"
            here.say(error=words, where=place_of(error), code=1)
            raise


def job_of(launch: Launch, stage: Stage) -> StageJob:
    """The job of a resolved stage."""
    return StageJob(stage.name, stage.entry, stage.config, launch.run, stage.num_tasks)


class Rank:
    """This process of the job: its place, what it hears, what it leaves in the run folder."""

    def __init__(self, job: StageJob, place: submitit.JobEnvironment):
        self.job, self.place = job, place
        self.restart = restart_count()
        self.heard: list[str] = []

    def say(self, **word: Any) -> None:
        """Leave a word for whoever judges this attempt."""
        attempts.leave_word(
            self.job.run, self.place.job_id, self.restart, self.place.global_rank, **word
        )

    def join(self) -> Any:
        """Meet the other ranks."""
        here = self.place
        key = f"{self.job.run} {here.job_id} {self.restart} {os.environ.get('SLURM_STEP_ID', '')}"
        hosts = [here.hostnames[0], os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")]
        set_threads(here.num_tasks // here.num_nodes)
        store = env.join(key, here.global_rank, here.num_tasks, own_gpu(here.local_rank), hosts)
        if store is not None:
            self.say(port=store.port)
        return store

    def fitted(self, config: Any) -> Any:
        """The config for the processes there are now, with the global batch that was asked for."""
        now, asked = self.place.num_tasks, self.job.num_tasks
        if now == asked or self.job.stage not in RESUMES:
            return config
        values = dict(options(config))
        total = values["batch_size_per_gpu"] * values["accum_iter"] * asked
        micro_batches = Fraction(values["accum_iter"] * asked, now)
        size = Fraction(values["batch_size_per_gpu"], micro_batches.denominator)
        if size.denominator > 1:
            raise InputError(
                f"--nodes: a global batch of {total} does not divide among "
                f"{now} processes; take a number of nodes that divides it"
            )
        fit = {"accum_iter": micro_batches.numerator, "batch_size_per_gpu": int(size)}
        return replace(config, fit)

    def listen(self) -> None:
        """Take the signals over from submitit, before anything slow is imported."""
        for number in SIGNALS:
            signal.signal(number, self.hear)

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Note a signal. A second Ctrl-C leaves at once; other repeats do nothing."""
        name = signal.Signals(number).name
        if number == signal.SIGCONT:  # comes with SIGTERM and means nothing
            return
        if name in self.heard:
            if number == signal.SIGINT:
                os._exit(130)
            return
        self.heard.append(name)
        if len(self.heard) == 1:
            self.say(heard=name)
        if self.job.stage not in RESUMES:
            raise Interrupted(name)
        signals.request(name)


def leave_group() -> None:
    """Leave torch's process group. After a failure nobody does: it might wait for the dead."""
    if "torch" in sys.modules:
        from xcit_dino.train.distributed import dist

        dist.shutdown()


def restart_count() -> int:
    """How often SLURM has restarted this job; a local attempt is a job of its own."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def set_threads(tasks: int) -> None:
    """Share the node's cores among its processes; torch would give all of them to each."""
    cores = int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or len(os.sched_getaffinity(0)) // tasks
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))


def own_gpu(local_rank: int) -> int:
    """This process's GPU among those it sees; some clusters show each process only its own."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return 0 if seen and "," not in seen else local_rank


def first_line(error: BaseException) -> str:
    """The beginning of an error's text, on one line."""
    return " ".join(str(error).split())[:300]


def place_of(error: BaseException) -> str:
    """An error's kind and the lines of code that led to it, ``KeyError loop.py:12 step.py:34``: the
    same each time where the code is at fault, unlike the text."""
    frames = traceback.extract_tb(error.__traceback__)
    places = (f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    return " ".join([type(error).__name__, *places])


# -- around the ranks, in the job's script ---------------------------------------------------------


def begin(run: Path, stage: str) -> int:
    """Start an attempt: count it, and see that every node finds what it needs.

    Returns:
        0, or the job's exit code where SLURM could not start a process on each node.

    Raises:
        InputError: the run was cancelled or failed too often; a node lacks a folder.
    """
    job_id, nodes = os.environ["SLURM_JOB_ID"], int(os.environ["SLURM_JOB_NUM_NODES"])
    attempt = attempts.begin(run, stage, job_id, restart_count(), os.environ["SLURM_JOB_NODELIST"])
    print(attempts.marker(attempt), file=sys.stderr, flush=True)
    needed = [*attempts.read_launch(run)["needs"], str(attempts.folder(run) / f"{stage}.json")]
    try:
        lacking = scheduler.lacking([sys.executable, *needed], nodes)
    except scheduler.SlurmError as error:
        attempts.leave_word(run, job_id, restart_count(), attempts.SCRIPT, error=str(error), code=1)
        return finish(run, stage, 1)
    if lacking:
        words = {"error": lacking, "code": 2, "final": True}
        attempts.leave_word(run, job_id, restart_count(), attempts.SCRIPT, **words)
        attempts.finish(run, stage, 2)
        raise InputError(lacking)
    return 0


def finish(run: Path, stage: str, code: int) -> int:
    """End an attempt: note how, and put the job back into the queue where it has to run again.

    Returns:
        The job's exit code: 0 only when the stage is done, so that ``afterok`` means that.
    """
    ended = attempts.finish(run, stage, code)
    if ended.state == "requeued" and not scheduler.requeue(ended.job_id, ended.restart):
        ended.state, ended.reason = "cancelled", "by scancel"
        attempts.save(run, ended)
    why = f" ({ended.reason})" if ended.reason else ""
    print(f"{stage}: {ended.state}{why}", file=sys.stderr, flush=True)
    return {"done": 0, "failed": code or 1}.get(ended.state, attempts.RESUMABLE)


def main(argv: list[str]) -> int:
    """``begin RUN STAGE`` or ``finish RUN STAGE CODE``."""
    action, run, stage = argv[0], Path(argv[1]), argv[2]
    try:
        return begin(run, stage) if action == "begin" else finish(run, stage, int(argv[3]))
    except InputError as error:
        print(f"xcit-dino: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
