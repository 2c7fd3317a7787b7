"""``launch rehearse``: does this cluster stop, requeue and resume a run without losing anything?

Two tiny runs of the real trainer on the requested nodes, partition and folders. One is
uninterrupted. The other is signaled to stop, as before a time limit, and later all its ranks are
killed; SLURM (or the local launcher) restarts it each time. Both must end with bit-identical
weights.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from xcit_dino.command_line import pop_option, pop_path
from xcit_dino.errors import InputError, RunError
from xcit_dino.models.zoo import TIMM_PREFIX, model_spec
from xcit_dino.options import read_yaml
from xcit_dino.slurm import attempts, launched, scheduler, status
from xcit_dino.slurm.checks import global_batch
from xcit_dino.slurm.config import CancelConfig, Launch
from xcit_dino.slurm.launch import choose_cluster, with_gpus
from xcit_dino.slurm.stages import launch_config, read_defaults
from xcit_dino.slurm.tools.dry_run import preview
from xcit_dino.slurm.watch import read_state
from xcit_dino.train.config import CONFIGS

RECIPE = CONFIGS / "rehearsal.yaml"
STEPS_PER_EPOCH = 10
TIMEOUT_MINUTES = 60.0  # for each phase of the rehearsal, on a busy cluster
POLL = 3.0  # seconds between two queries of the queue


@dataclass(frozen=True)
class Rehearsal:
    """Folder and launcher options of a rehearsal."""

    folder: Path
    argv: tuple[str, ...]


def rehearse_config(argv: Sequence[str], prog: str = "xcit-dino launch rehearse") -> Rehearsal:
    """Parse the options of ``launch``, for two runs in ``--output_dir`` (runs/rehearsal)."""
    folder, rest = pop_path(argv, "output_dir")
    shared = pop_path(argv, "shared_dir")[0]
    shared = shared or read_defaults(pop_path(argv, "launch_defaults")[0]).shared_dir
    place = folder or (shared or Path("runs")) / "rehearsal"
    rehearsal = Rehearsal(Path(os.path.abspath(place)), tuple(rest))
    launch = resolve(rehearsal, "straight")  # reports bad options, and prints --help
    for option, given in (("seeds", launch.others), ("stages", launch.stages[1:])):
        if given:
            raise InputError(f"--{option}: a rehearsal is one pretraining; leave the option out")
    return rehearsal


def command_line(rehearsal: Rehearsal, name: str) -> list[str]:
    """Command line of one of the two runs."""
    paths = ["--config", RECIPE, "--data_path", rehearsal.folder / "shards"]
    given = [*crops(rehearsal.argv), *rehearsal.argv]
    return [*map(str, paths), "--output_dir", str(rehearsal.folder / name), *given]


def crops(argv: Sequence[str]) -> list[str]:
    """Crop sizes that fit the network's patches, if those of the recipe are too small."""
    arch = pop_option(argv, "arch")[0]
    patch = model_spec(arch).patch_size if arch and not arch.startswith(TIMM_PREFIX) else 0
    small = patch > read_yaml(RECIPE)["local_crops_size"]
    return f"--global_crops_size {2 * patch} --local_crops_size {patch}".split() if small else []


def resolve(rehearsal: Rehearsal, name: str) -> Launch:
    """Resolve one of the two runs."""
    return launch_config(command_line(rehearsal, name), "xcit-dino launch rehearse")


def run(rehearsal: Rehearsal) -> int:
    """Rehearse; returns 0 if nothing was lost, else 1."""
    launch = resolve(rehearsal, "straight")
    cluster = choose_cluster(launch)
    launch = with_gpus(launch, cluster)
    if launch.launch.dry_run:
        preview(launch, cluster)
        return 0
    if (rehearsal.folder / "interrupted").exists():
        raise InputError(
            f"--output_dir {rehearsal.folder}: contains an earlier rehearsal; remove it"
        )
    make_shards(rehearsal.folder / "shards", STEPS_PER_EPOCH * global_batch(launch.stages[0]))
    straight, interrupted = (rehearsal.folder / name for name in ("straight", "interrupted"))

    straight, interrupted = Submitted(rehearsal, "straight"), Submitted(rehearsal, "interrupted")
    print(f"uninterrupted run, on {cluster}: {straight.folder}", flush=True)
    with straight:
        straight.wait(straight.finished)
    print(f"interrupted run: {interrupted.folder}", flush=True)
    with interrupted:
        for attempt, number in enumerate((signal.SIGUSR2, signal.SIGKILL), 1):
            interrupted.wait(partial(interrupted.has_trained, attempt))
            interrupt(interrupted.folder, cluster, number)
            print(f"  attempt {attempt}: sent {number.name} to all ranks", flush=True)
        interrupted.wait(interrupted.finished)
    return verdict(straight.folder, interrupted.folder)


def make_shards(folder: Path, images: int) -> None:
    """Create a training set of this many images, unless it exists."""
    from xcit_dino.data.pack.demo import make
    from xcit_dino.data.shards.config import DemoConfig

    if not (folder / "train" / "index.json").is_file():
        make(DemoConfig(dst=folder, train=images, val=10, size=16))


