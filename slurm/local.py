"""Stages as processes of this machine: submitit's local executor, with SLURM's habits.

Like srun's ``--kill-on-bad-exit``, a rank that dies ends the others; like sbatch's ``--signal``,
ranks are told before the time limit. While a run goes on, its log and a live bar are shown here.
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

from xcit_dino.progress import STATE_FILE
from xcit_dino.slurm import record, watch
from xcit_dino.slurm.config import Launch, Stage
from xcit_dino.slurm.job import SIGNALS, job_of
from xcit_dino.slurm.preview import counted

GRACE = 10.0  # seconds for the other ranks to say why they fail, once one has failed
FOREVER = 10**7  # minutes


class Controller(local.Controller):
    """Starts the ranks of one attempt and waits for them; runs in a process of its own."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.folder = JobPaths(folder, self.pid).folder
        for number in (signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
            signal.signal(number, self._forward_signal)  # type: ignore[arg-type]

    def run(self, max_retry: int = 0) -> None:
        """Run one attempt; the exit code is 0 when all ranks left in good order."""
        try:
            self.start_tasks()
            codes = self.wait()
        finally:
            self.kill_tasks()
        sys.exit(next((abs(code) for code in codes if code), 0))

    def wait(self, freq: int = 10) -> list[int]:
        """Wait for all ranks; one that fails takes the others along after a while."""
        parent, began = os.getppid(), time.monotonic()
        warn, ends = self.timeout_s - self.signal_delay_s, float(self.timeout_s)
        failed = False
        while True:
            codes = [task.poll() for task in self.tasks]
            passed = time.monotonic() - began
            if any(codes) and not failed:
                failed, ends = True, min(ends, passed + GRACE)
                self.name_failed(codes)
            if None not in codes or passed > ends:
                return [signal.SIGKILL if code is None else code for code in codes]
            if passed > warn:
                warn = float("inf")
                self._forward_signal(signal.SIGUSR2)
            if os.getppid() != parent:  # the launcher died: save and leave
                parent = os.getppid()
                self._forward_signal(signal.SIGHUP)
            time.sleep(1 / freq)

    def name_failed(self, codes: list[int | None]) -> None:
        """Say which rank failed first, in srun's words."""
        rank, code = next((rank, code) for rank, code in enumerate(codes) if code)
        how = signal.strsignal(-code) if code < 0 else f"Exited with exit code {code}"
        line = f"local: error: {socket.gethostname()}: task {rank}: {how}\n"
        self.stderrs[0].write(line)
        self.stderrs[0].flush()


class Executor(local.LocalExecutor):
    """submitit's, with the controller above."""

    def _submit_command(self, command: str) -> local.LocalJob[Any]:
        asked = self.parameters
        environment = os.environ | {
            "SUBMITIT_LOCAL_NTASKS": str(asked["tasks_per_node"]),
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * asked["timeout_min"]),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(asked["signal_delay_s"]),
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_STDERR_TO_STDOUT": "",
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "CUDA_VISIBLE_DEVICES": ",".join(visible_gpus()[: asked["gpus_per_node"]]),
        }
        words = [sys.executable, "-m", "xcit_dino.slurm.local", str(self.folder)]
        if asked["setup"]:
            words = [
                "bash",
                "-c",
                "\n".join(["set -e", *asked["setup"], 'exec "$@"']),
                "bash",
                *words,
            ]
        # a session of its own: Ctrl-C reaches the launcher alone, which passes it on once
        process = subprocess.Popen(words, env=environment, start_new_session=True)
        tasks = list(range(asked["tasks_per_node"]))
        return local.LocalJob(self.folder, str(process.pid), tasks, process)


def visible_gpus() -> list[str]:
    """Names of this machine's GPUs as CUDA_VISIBLE_DEVICES takes them; asked without torch."""
    if (seen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in seen.split(",") if name]
    nodes = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number, _ in enumerate(nodes.iterdir())] if nodes.is_dir() else []


def executor(launch: Launch, stage: Stage) -> Executor:
    """The executor that starts one attempt of a stage."""
    made = Executor(folder=record.job_folder(launch.run, "%j"), max_num_timeout=0)
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
    """Run stages one after the other, in this process where ``inside``; returns the exit code."""
    for stage in stages:
        print(
            f"{stage.name}: {counted(stage.num_tasks, 'process')}, run folder {launch.run}",
            flush=True,
        )
        ended = (run_inside if inside else run_stage)(launch, stage, code)
        if ended.state != "done":
            return told(launch, ended)
    return 0


def told(launch: Launch, ended: record.Record) -> int:
    """Say why the chain ends here; returns the exit code."""
    if ended.state == "failed":
        log = watch.log_path(launch.run, ended.job_id, 0, "err")
        print(f"xcit-dino: {ended.stage}: {ended.reason}  (log: {log})", file=sys.stderr)
        return 2 if ended.bad_input else 1
    print(f"xcit-dino: {ended.stage} {ended.state}: {ended.reason}", file=sys.stderr)
    return 130 if ended.reason.startswith(signal.SIGINT.name) else 1


def run_inside(launch: Launch, stage: Stage, code: Path) -> record.Record:
    """Run one stage in this process, for a debugger: no log, no restart, no copy of the code."""
    attempt = record.begin(launch.run, stage.name, "debug", 0, socket.gethostname())
    job = job_of(launch, stage)
    executor = DebugExecutor(record.job_folder(launch.run, "debug"))
    started = executor.submit(job)
    attempt.job_id = started.job_id
    record.save(launch.run, attempt)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    exit_code = 0
    try:
        started.results()
    except SystemExit as stop:
        exit_code = int(stop.code or 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return record.finish(launch.run, stage.name, exit_code)


def run_stage(launch: Launch, stage: Stage, code: Path) -> record.Record:
    """Run one stage to its end, again after a failure or a time limit, as SLURM would."""
    progress = record.progress_file(launch.run, stage.name)
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")])),
        "PYTHONSAFEPATH": "1",
        "SUBMITIT_LOG_LEVEL": "WARNING",
        STATE_FILE: str(progress),
    }
    while True:
        attempt = record.begin(launch.run, stage.name, "", 0, socket.gethostname())
        with environment_variables(**environment):
            started = executor(launch, stage).submit(job_of(launch, stage))
        attempt.job_id = started.job_id
        record.save(launch.run, attempt)
        process = cast(local.LocalJob[None], started)._process
        assert process is not None
        with passing_on_signals(process):
            watch.show(launch.run, stage.name, started.job_id, partial(runs, process))
        ended = record.finish(launch.run, stage.name, process.wait())
        if ended.state != "requeued":
            return ended
        print(f"{stage.name}: starting again after {ended.reason}", file=sys.stderr)


def runs(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has not ended."""
    return process.poll() is None


@contextmanager
def passing_on_signals(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ctrl-C and the like go to the ranks, which save themselves; the launcher waits for them."""

    def handler(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            print("\nsaving and leaving; Ctrl-C again leaves at once", file=sys.stderr)
        process.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


if __name__ == "__main__":
    Controller(Path(sys.argv[1])).run()
