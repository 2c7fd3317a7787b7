"""The launcher's command line, one for all stages.

Launcher options and pretraining options share one flat namespace (``--nodes 2 --arch
xcit_small_12_p8 --epochs 100``); options of later stages are prefixed with the stage's name
(``--knn.nb_knn 20 --linear.timeout 120``).
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from xcit_dino.cli import COMMANDS, load
from xcit_dino.command_line import parse, pop_option, pop_path
from xcit_dino.errors import InputError, suggest
from xcit_dino.options import absolute, option_types, options, read_yaml, replace
from xcit_dino.slurm.config import (
    RESUMES,
    Launch,
    LaunchConfig,
    ResourceConfig,
    Stage,
    check,
    check_path,
)
from xcit_dino.train.config import RunConfig

STAGES = (  # in the order in which they run
    "pretrain", "embed", "duplicates", "knn", "linear", "evaluate", "masks", "retrieve",
    "propagate", "finetune", "distill", "segment", "detect", "report",
)  # fmt: skip
ENTRIES = {  # not the commands' `main`, which would replace the job's signal handlers
    "pretrain": "xcit_dino.ssl.pretrain:pretrain_with_knn",
    "finetune": "xcit_dino.supervised.finetune:finetune",
    "distill": "xcit_dino.supervised.distill:distill",
    "segment": "xcit_dino.supervised.segment.train:segment",
    "detect": "xcit_dino.supervised.detect.train:detect",
}


def launch_config(argv: Sequence[str], prog: str = "xcit-dino launch") -> Launch:
    """Resolve defaults, the user's file and the command line, in this order; checked without
    contacting the cluster.

    Raises:
        InputError: names the bad option.
    """
    refuse_unknown_command(argv)
    first = resolve_run(argv, prog)
    seeds, name = first.launch.seeds, first.launch.job_name
    if not seeds:
        return first
    if first.stages[0].name != "pretrain" or len(set(seeds)) < len(seeds):
        raise InputError("--seeds: give each seed once, with pretrain among --stages")
    runs = []
    for seed in seeds:
        own = ["--seed", str(seed), "--output_dir", f"{first.run}-seed{seed}"]
        own += ["--job_name", f"{name}-seed{seed}"] if name else []
        runs.append(resolve_run([*argv, *own], prog))
    return dataclasses.replace(runs[0], others=tuple(runs[1:]))


def refuse_unknown_command(argv: Sequence[str]) -> None:
    """Raise :class:`InputError` for a misspelled ``launch status`` and the like."""
    if argv and not argv[0].startswith("-"):
        others = [name.split()[1] for name in COMMANDS if name.startswith("launch ")]
        close = suggest(argv[0], others) or f" (there are {', '.join(others)})"
        raise InputError(f"no command 'launch {argv[0]}'{close}")


def resolve_run(argv: Sequence[str], prog: str) -> Launch:
    """Resolve a command line, ignoring --seeds."""
    defaults, argv = pop_path(argv, "launch_defaults")
    base = read_defaults(defaults)
    if {"-h", "--help"} & set(argv):
        parse(base, ["--help"], prog, HELP)
    own, by_stage, rest = split_args(argv)
    launch = parse(base, own, prog, HELP)
    names = stage_names(launch.stages)
    if unknown := set(by_stage) - set(names):
        raise InputError(f"--{unknown.pop()}.*: that stage is not in --stages {launch.stages}")
    check(launch)
    run, stages = None, []
    for name in names:
        if name == "pretrain":
            stage = pretrain_stage(launch, rest, prog)
        elif "pretrain" not in names and rest:
            raise InputError(
                f"{rest[0]}: not an option of the launcher; for a stage write --{name}.OPTION"
            )
        elif name in RESUMES:
            stage = training_stage(name, launch, by_stage.get(name, []), stages, prog)
        else:
            stage = later_stage(name, launch, by_stage.get(name, []), run, prog)
        run = run or dict(options(stage.config))["output_dir"]
        stages.append(stage)
    assert isinstance(run, Path)
    check_path(run)
    return Launch(launch, run, tuple(stages))


HELP = (
    "Run stages as SLURM jobs or local processes. All options of `xcit-dino pretrain --help` are "
    "accepted too; those of other stages as --knn.nb_knn, --linear.nodes and so on. Defaults can "
    "be kept in ~/.config/xcit-dino/slurm.yaml (another file: --launch_defaults FILE). "
    "`launch status|logs|cancel RUN` manage a run, `launch rehearse` tests this cluster."
)


def read_defaults(path: Path | None) -> LaunchConfig:
    """Read the user's defaults; a file given explicitly must exist."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    file = path or home / "xcit-dino" / "slurm.yaml"
    if not path and not file.is_file():
        return LaunchConfig()
    return replace(LaunchConfig(), read_yaml(file), source=str(file))


