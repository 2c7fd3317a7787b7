"""``xcit-dino COMMAND``: sub-commands, each imported only when called."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pkgutil import resolve_name
from typing import Any, NamedTuple

from xcit_dino import __version__
from xcit_dino.errors import InputError, RunError, Stopped, suggest


class Command(NamedTuple):
    """One sub-command: where its config comes from, and the function that runs it."""

    config: str
    """``module:name`` of a config dataclass or of a function ``argv, prog -> config``; no torch."""
    run: str
    """``module:function``, called with the config; imported after the options are checked."""
    about: str
    """Summary for ``--help``."""


COMMANDS = {
    "quickstart": Command(
        "slurm.tools.quickstart:QuickstartConfig",
        "slurm.tools.quickstart:run",
        "the whole pipeline on built-in images, with a report",
    ),
    "shards make": Command(
        "data.shards.config:MakeConfig", "data.pack.make:make", "pack images into WebDataset shards"
    ),
    "shards check": Command(
        "data.shards.config:CheckConfig",
        "data.shards.check:check",
        "verify shards, or index those made by other tools",
    ),
    "shards demo": Command(
        "data.shards.config:DemoConfig", "data.pack.demo:make", "create the built-in images"
    ),
    "recipe": Command(
        "ssl.recipe.config:RecipeConfig",
        "ssl.recipe.recipe:run",
        "options of pretrain that fit given shards, this machine and a number of hours",
    ),
    "pretrain": Command(
        "ssl.config:pretrain_config",
        "ssl.pretrain:main",
        "DINO pretraining, in this process or under torchrun",
    ),
    "knn": Command("eval.config:KnnConfig", "eval.knn:run", "weighted k-NN accuracy"),
    "linear": Command("eval.config:LinearConfig", "eval.linear:run", "linear probe"),
    "evaluate": Command(
        "eval.config:EvaluateConfig",
        "eval.evaluate:run",
        "top-1 and top-5 of a classifier, or of a backbone and a head",
    ),
    "retrieve": Command(
        "eval.retrieval.config:RetrieveConfig",
        "eval.retrieval.retrieve:run",
        "image retrieval (Oxford, Paris, own folders) and copy detection (Copydays)",
    ),
    "propagate": Command(
        "eval.video.config:PropagateConfig",
        "eval.video.propagate:run",
        "video object segmentation by label propagation (DAVIS 2017)",
    ),
    "finetune": Command(
        "supervised.config:finetune_config",
        "supervised.finetune:main",
        "train a classifier from pretrained weights or from scratch",
    ),
    "distill": Command(
        "supervised.config:distill_config",
        "supervised.distill:main",
        "train a classifier with a teacher",
    ),
    "segment": Command(
        "supervised.segment.config:segment_config",
        "supervised.segment.train:main",
        "semantic segmentation: linear probe, Semantic FPN or UperNet on a backbone",
    ),
    "detect": Command(
        "supervised.detect.config:detect_config",
        "supervised.detect.train:main",
        "object detection: Faster R-CNN on a backbone",
    ),
    "attention": Command(
        "eval.config:AttentionConfig",
        "eval.pictures.attention:run",
        "class-attention maps over photos, or patch features as colors",
    ),
    "masks": Command(
        "eval.dense.config:MasksConfig",
        "eval.dense.masks:run",
        "class attention as masks of objects, against true masks (Jaccard)",
    ),
    "embed": Command(
        "eval.config:EmbedConfig", "eval.embed:run", "features of images, labeled or not"
    ),
    "duplicates": Command(
        "eval.retrieval.config:DuplicatesConfig",
        "eval.retrieval.duplicates:run",
        "near-duplicates, leaks between train and val, outliers",
    ),
    "watch": Command(
        "slurm.tools.monitor:WatchConfig", "slurm.tools.monitor:run", "a run's progress, live"
    ),
    "report": Command("eval.config:ReportConfig", "report.report:run", "report.html of runs"),
    "report compare": Command(
        "eval.config:CompareConfig",
        "report.compare:run",
        "compare runs, where their protocols allow it",
    ),
    "weights extract": Command(
        "models.config:ExtractConfig",
        "models.weights.convert:extract",
        "one network of a checkpoint",
    ),
    "weights convert": Command(
        "models.config:ConvertConfig",
        "models.weights.convert:convert",
        "official, timm and PASSL layouts",
    ),
    "weights export": Command(
        "models.config:ExportConfig",
        "models.weights.convert:export",
        "safetensors, ONNX or a folder for timm and the hub, with a model card",
    ),
    "launch": Command(
        "slurm.stages:launch_config", "slurm.launch:run", "stages as SLURM jobs or local processes"
    ),
    "launch status": Command(
        "slurm.config:StatusConfig", "slurm.status:status", "state and progress of a run"
    ),
    "launch logs": Command("slurm.config:LogsConfig", "slurm.status:logs", "a rank's log"),
    "launch rehearse": Command(
        "slurm.tools.rehearse:rehearse_config",
        "slurm.tools.rehearse:run",
        "test stop, requeue and resume on this cluster",
    ),
    "launch cancel": Command(
        "slurm.config:CancelConfig", "slurm.status:cancel", "save a checkpoint and end a run's jobs"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0 done, 1 failed while running, 2 bad input."""
    code = exit_code(list(sys.argv[1:] if argv is None else argv))
    if code and one_of_several_ranks():  # tearing down torch could wait for ranks that wait for us
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def exit_code(args: list[str]) -> int:
    """See :func:`main`."""
    try:
        name, rest = find_command(args)
        if name is None:
            return 0
        return run_command(name, make_config(name, rest))
    except InputError as error:
        print(f"xcit-dino: {error}", file=sys.stderr)
        return 2
    except (RunError, Stopped) as error:
        print(f"xcit-dino: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("xcit-dino: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        if not one_of_several_ranks():
            raise
        traceback.print_exc()
        return 1


def one_of_several_ranks() -> bool:
    """Whether this process has joined others."""
    return "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()


def find_command(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """(command, its arguments); prints help or version if requested and then returns (None, []).

    Raises:
        InputError: no such command.
    """
    for length in (2, 1):
        name = " ".join(args[:length])
        if name in COMMANDS:
            return name, list(args[length:])
    first = args[0] if args else "--help"
    if first == "--version":
        print(f"xcit-dino {__version__}")
    elif first in ("-h", "--help", "help"):
        print(overview())
    elif group := [name for name in COMMANDS if name.startswith(f"{first} ")]:
        if len(args) > 1 and args[1] not in ("-h", "--help"):
            choices = [name.split()[1] for name in group]
            raise InputError(f"no command {first!r} {args[1]!r}; it has {', '.join(choices)}")
        print(overview(group))
    else:
        raise InputError(f"no command {first!r}{suggest(first, COMMANDS)} (see xcit-dino --help)")
    return None, []


def overview(names: Sequence[str] = tuple(COMMANDS)) -> str:
    """The list of commands, each with its summary."""
    lines = [f"  {name:<16} {COMMANDS[name].about}" for name in names]
    return "\n".join(
        ["usage: xcit-dino COMMAND [OPTIONS]   (COMMAND --help lists its options)", "", *lines]
    )


def make_config(name: str, argv: Sequence[str]) -> Any:
    """The config of a command, from its options.

    Raises:
        InputError: an unknown option, or a bad value.
    """
    command = COMMANDS[name]
    config, prog = load(command.config), f"xcit-dino {name}"
    if not isinstance(config, type):
        return config(argv, prog)
    from xcit_dino.command_line import parse

    return parse(config(), argv, prog, command.about)


def run_command(name: str, config: Any) -> int:
    """Import and run a command; returns its exit code."""
    return int(load(COMMANDS[name].run)(config) or 0)


def load(path: str) -> Any:
    """``"ssl.config:PretrainConfig"`` -> that object in ``xcit_dino.ssl.config``."""
    return resolve_name(f"xcit_dino.{path}")


if __name__ == "__main__":
    sys.exit(main())
