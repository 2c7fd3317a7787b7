"""The launcher's options and what they resolve to; free of torch, so that ``--help`` and
``--dry_run`` are fast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from xcit_dino.errors import InputError, needs
from xcit_dino.options import options
from xcit_dino.paths import Location

Cluster = Literal["slurm", "local", "debug"]
RESUMES = frozenset(  # save a checkpoint on a stop signal
    {"pretrain", "finetune", "distill", "segment", "detect"}
)


@dataclass(frozen=True)
class ResourceConfig:
    """Resources of one stage; those of a later stage are set by ``--STAGE.nodes 1`` and so on."""

    nodes: int = 1
    """Number of nodes."""
    ngpus: int | None = None
    """GPUs per node, one process each. Default: all GPUs of a node. 0: CPU processes."""
    nproc: int = 1
    """Processes per node without GPUs (--ngpus 0)."""
    cpus_per_task: int | None = None
    """Cores per process. Default: num_workers + 2."""
    mem: str | None = None
    """Memory per node in SLURM's notation (64G). Default: the cluster's."""
    timeout: int | None = None
    """Minutes until the job saves a checkpoint and is requeued. Default: 1440 on SLURM, none
    locally."""
    partition: str | None = None
    """SLURM partition."""
    account: str | None = None
    """SLURM account."""
    qos: str | None = None
    """SLURM quality of service."""
    constraint: str | None = None
    """Required node features (a100|h100)."""
    exclude: str | None = None
    """Nodes to avoid."""
    comment: str | None = None
    """Comment attached to the jobs."""
    slurm: tuple[str, ...] = ()
    """Any other sbatch option as KEY=VALUE (reservation=deadline, exclusive=true)."""


@dataclass(frozen=True)
class LaunchConfig:
    """Where and how the stages run."""

    resources: ResourceConfig = field(default_factory=ResourceConfig)
    cluster: Literal["auto", "slurm", "local", "debug"] = "auto"
    """auto: SLURM if available, else local processes. debug: inside this process."""
    stages: str = "pretrain"
    """Stages, pretrain,knn,linear,report ...; each starts after the previous one has succeeded."""
    seeds: tuple[int, ...] = ()
    """One run per seed, each in its own folder: RUN-seed0, RUN-seed1 ..."""
    array_parallelism: int = 4
    """Maximum number of concurrent runs of --seeds on SLURM; a single machine runs them in
    sequence."""
    job_name: str | None = None
    """Name of the jobs. Default: the run folder's name."""
    shared_dir: Path | None = None
    """Folder visible to all nodes; a run without --output_dir goes to SHARED_DIR/ARCH."""
    setup: tuple[str, ...] = ()
    """Shell lines run at the start of each job ("module load cuda")."""
    container: Location | None = None
    """Image in which the processes run, with Python and what this project needs: a .sif file
    (apptainer), or what pyxis takes (a .sqsh file, REGISTRY#IMAGE). Folders of run, shards and
    weights are mounted."""
    max_requeues: int = 10
    """Maximum restarts after a failure. Restarts after preemption and time limits are unlimited."""
    signal_delay: int = 120
    """Seconds before the time limit at which SLURM signals the job to save a checkpoint."""
    dry_run: bool = False
    """Print the submission script, the resolved recipe and the derived values; run nothing."""

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
    """Stage. Default: the one started last."""
    rank: int = 0
    """Rank whose log is shown."""
    follow: bool = False
    """Keep printing new lines until the stage ends."""


@dataclass(frozen=True)
class CancelConfig:
    """``xcit-dino launch cancel RUN``."""

    run: tyro.conf.Positional[Path] = tyro.MISSING
    """Run folder."""


@dataclass(frozen=True)
class Stage:
    """One job: entry point, config and resources."""

    name: str
    entry: str
    """``module:function``, called with the config."""
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
    """A resolved command line."""

    launch: LaunchConfig
    run: Path
    """The run folder, absolute."""
    stages: tuple[Stage, ...]
    others: tuple[Launch, ...] = ()
    """The runs of the other --seeds."""

    @property
    def job_name(self) -> str:
        return self.launch.job_name or self.run.name


RESERVED = {
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
EQUIVALENT = {  # sbatch option -> the launcher's own option for it
    **{name: name for name in "nodes mem partition account qos constraint exclude comment".split()},
    **{"time": "timeout", "cpus_per_task": "cpus_per_task", "gpus_per_node": "ngpus"},
    **{"ntasks": "ngpus", "ntasks_per_node": "ngpus"},
}


def check(launch: LaunchConfig, prefix: str = "") -> None:
    """Validate the values.

    Args:
        prefix: put before an option's name in messages (``"knn."``).

    Raises:
        InputError: names the option and the remedy.
    """
    for name, text in text_options(launch):
        # a line break would end a comment line of the script: the rest would run as a command
        if not text.isprintable():
            raise InputError(
                f"--{prefix}{name}: must not contain line breaks or control characters"
            )
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


def text_options(launch: LaunchConfig) -> Iterator[tuple[str, str]]:
    """Yield ``(name, text)`` for every text option."""
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
    if key in RESERVED:
        raise InputError(f"--slurm {key}: set by the launcher itself; leave it out")
    if key in EQUIVALENT:
        raise InputError(f"--slurm {key}: give --{EQUIVALENT[key]} instead")
    return key, True if value.lower() == "true" else value


def check_path(run: Path) -> None:
    """SLURM expands ``%`` in a path as a pattern; a line break would end the script's line."""
    if "%" in str(run) or not str(run).isprintable():
        raise InputError(f"--output_dir {str(run)!r}: must not contain % or control characters")
