"""Options that trainings on masks and boxes share (segment, detect); torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from xcit_dino.command_line import parse, pop_option, pop_path
from xcit_dino.data.config import LoaderConfig
from xcit_dino.errors import InputError, needs, within
from xcit_dino.eval.config import NetworkName
from xcit_dino.inputs import Scaled, check_window
from xcit_dino.models.zoo import canonical_name
from xcit_dino.options import read_yaml, replace
from xcit_dino.supervised.config import passed_on
from xcit_dino.train.config import RunConfig

Config = TypeVar("Config")


@dataclass(frozen=True)
class BackboneStartConfig:
    """The backbone's weights."""

    pretrained_weights: Path | None = None
    """A run folder (its newest checkpoint, arch and data), or a file of any kind that `weights`
    reads. Left out: random weights."""
    checkpoint_key: NetworkName | None = None
    """Network of a checkpoint. Default: the teacher of a DINO checkpoint, else the only one."""

    def ineffective(self) -> dict[str, str]:
        """See :func:`xcit_dino.options.ineffective`."""
        return needs(self.pretrained_weights, "without --pretrained_weights", "checkpoint_key")


@dataclass(frozen=True)
class TaskConfig(Scaled):
    """What every task does with backbone and images."""

    taps: tuple[int, ...] = ()
    """Layers whose features the head gets: blocks (or stages) counted from 0. By default XCiT's
    3 5 7 11 of 12 (7 11 15 23 of 24)."""
    hflip: float = 0.5
    """Probability of a left-right flip."""
    eval_every: int = 0
    """Epochs between evaluations; 0: at the end only."""
    window: tuple[float | str, ...] | None = None
    """Values that become 0 and 1, LOW HIGH or such a pair for each channel; others are clipped. A
    number, or a percentile of each channel in the data (p0.1 p99.9). By default as the weights to
    start from were trained, else by the data: 0 255 of 8 bits, 0 4095 where 12 bits are used."""
    mean: tuple[float, ...] | None = None
    """Of each channel (values in [0, 1]), subtracted; by default as the weights to start from were
    trained, else that of the data, and ImageNet's of 8-bit RGB."""
    std: tuple[float, ...] | None = None
    """The channels are divided by it; by default as for mean."""

    def __post_init__(self) -> None:
        within(self, -1, 1000, "taps")
        within(self, 0, 1, "hflip", "mean")
        within(self, 1e-3, 1e3, "std")
        within(self, 0, 1e6, "eval_every")
        check_window(self.window)


def check_scale(low: float, high: float) -> None:
    """Raise InputError unless ``--scale`` is a range of factors."""
    if not 0.01 <= low <= high <= 100:
        raise InputError("--scale must be two factors, 0.01 <= from <= to <= 100")


def never_falls(warmup_epochs: float, epochs: int) -> list[str]:
    """A remark where warm-up takes the whole training."""
    if warmup_epochs < epochs:
        return []
    return [
        f"--warmup_epochs {warmup_epochs:g} with --epochs {epochs}: the learning rate never falls"
    ]


def refuse_unsupported(run: RunConfig, loader: LoaderConfig, name: str, targets: str) -> None:
    """Raise InputError for options that are made for crops without targets."""
    if loader.decoder != "host":
        raise InputError(f"--decoder cuda: {targets} are read on the host; use --decoder host")
    if run.fsdp:
        raise InputError(f"--fsdp: {name} keeps all weights in each process; leave it out")


def task_config(base: Config, name: str, argv: Sequence[str], prog: str, about: str) -> Config:
    """Recipe (``--config FILE``) plus command-line overrides; a run folder to start from passes on
    its arch and the location of its data, as in finetuning.

    base: the defaults; name: of the folder inside the run.

    Raises:
        InputError: unknown model, file, option or value, in one line.
    """
    file, argv = pop_path(argv, "config")
    folder = pop_path(argv, "pretrained_weights")[0]
    known = passed_on(folder)
    config: Any = replace(base, known, source=f"{folder}/config.yaml")
    if file is not None:
        recipe = read_yaml(file)
        if pop_option(argv, "arch")[0] or known.get("arch"):
            recipe.pop("arch", None)
        config = replace(config, recipe, source=str(file))
    config = parse(config, argv, prog, about)
    arch = canonical_name(config.model.arch)
    values: dict[str, Any] = {"arch": arch}
    if config.run.output_dir == RunConfig.output_dir:
        runs = folder if folder and known else Path("runs") / arch.replace("/", "_")
        values["output_dir"] = runs / name
    return replace(config, values)
