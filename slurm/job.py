"""One rank of a stage's job; the same code on SLURM, locally and in the debugger.

submitit pickles a ``StageJob``, and each rank calls it. Before and after the ranks, the job's
script on the first node runs ``python -m xcit_dino.slurm.job begin|finish``, which alone decides
whether the job starts and whether it is requeued. The decision is therefore made exactly once, even
if rank 0 died.

Signals: SLURM sends SIGUSR2 (as we request, before the time limit) or SIGTERM (preemption) to every
rank. The handler only records it; the training loop stops all ranks after the same step. NCCL is
known to catch SIGUSR1.
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

from xcit_dino.cores import usable_cores
from xcit_dino.errors import InputError, RunError, Stopped, one_line
from xcit_dino.options import options, replace
from xcit_dino.slurm import attempts, env, launched, scheduler
from xcit_dino.slurm.config import RESUMES, Launch, Stage
from xcit_dino.train import signals

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCONT)


class Interrupted(BaseException):
    """A signal ended a stage that has nothing to save; not caught by ``except Exception``."""


@dataclass(frozen=True)
class StageJob:
    """One stage of a run; calling it runs this rank's part."""

    stage: str
    entry: str
    """``module:function``, called with the config."""
    config: Any
    run: Path
    num_tasks: int
    """World size for which the config was made."""

    def __call__(self) -> None:
        here = Rank(self, submitit.JobEnvironment())
        here.install_handlers()
        try:
            store = here.join()  # kept alive until the end: the process group's store
            resolve_name(self.entry)(here.adapt_config(self.config))
            leave_group()
            del store
            if here.place.global_rank == 0:
                here.report(done=True)
        except (InputError, RunError) as error:  # would happen again: no restart helps
            code = 2 if isinstance(error, InputError) else 1
            here.report(error=str(error), code=code, final=True)
            print(f"xcit-dino: {error}", file=sys.stderr, flush=True)
            sys.exit(code)
        except (Stopped, Interrupted) as reason:
            here.report(stopped=str(reason))
            print(f"stopped: {reason}", file=sys.stderr, flush=True)
            leave_group()
        except Exception as error:
            summary = f"{type(error).__name__}: {one_line(error, 300)}"
            here.report(error=summary, where=traceback_location(error), code=1)
            raise


def make_job(launch: Launch, stage: Stage) -> StageJob:
    """The job of a resolved stage."""
    return StageJob(stage.name, stage.entry, stage.config, launch.run, stage.num_tasks)


class Rank:
    """This process of the job: its rank, the signals it receives, its status in the run folder."""

    def __init__(self, job: StageJob, place: submitit.JobEnvironment):
        self.job, self.place = job, place
        self.restart = restart_count()
        self.received: list[str] = []

    def report(self, **status: Any) -> None:
        """Write this rank's status, from which the attempt's outcome is decided."""
        attempts.write_status(
            self.job.run, self.place.job_id, self.restart, self.place.global_rank, **status
        )

    def join(self) -> Any:
        """Rendezvous with the other ranks."""
        here = self.place
        key = f"{self.job.run} {here.job_id} {self.restart} {os.environ.get('SLURM_STEP_ID', '')}"
        hosts = [here.hostnames[0], os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")]
        set_threads(here.num_tasks // here.num_nodes)
        store = env.join(key, here.global_rank, here.num_tasks, own_gpu(here.local_rank), hosts)
        if store is not None:
            self.report(port=store.port)
        return store

    def adapt_config(self, config: Any) -> Any:
        """The config for the current world size, with the global batch size unchanged."""
        now, planned = self.place.num_tasks, self.job.num_tasks
        if now == planned or self.job.stage not in RESUMES:
            return config
        values = dict(options(config))
        total = values["batch_size_per_gpu"] * values["accum_iter"] * planned
        micro_batches = Fraction(values["accum_iter"] * planned, now)
        size = Fraction(values["batch_size_per_gpu"], micro_batches.denominator)
        if size.denominator > 1:
            raise InputError(
                f"--nodes: a global batch of {total} does not divide among "
                f"{now} processes; take a number of nodes that divides it"
            )
        fit = {"accum_iter": micro_batches.numerator, "batch_size_per_gpu": int(size)}
        return replace(config, fit)

    def install_handlers(self) -> None:
        """Replace submitit's signal handlers, before anything slow is imported."""
        for number in SIGNALS:
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Record a signal. A second Ctrl-C exits at once; other repeats are ignored."""
        name = signal.Signals(number).name
        if number == signal.SIGCONT:  # sent along with SIGTERM
            return
        if name in self.received:
            if number == signal.SIGINT:
                os._exit(130)
            return
        self.received.append(name)
        if len(self.received) == 1:
            self.report(heard=name)
        if self.job.stage not in RESUMES:
            raise Interrupted(name)
        signals.request(name)


def leave_group() -> None:
    """Leave torch's process group. Not called after a failure: it might wait for dead ranks."""
    if "torch" in sys.modules:
        from xcit_dino.train.distributed import dist

        dist.shutdown()


def restart_count() -> int:
    """How often SLURM has restarted this job; locally each attempt is a new job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def set_threads(tasks: int) -> None:
    """Divide the node's cores among its processes; torch would use all of them in each."""
    cores = int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or usable_cores() // tasks
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))


def own_gpu(local_rank: int) -> int:
    """Index of this process's GPU; some clusters make only one GPU visible to each process."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return 0 if seen and "," not in seen else local_rank


def traceback_location(error: BaseException) -> str:
    """An error's type and the lines of its traceback, ``KeyError loop.py:12 step.py:34``: unlike
    the message, the same each time if the code is at fault."""
    frames = traceback.extract_tb(error.__traceback__)
    places = (f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    return " ".join([type(error).__name__, *places])


# -- around the ranks, in the job's script ---------------------------------------------------------


def begin(run: Path, stage: str) -> int:
    """Start an attempt: count it, and check that every node can read the files it needs.

    Returns:
        0, or the job's exit code if SLURM could not start a process on each node.

    Raises:
        InputError: the run was cancelled or failed too often, or a node cannot read a folder.
    """
    job_id, nodes = os.environ["SLURM_JOB_ID"], int(os.environ["SLURM_JOB_NUM_NODES"])
    attempt = attempts.begin(run, stage, job_id, restart_count(), os.environ["SLURM_JOB_NODELIST"])
    print(attempts.marker(attempt), file=sys.stderr, flush=True)
    needed = [*launched.read_launch(run)["needs"], str(launched.folder(run) / f"{stage}.json")]
    try:
        lacking = scheduler.unreadable([sys.executable, *needed], nodes)
    except scheduler.SlurmError as error:
        attempts.write_status(
            run, job_id, restart_count(), attempts.SCRIPT, error=str(error), code=1
        )
        return finish(run, stage, 1)
    if lacking:
        status = {"error": lacking, "code": 2, "final": True}
        attempts.write_status(run, job_id, restart_count(), attempts.SCRIPT, **status)
        attempts.finish(run, stage, 2)
        raise InputError(lacking)
    return 0


def finish(run: Path, stage: str, code: int) -> int:
    """End an attempt: record its outcome, and requeue the job if it has to run again.

    Returns:
        The job's exit code: 0 only if the stage is done, so that ``afterok`` means just that.
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
