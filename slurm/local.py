"""Stages as local processes: submitit's local executor, with SLURM's behavior.

As with srun's ``--kill-on-bad-exit``, a rank that dies ends the others; as with sbatch's
``--signal``, ranks are signaled before the time limit. The log and a live progress bar are shown
while a stage runs.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

from submitit.core.utils import JobPaths, environment_variables
from submitit.local import local
from submitit.local.debug import DebugExecutor

from xcit_dino.errors import InputError
from xcit_dino.progress import STATE_FILE
from xcit_dino.slurm import attempts, launched, watch
from xcit_dino.slurm.config import RESUMES, Launch, Stage
from xcit_dino.slurm.job import SIGNALS, make_job
from xcit_dino.slurm.tools.dry_run import counted

GRACE = 10.0  # seconds for the other ranks to report their errors, once one has failed
FOREVER = 10**7  # minutes
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # by the launcher, to the ranks
OUTER_JOB = (
    "SLURM",
    "SUBMITIT_",
    "SRUN_",
    "SBATCH_",
    "PMI_",
    "PMIX_",
    "TORCHELASTIC_",
    "TORCHRUN_",
)
TORCHRUN = frozenset(
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_NAME ROLE_RANK "
    "ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
)


class Controller(local.Controller):
    """Starts the ranks of one attempt and waits for them; runs in its own process."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.folder = JobPaths(folder, self.pid).folder
        for number in (signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
            signal.signal(number, self._forward_signal)  # type: ignore[arg-type]

    def run(self, max_retry: int = 0) -> None:
        """Run one attempt; the exit code is 0 if all ranks exited cleanly."""
        try:
            self.start_tasks()
            codes = self.wait()
        finally:
            self.kill_tasks()
        sys.exit(next((abs(code) for code in codes if code), 0))

    def wait(self, freq: int = 10) -> list[int]:
        """Wait for all ranks; if one fails, the others are ended after ``GRACE`` seconds."""
        parent, began = os.getppid(), time.monotonic()
        warn, ends = self.timeout_s - self.signal_delay_s, float(self.timeout_s)
        failed = False
        while True:
            codes = [task.poll() for task in self.tasks]
            passed = time.monotonic() - began
            if any(codes) and not failed:
                failed, ends = True, min(ends, passed + GRACE)
                self.report_first_failure(codes)
            if None not in codes or passed > ends:
                return [signal.SIGKILL if code is None else code for code in codes]
            if passed > warn:
                warn = float("inf")
                self._forward_signal(signal.SIGUSR2)
            if os.getppid() != parent:  # the launcher died: save and exit
                parent = os.getppid()
                self._forward_signal(signal.SIGHUP)
            time.sleep(1 / freq)

    def report_first_failure(self, codes: list[int | None]) -> None:
        """Log which rank failed first, in srun's format."""
        rank, code = next((rank, code) for rank, code in enumerate(codes) if code)
        how = signal.strsignal(-code) if code < 0 else f"Exited with exit code {code}"
        line = f"local: error: {socket.gethostname()}: task {rank}: {how}\n"
        self.stderrs[0].write(line)
        self.stderrs[0].flush()


class Executor(local.LocalExecutor):
    """submitit's local executor, with the controller above."""

    def _submit_command(self, command: str) -> local.LocalJob[Any]:
        requested = self.parameters
        environment = os.environ | {
            "SUBMITIT_LOCAL_NTASKS": str(requested["tasks_per_node"]),
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * requested["timeout_min"]),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(requested["signal_delay_s"]),
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_STDERR_TO_STDOUT": "",
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "CUDA_VISIBLE_DEVICES": ",".join(visible_gpus()[: requested["gpus_per_node"]]),
        }
        argv = [sys.executable, "-m", "xcit_dino.slurm.local", str(self.folder)]
        if requested["setup"]:
            argv = [
                "bash",
                "-c",
                "\n".join(["set -e", *requested["setup"], 'exec "$@"']),
                "bash",
                *argv,
            ]
        # in its own session: Ctrl-C reaches only the launcher, which forwards it once
        process = subprocess.Popen(argv, env=environment, start_new_session=True)
        tasks = list(range(requested["tasks_per_node"]))
        return local.LocalJob(self.folder, str(process.pid), tasks, process)


def visible_gpus() -> list[str]:
    """This machine's GPUs as in CUDA_VISIBLE_DEVICES, found without torch."""
    if (seen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in seen.split(",") if name]
    nodes = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number, _ in enumerate(nodes.iterdir())] if nodes.is_dir() else []


def executor(launch: Launch, stage: Stage) -> Executor:
    """The executor that starts one attempt of a stage."""
    made = Executor(folder=attempts.job_folder(launch.run, "%j"), max_num_timeout=0)
    made.update_parameters(
        nodes=stage.resources.nodes,
        tasks_per_node=stage.tasks_per_node,
        gpus_per_node=stage.resources.ngpus or 0,
        timeout_min=stage.resources.timeout or FOREVER,
        signal_delay_s=launch.launch.signal_delay,
        setup=launch.launch.setup,
    )
    return made


