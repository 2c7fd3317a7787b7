"""One run on the cluster of a test: launching, holding, interrupting, waiting for it.

Nothing here has a deadline by the clock: a wait gives up when nothing at all has happened for some
minutes, so that a busy machine makes a test slow and not red.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.slurm_cluster import Cluster, stat
from xcit_dino.slurm import attempts, launched
from xcit_dino.slurm.watch import read_state

STUCK = 240  # seconds without a sign of life
RECIPE = """
arch: xcit_pico_6_p4
drop_path_rate: 0.05
epochs: 2
batch_size_per_gpu: 4
lr: 0.002
warmup_epochs: 1
out_dim: 64
head_hidden_dim: 32
head_bottleneck_dim: 16
global_crops_size: 16
local_crops_number: 2
local_crops_size: 8
num_workers: 1
log_every: 1
precision: fp32
knn_every: 0
"""
IMAGES, STEPS = 128, 32  # of the recipe on two processes


class Run:
    """A run of the tiny recipe in the folder ``name`` of ``place``."""

    def __init__(self, slurm: Cluster, place: Path, name: str):
        self.slurm, self.place, self.folder = slurm, place, place / name

    # -- commands ----------------------------------------------------------------------------------

    def start(self, *words: str) -> subprocess.Popen[str]:
        """``xcit-dino launch ...`` on this cluster."""
        environment = os.environ | self.slurm.environment
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(
            [sys.executable, "-m", "xcit_dino.cli", "launch", *words],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The same, to its end."""
        process = self.start(*words)
        out, err = process.communicate()
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def launch(
        self, *words: str, nodes: int = 2, nproc: int = 1
    ) -> subprocess.CompletedProcess[str]:
        """Launch this run; the command's result."""
        options = {
            "config": self.place / "tiny.yaml", "data_path": self.place / "shards",
            "output_dir": self.folder, "cluster": "slurm", "nodes": nodes, "nproc": nproc,
            "ngpus": 0, "cpus_per_task": 1,
        }  # fmt: skip
        flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return self.command(*flags, *words)

    def submit(self, *words: str, nodes: int = 2, nproc: int = 1) -> str:
        """Launch; the job id of the first stage."""
        done = self.launch(*words, nodes=nodes, nproc=nproc)
        assert done.returncode == 0, done.stderr
        return next(iter(launched.read_launch(self.folder)["stages"].values()))["job_id"]

    # -- waiting -----------------------------------------------------------------------------------

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Poll until a condition holds; fails when the run no longer responds."""
        signs, since, looked = "", time.monotonic(), 0.0
        while not condition():
            now = time.monotonic()
            if now - looked > 2:
                looked, before, signs = now, signs, self.signs()
                since = now if signs != before else since
            assert now - since < STUCK, self.explain()
            time.sleep(0.01)

    def signs(self) -> str:
        """What changes as long as anything goes on: the queue, files, processor seconds of jobs."""
        files = sorted((str(p), p.stat().st_size) for p in self.folder.glob("launch/**/*.*"))
        queue = self.slurm.run("squeue", "--noheader", "--format=%i %T %r")
        return f"{queue} {files} {[int(used) for used in self.slurm.processes().values()]}"

    def wait_for_end(self, stage: str = "pretrain") -> attempts.Record:
        """The record of a stage that is over."""
        self.wait_until(lambda: attempts.load(self.folder, stage).finished)
        return attempts.load(self.folder, stage)

    def started_again(self, job: str, attempt: int) -> attempts.Record:
        """Wait until the job runs for the n-th time."""

        def begun() -> bool:
            known = attempts.load(self.folder, "pretrain")
            assert not known.finished, self.explain()
            self.slurm.hurry()
            return known.attempts >= attempt

        self.wait_until(begun)
        return attempts.load(self.folder, "pretrain")

    def wait_for_command(self, process: subprocess.Popen[str]) -> None:
        """Wait for a command that follows its jobs."""

        def ended() -> bool:
            self.slurm.hurry()
            return process.poll() is not None

        self.wait_until(ended)

    def explain(self) -> str:
        """Records, logs and SLURM's view, for a test that fails."""
        paths = [*self.folder.glob("launch/*.json"), *self.folder.glob("launch/jobs/*/*log*")]
        texts = [f"== {path.name}\n{path.read_text()[-1500:]}" for path in paths]
        jobs = self.slurm.run("scontrol", "show", "job", "--oneliner", check=False)
        return "\n".join([*texts, self.slurm.log(), jobs])

    # -- interrupting ------------------------------------------------------------------------------

    def hold(self, job: str) -> int:
        """Wait until this attempt has done a step, then hold rank 1 (and with it all) by SIGSTOP.

        SLURM's signals come with a SIGCONT, which lets go.

        Returns:
            The process id of rank 1.
        """

        def stepped() -> bool:
            state = read_state(attempts.progress_file(self.folder, "pretrain"))
            return state is not None and state["done"] > state["start"]

        self.wait_until(stepped)
        pid = self.slurm.rank_pid(job, 1)
        os.kill(pid, signal.SIGSTOP)
        return pid

    def run_out_of_time(self, job: str, pid: int) -> None:
        """Bring the time limit so near that SLURM tells a held job now; let it save itself; give
        the next attempt its time again.

        Less than ``--signal_delay 120`` remain, and SLURM looks every half minute.
        """
        began = time.mktime(time.strptime(self.slurm.facts(job)["StartTime"], "%Y-%m-%dT%H:%M:%S"))
        minutes = int((time.time() - began) / 60) + 2
        self.slurm.run("scontrol", "update", f"jobid={job}", f"TimeLimit={minutes}")
        self.wait_until(lambda: stat(pid)[0] != "T" or pending(pid, signal.SIGUSR2))
        os.kill(pid, signal.SIGCONT)
        self.wait_until(lambda: self.slurm.facts(job)["JobState"] == "PENDING")
        self.slurm.run("scontrol", "update", f"jobid={job}", "TimeLimit=60")

    # -- what came of it ---------------------------------------------------------------------------

    def losses(self) -> dict[int, float]:
        """``step -> loss`` of the metrics; a step that is there twice fails."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        pairs = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        assert len(dict(pairs)) == len(pairs), pairs
        return dict(pairs)

    def tries(self) -> list[int]:
        """Steps done when each attempt began to train."""
        lines = map(json.loads, (self.folder / "tries.jsonl").read_text().splitlines())
        return [line["step"] for line in lines if line["event"] == "start"]

    def weights(self) -> dict[str, torch.Tensor]:
        """Everything in the last checkpoint: student, teacher, center, optimizer."""
        newest = sorted((self.folder / "checkpoints").glob("*.pth"))[-1]
        return tensors(torch.load(newest, weights_only=True))


def pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal waits for a stopped process."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
    return bool(int(fields["ShdPnd"], 16) >> (number - 1) & 1)


def tensors(tree: object, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested dict, by path."""
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    found: dict[str, torch.Tensor] = {}
    if isinstance(tree, dict):
        for key, value in tree.items():
            found |= tensors(value, f"{path}/{key}")
    return found
