"""Options of the launcher, and what they resolve to; torch-free, so that ``--help`` and
``--dry_run`` are quick."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from xcit_dino.errors import InputError, needs
from xcit_dino.options import options

RESUMES = frozenset({"pretrain", "finetune", "distill"})  # these save themselves when told to stop


@dataclass(frozen=True)
class ResourceConfig:
    """What one stage asks for; another stage's own value is ``--STAGE.nodes 1`` and so on."""

    nodes: int = 1
    """Nodes."""
    ngpus: int | None = None
    """GPUs of each node, one process each. Left out: all that a node has. 0: processes on CPUs."""
    nproc: int = 1
    """Processes of each node where there are no GPUs (--ngpus 0)."""
    cpus_per_task: int | None = None
    """Cores of each process. Left out: num_workers + 2."""
    mem: str | None = None
    """Memory of each node as SLURM writes it (64G). Left out: the cluster's default."""
    timeout: int | None = None
    """Minutes until the job saves itself and is requeued. Left out: 1440 on SLURM, none locally."""
    partition: str | None = None
    """SLURM partition."""
    account: str | None = None
    """SLURM account."""
    qos: str | None = None
    """SLURM quality of service."""
    constraint: str | None = None
    """Features that the nodes must have (a100|h100)."""
    exclude: str | None = None
    """Nodes to avoid."""
    comment: str | None = None
    """Comment on the jobs."""
    slurm: tuple[str, ...] = ()
    """Any other sbatch option as KEY=VALUE (reservation=deadline, exclusive=true)."""


@dataclass(frozen=True)
class LaunchConfig:
    """Where and how the stages run."""

    resources: ResourceConfig = field(default_factory=ResourceConfig)
    cluster: Literal["auto", "slurm", "local", "debug"] = "auto"
    """auto: SLURM where there is one, else local processes. debug: inside this process."""
    stages: str = "pretrain"
    """Stages, pretrain,knn,linear,report ...; each starts when the one before has succeeded."""
    seeds: tuple[int, ...] = ()
    """One run for each seed, in a folder of its own: RUN-seed0, RUN-seed1 ..."""
    array_parallelism: int = 4
    """How many runs of --seeds go on at a time on SLURM; one machine runs one after the other."""
    job_name: str | None = None
    """Name of the jobs. Left out: the run folder's."""
    shared_dir: Path | None = None
    """Folder that all nodes see; a run goes to SHARED_DIR/ARCH where --output_dir is left out."""
    setup: tuple[str, ...] = ()
    """Shell lines that each job runs first ("module load cuda")."""
    max_requeues: int = 10
    """Restarts after a failure. Preemption and time limits restart a run for ever."""
    signal_delay: int = 120
    """Seconds before the time limit at which SLURM tells the job to save itself."""
    dry_run: bool = False
    """Show the submission script, the resolved recipe and what follows from both; run nothing."""

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        return needs(self.seeds, "without --seeds", "array_parallelism")


@dataclass(frozen=True)
class StatusConfig:
    """``xcit-dino launch status RUN``."""

    run: tyro.conf.Positional[Path] = tyro.MISSING
    """Run folder."""


@dataclass(frozen=True)
class LogsConfig:
    """``xcit-dino launch logs RUN``."""

    run: tyro.conf.Positional[Path] = tyro.MISSING
    """Run folder."""
    stage: str | None = None
    """Stage. Left out: the one that began last."""
    rank: int = 0
    """Process whose log is shown."""
    follow: bool = False
    """Go on showing what is added until the stage ends."""


@dataclass(frozen=True)
class CancelConfig:
    """``xcit-dino launch cancel RUN``."""

    run: tyro.conf.Positional[Path] = tyro.MISSING
    """Run folder."""


@dataclass(frozen=True)
class Stage:
    """One job: what runs with which config on what."""

    name: str
    entry: str
    """``module:function`` that takes the config."""
    config: Any
    resources: ResourceConfig

    @property
    def tasks_per_node(self) -> int:
        return self.resources.ngpus or self.resources.nproc

    @property
    def num_tasks(self) -> int:
        return self.resources.nodes * self.tasks_per_node

    @property
    def cpus_per_task(self) -> int:
        workers = dict(options(self.config)).get("num_workers", 0)
        return self.resources.cpus_per_task or workers + 2


@dataclass(frozen=True)
class Launch:
    """A whole command line, resolved."""

    launch: LaunchConfig
    run: Path
    """The run folder, absolute."""
    stages: tuple[Stage, ...]
    others: tuple[Launch, ...] = ()
    """The same with the other --seeds."""

    @property
    def job_name(self) -> str:
        return self.launch.job_name or self.run.name


OURS = {
    "output",
    "error",
    "signal",
    "requeue",
    "dependency",
    "open_mode",
    "job_name",
    "array",
    "chdir",
}
OWN = {  # what sbatch calls them: where the launcher has an option of its own
    **{name: name for name in "nodes mem partition account qos constraint exclude comment".split()},
    **{"time": "timeout", "cpus_per_task": "cpus_per_task", "gpus_per_node": "ngpus"},
    **{"ntasks": "ngpus", "ntasks_per_node": "ngpus"},
}


def check(launch: LaunchConfig, prefix: str = "") -> None:
    """Refuse impossible values in words; ``prefix`` stands before an option's name in them.

    Raises:
        InputError: names the option and the remedy.
    """
    for name, text in texts(launch):
        if (
            not text.isprintable()
        ):  # a line break would end a comment line of the script: a command would follow
            raise InputError(f"--{prefix}{name}: must not hold line breaks or control characters")
    values = dict(options(launch))
    for low, names in (
        (1, ("nodes", "nproc", "cpus_per_task", "timeout", "array_parallelism")),
        (0, ("ngpus", "max_requeues", "signal_delay")),
    ):
        for name in names:
            if values[name] is not None and not low <= values[name] <= 1e7:
                raise InputError(f"--{prefix}{name} {values[name]}: must be from {low} to 1e7")
    if launch.resources.timeout and launch.signal_delay > 30 * launch.resources.timeout:
        raise InputError(
            f"--signal_delay {launch.signal_delay}: must be at most half of --{prefix}timeout "
            f"({launch.resources.timeout} minutes)"
        )
    for pair in launch.resources.slurm:
        slurm_option(pair)


def texts(launch: LaunchConfig) -> Iterator[tuple[str, str]]:
    """``(option, text)`` of every option that is text."""
    for name, value in options(launch):
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, str | Path):
                yield name, str(item)


def slurm_option(pair: str) -> tuple[str, str | bool]:
    """``"qos=high"`` -> ``("qos", "high")``; ``exclusive=true`` is a bare flag."""
    key, equals, value = pair.partition("=")
    key = key.strip().lstrip("-").replace("-", "_")
    if not equals or not key.replace("_", "").isalnum() or not key.isascii():
        raise InputError(f"--slurm {pair!r}: write KEY=VALUE, with KEY a long option of sbatch")
    if key in OURS:
        raise InputError(f"--slurm {key}: the launcher sets this one itself; leave it out")
    if key in OWN:
        raise InputError(f"--slurm {key}: give --{OWN[key]} instead")
    return key, True if value.lower() == "true" else value


def check_path(run: Path) -> None:
    """SLURM reads ``%`` in a path as a pattern; a line break would end the script's line."""
    if "%" in str(run) or not str(run).isprintable():
        raise InputError(f"--output_dir {str(run)!r}: must hold no % and no control characters")