class Submitted:
    """One of the two runs: ``xcit-dino launch`` in its own process, which ends at once on SLURM,
    and with the run locally."""

    def __init__(self, rehearsal: Rehearsal, name: str):
        self.folder = rehearsal.folder / name
        self.log = rehearsal.folder / f"{name}.log"
        self.command = [
            sys.executable,
            "-m",
            "xcit_dino.cli",
            "launch",
            *command_line(rehearsal, name),
        ]

    def __enter__(self) -> None:
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and status.owner(self.folder):  # also on Ctrl-C: leave no jobs behind
            status.cancel(CancelConfig(self.folder))
        self.process.wait()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Poll until the condition holds; each new state is printed, with SLURM's reason for it.

        Raises:
            InputError: the run is refused.
            RunError: the run failed, or made no progress for ``TIMEOUT_MINUTES``.
        """
        deadline, next_poll, shown = time.monotonic() + 60 * TIMEOUT_MINUTES, 0.0, ""
        while not condition():
            if code := self.process.poll():
                reason = self.log.read_text().splitlines()[-1].removeprefix("xcit-dino: ")
                raise InputError(reason) if code == 2 else RunError(f"{reason} (log: {self.log})")
            if time.monotonic() > deadline:
                raise RunError(
                    f"{self.folder}: no progress; see: xcit-dino launch status {self.folder}"
                )
            if time.monotonic() > next_poll:
                next_poll = time.monotonic() + POLL
                at_work = status.owner(self.folder)
                if not at_work and code == 0 and not condition():
                    raise RunError(f"{self.folder}: {status.state(self.folder, 'pretrain')}")
                state = status.state(self.folder, "pretrain") if at_work else shown
                if state != shown:
                    print(f"  {state}", flush=True)
                shown = state
            time.sleep(0.1)

    def finished(self) -> bool:
        """Whether the run has ended, whatever its outcome."""
        return attempts.load(self.folder, "pretrain").finished

    def has_trained(self, attempt: int) -> bool:
        """Whether the n-th attempt has done a step, or the run has ended."""
        known = attempts.load(self.folder, "pretrain")
        state = read_state(attempts.progress_file(self.folder, "pretrain"))
        begun = known.attempts == attempt and state is not None and state["done"] > state["start"]
        return known.finished or begun


def interrupt(folder: Path, cluster: str, number: signal.Signals) -> None:
    """Send a signal to all ranks."""
    job_id = attempts.load(folder, "pretrain").job_id
    if cluster == "slurm":
        scheduler.signal_step(job_id, number.name)
    elif number == signal.SIGKILL:
        kill_ranks(int(job_id))
    else:
        os.kill(int(job_id), number)  # forwarded by the controller


def kill_ranks(controller: int) -> None:
    """Send SIGKILL to the processes started by a controller."""
    children = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)


# -- the verdict -----------------------------------------------------------------------------------


def verdict(straight: Path, interrupted: Path) -> int:
    """Print the result of each check; returns the exit code."""
    checks = {
        "the uninterrupted run completed": lambda: state(straight, expected=1),
        "the interrupted run was restarted twice and completed": lambda: state(interrupted, 3),
        "each attempt used a fresh rendezvous port": lambda: fresh_ports(interrupted),
        "every checkpoint is intact": lambda: checkpoints_intact(interrupted),
        "every step is in the metrics once, with the same loss": lambda: curve(
            straight, interrupted
        ),
        "the weights are bit-identical": lambda: weights(straight, interrupted),
    }
    wrong = 0
    for name, check in checks.items():
        found = check()
        wrong += bool(found)
        print(f"{'NO ' if found else 'yes'}  {name}{f': {found}' if found else ''}")
    logs = f"; logs: xcit-dino launch logs {interrupted}"
    print(f"verdict: {'NOT safe here' + logs if wrong else 'nothing is lost here'}")
    return 1 if wrong else 0


def state(folder: Path, expected: int) -> str:
    """'' if a run is done after the expected number of attempts."""
    known = attempts.load(folder, "pretrain")
    if known.state == "done" and known.attempts == expected:
        return ""
    return f"{known.state} after {known.attempts} attempts {known.reason}".strip()


def fresh_ports(folder: Path) -> str:
    """'' if no two attempts used the same port."""
    jobs = launched.folder(folder) / "jobs"
    statuses = (json.loads(path.read_text()) for path in jobs.glob("*/words-*-0.json"))
    ports = [word["port"] for word in statuses if "port" in word]
    return "" if len(set(ports)) == len(ports) else f"ports {ports}"


def checkpoints_intact(folder: Path) -> str:
    """'' if every checkpoint matches its checksum, and no partial file is left."""
    from xcit_dino.files import file_checksum

    for path in (folder / "checkpoints").iterdir():
        if path.suffix == ".json":
            if json.loads(path.read_text())["sha256"] != file_checksum(path.with_suffix(".pth")):
                return f"{path.stem} is damaged"
        elif path.suffix != ".pth":
            return f"{path.name} was left behind"
    return ""


def curve(straight: Path, interrupted: Path) -> str:
    """'' if both runs logged the same loss at each step, exactly once."""
    expected, found = losses(straight), losses(interrupted)
    if expected == found:
        return ""
    for one, other in itertools.zip_longest(expected, found):
        if one != other:
            return f"(step, loss) {other} instead of {one}"
    return ""


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of each line of the metrics that has a loss."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def weights(straight: Path, interrupted: Path) -> str:
    """'' if all tensors of the last checkpoints are equal."""
    from xcit_dino.train.state import load_checkpoint, newest_checkpoint

    pair = [newest_checkpoint(folder) for folder in (straight, interrupted)]
    if None in pair:
        return "no checkpoint"
    expected, found = (load_checkpoint(path) for path in pair if path)
    if expected["step"] != found["step"]:
        return f"step {found['step']} instead of {expected['step']}"
    return first_difference(expected, found, "")


def first_difference(one: object, other: object, path: str) -> str:
    """Path of the first tensor that differs in two nested dicts, or ''."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return "" if torch.equal(one, other) else f"{path} differs"
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{path} has other entries"
        found = (first_difference(one[key], other[key], f"{path}/{key}") for key in one)
        return next(filter(None, found), "")
    return ""