def split_args(argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """Split a command line into (launcher's arguments, {stage: arguments}, pretraining's).

    ``--pretrain.X`` is ``--X``: options of the first stage need no prefix.
    """
    launcher = option_types(LaunchConfig)
    own: list[str] = []
    rest: list[str] = []
    by_stage: dict[str, list[str]] = {}
    target = rest
    for word in argv:
        if word.startswith("--"):
            name, dot, option = word[2:].partition("=")[0].replace("-", "_").partition(".")
            if dot and name not in STAGES:
                raise InputError(f"{word}: no stage {name!r}{suggest(name, STAGES)}")
            if dot:
                target = by_stage.setdefault(name, [])
                word = f"--{option}{word[len(f'--{name}.{option}') :]}"
            if not dot or name == "pretrain":
                target = own if (option or name) in launcher else rest
        target.append(word)
    return own, by_stage, rest


def stage_names(text: str) -> list[str]:
    """``"pretrain,knn"`` -> validated names, in the order in which stages run."""
    known = [name for name in STAGES if name in COMMANDS]
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise InputError(
                f"--stages: no stage {name!r}{suggest(name, known)} (there are {', '.join(known)})"
            )
    if not names or len(set(names)) < len(names):
        raise InputError(f"--stages {text!r}: name one or more stages, each once")
    return sorted(names, key=STAGES.index)


def pretrain_stage(launch: LaunchConfig, argv: list[str], prog: str) -> Stage:
    """The pretraining stage; the run folder defaults to ``runs/ARCH``."""
    make: Callable[..., Any] = load(COMMANDS["pretrain"].config)
    refuse_unknown(argv, option_types(LaunchConfig) | option_types(return_class(make)))
    config = make(argv, prog)
    if config.run.output_dir == RunConfig.output_dir:
        folder = (launch.shared_dir or Path("runs")) / config.model.arch.replace("/", "_")
        config = replace(config, {"output_dir": folder})
    return Stage("pretrain", ENTRIES["pretrain"], absolute(config), launch.resources)


def return_class(function: Callable[..., Any]) -> type:
    """The return annotation of a config function."""
    return typing.get_type_hints(function)["return"]


def training_stage(
    name: str, launch: LaunchConfig, argv: list[str], before: Sequence[Stage], prog: str
) -> Stage:
    """A finetuning or distillation stage: in a subfolder of the run folder, from the run's newest
    checkpoint, by default with the resources of pretraining."""
    make: Callable[..., Any] = load(COMMANDS[name].config)
    refuse_unknown(argv, RESOURCES | option_types(return_class(make)), prefix=f"{name}.")
    resources, theirs = own_resources(name, launch, launch.resources, argv, prog)
    inherited = []
    if before:
        first = dict(options(before[0].config))
        run = first["output_dir"] if before[0].name == "pretrain" else None
        given = {
            "pretrained_weights": run,
            "output_dir": first["output_dir"] / name,
            "arch": first.get("arch"),
            "data_path": first.get("data_path"),
            "shard_url": first.get("shard_url"),
        }
        inherited = [
            arg for key, value in given.items() if value for arg in (f"--{key}", str(value))
        ]
    config = absolute(make([*inherited, *theirs], f"{prog} --{name}.*"))
    return Stage(name, ENTRIES[name], config, resources)


def later_stage(
    name: str, launch: LaunchConfig, argv: list[str], run: Path | None, prog: str
) -> Stage:
    """A stage that works on the run folder, by default with one node and one GPU."""
    if run is None and pop_option(argv, "output_dir")[0] is None:
        raise InputError(f"--{name}.output_dir: name the run folder, or add pretrain to --stages")
    config_class = load(COMMANDS[name].config)
    default = config_class(**{"output_dir": run}) if name == "report" else config_class()
    if run is not None:
        default = replace(default, {"output_dir": run})
    refuse_unknown(argv, RESOURCES | option_types(config_class), prefix=f"{name}.")
    ngpus = launch.resources.ngpus
    one = {"nodes": 1, "nproc": 1, "ngpus": 0 if name == "report" or ngpus == 0 else 1}
    resources, theirs = own_resources(name, launch, replace(launch.resources, one), argv, prog)
    config = absolute(parse(default, theirs, f"{prog} --{name}.*", COMMANDS[name].about))
    return Stage(name, f"xcit_dino.{COMMANDS[name].run}", config, resources)


RESOURCES = option_types(ResourceConfig)


def own_resources(
    name: str, launch: LaunchConfig, default: ResourceConfig, argv: list[str], prog: str
) -> tuple[ResourceConfig, list[str]]:
    """A later stage's validated resources, and its remaining arguments."""
    mine, theirs = partition(argv, RESOURCES)
    resources = parse(default, mine, f"{prog} --{name}.*")
    check(replace(launch, dict(options(resources))), prefix=f"{name}.")
    return resources, theirs


def refuse_unknown(argv: Sequence[str], known: Collection[str], prefix: str = "") -> None:
    """Raise :class:`InputError` for the first unknown option."""
    for word in argv:
        name = word[2:].partition("=")[0].replace("-", "_")
        if word.startswith("--") and name not in known and name != "config":
            raise InputError(f"unknown option --{prefix}{name}{suggest(name, known)}")


def partition(argv: Sequence[str], names: Collection[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the options in ``names`` and the others."""
    chosen: list[str] = []
    others: list[str] = []
    target = others
    for word in argv:
        if word.startswith("--"):
            target = chosen if word[2:].partition("=")[0].replace("-", "_") in names else others
        target.append(word)
    return chosen, others