def run_stages(launch: Launch, stages: list[Stage], code: Path, inside: bool) -> int:
    """Run stages in sequence, in this process if ``inside``; returns the exit code, which is 128 +
    the signal's number if one ended the launcher."""
    received: list[signal.Signals] = []
    for number, stage in enumerate(stages):
        processes = counted(stage.num_tasks, "process")
        print(f"{stage.name}: {processes}, run folder {launch.run}{resume_note(launch, stage)}")
        sys.stdout.flush()
        with without_outer_job():
            ended = (
                run_inside(launch, stage) if inside else run_stage(launch, stage, code, received)
            )
        if ended.state != "done":
            return report_end(launch, ended)
        if received and (behind := stages[number + 1 :]):
            names = ", ".join(stage.name for stage in behind)
            print(
                f"{received[0].name}: not started: {names}; the same command resumes",
                file=sys.stderr,
            )
            return 128 + received[0]
    return 0


@contextmanager
def without_outer_job() -> Iterator[None]:
    """Remove the variables of an enclosing allocation, ``srun`` or torchrun from the environment:
    its ranks, restarts and cores are not those of the local processes."""
    outer = {k: v for k, v in os.environ.items() if k in TORCHRUN or k.startswith(OUTER_JOB)}
    outer.pop("SUBMITIT_LOG_LEVEL", None)
    if outer:
        names = ", ".join(sorted(outer))
        print(f"environment of the enclosing job ignored: {names}", file=sys.stderr)
    for name in outer:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(outer)


def resume_note(launch: Launch, stage: Stage) -> str:
    """``", resumes from checkpoint-00000120.pth"`` if a training stage has a checkpoint."""
    record = launched.read_launch(launch.run)
    newest = attempts.newest_checkpoint(launch.run, stage.name, record)
    return f", resumes from {newest}" if newest and stage.name in RESUMES else ""


def report_end(launch: Launch, ended: attempts.Record) -> int:
    """Print why the chain ends here; returns the exit code."""
    if ended.state == "failed":
        log = watch.log_path(launch.run, ended.job_id, 0, "err")
        print(f"xcit-dino: {ended.stage}: {ended.reason}  (log: {log})", file=sys.stderr)
        return 2 if ended.bad_input else 1
    print(f"xcit-dino: {ended.stage} {ended.state}: {ended.reason}", file=sys.stderr)
    by_signal = (128 + n for n in FORWARDED if ended.reason.startswith(n.name))
    return next(by_signal, 1) if ended.state == "stopped" else 1


def run_inside(launch: Launch, stage: Stage) -> attempts.Record:
    """Run one stage in this process, for a debugger: no log file, restart or copy of the code."""
    attempt = attempts.begin(launch.run, stage.name, "debug", 0, socket.gethostname())
    job = make_job(launch, stage)
    executor = DebugExecutor(attempts.job_folder(launch.run, "debug"))
    started = executor.submit(job)
    attempt.job_id = started.job_id
    attempts.save(launch.run, attempt)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    exit_code = 0
    try:
        started.results()
    except SystemExit as stop:
        exit_code = int(stop.code or 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return attempts.finish(launch.run, stage.name, exit_code)


def run_stage(
    launch: Launch, stage: Stage, code: Path, received: list[signal.Signals]
) -> attempts.Record:
    """Run one stage to its end, restarting it after a failure or a time limit, as SLURM would.

    Args:
        received: collects the signals sent to the launcher; after one, nothing is restarted.
    """
    progress = attempts.progress_file(launch.run, stage.name)
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")])),
        "PYTHONSAFEPATH": "1",
        "SUBMITIT_LOG_LEVEL": "WARNING",
        STATE_FILE: str(progress),
    }
    if cores := stage.resources.cpus_per_task:
        environment["OMP_NUM_THREADS"] = str(cores)
    while True:
        try:
            attempt = attempts.begin(launch.run, stage.name, "", 0, socket.gethostname())
        except InputError:  # cancelled in between
            return attempts.load(launch.run, stage.name)
        with environment_variables(**environment):
            started = executor(launch, stage).submit(make_job(launch, stage))
        attempt.job_id = started.job_id
        attempts.save(launch.run, attempt)
        process = cast(local.LocalJob[None], started)._process
        assert process is not None
        with forwarding_signals(process, received):
            watch.show(launch.run, stage.name, started.job_id, partial(is_running, process))
        ended = attempts.finish(launch.run, stage.name, process.wait())
        if received and ended.state == "requeued":
            if not ended.reason.startswith(received[0].name):
                ended.reason = f"{received[0].name}; {ended.reason}"
            ended.state = "stopped"
            attempts.save(launch.run, ended)
        if ended.state != "requeued":
            return ended
        print(
            f"{stage.name}: restarting after {ended.reason}{resume_note(launch, stage)}",
            file=sys.stderr,
        )


def is_running(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process is still running."""
    return process.poll() is None


@contextmanager
def forwarding_signals(
    process: subprocess.Popen[bytes], received: list[signal.Signals]
) -> Iterator[None]:
    """Forward Ctrl-C and the like to the ranks, which save a checkpoint and exit."""

    def handler(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        if number == signal.SIGINT:
            print("\nsaving and exiting; Ctrl-C again exits at once", file=sys.stderr)
        process.send_signal(number)

    before = {number: signal.signal(number, handler) for number in FORWARDED}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


if __name__ == "__main__":
    Controller(Path(sys.argv[1])).run()
