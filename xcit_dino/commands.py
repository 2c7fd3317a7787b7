"""The commands as functions: ``xcit_dino.pretrain(data_path="shards", arch="xcit_nano_12_p8")``.

Each takes the options of the command of its name, as ``xcit-dino NAME --help`` lists them, checks
them alike and does the same. Bad input raises ``xcit_dino.errors.InputError`` (a ``ValueError``)
with the line that the command would print.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def pretrain(**options: Any) -> Path:
    """DINO pretraining, or its resumption; returns the run folder."""
    return _train("pretrain", options)


def finetune(**options: Any) -> Path:
    """Train a classifier from pretrained weights or from scratch; returns the run folder."""
    return _train("finetune", options)


def distill(**options: Any) -> Path:
    """Train a classifier with a teacher; returns the run folder."""
    return _train("distill", options)


def knn(**options: Any) -> dict[str, Any]:
    """Weighted k-NN; returns the result as ``results.json`` has it (``metrics``, ``protocol``)."""
    return _evaluate("knn", options)


def linear(**options: Any) -> dict[str, Any]:
    """Linear probe; returns the result as ``results.json`` has it."""
    return _evaluate("linear", options)


def evaluate(**options: Any) -> dict[str, Any]:
    """Accuracy of a classifier; returns the result as ``results.json`` has it."""
    return _evaluate("evaluate", options)


def command_line(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line; those that are None are left out."""
    words: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if value is not None:
            words += [f"--{name}", *(_word(each) for each in values)]
    return words


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


def _run(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Call a command; returns all its options, with the defaults of those that were not given."""
    from xcit_dino.cli import make_config, run_command
    from xcit_dino.options import options as every_option

    config = make_config(name, command_line(options))
    if code := run_command(name, config):
        raise RuntimeError(f"xcit-dino {name} ended with exit code {code}")
    return dict(every_option(config))


def _train(name: str, options: dict[str, Any]) -> Path:
    return Path(_run(name, options)["output_dir"])


def _evaluate(name: str, options: dict[str, Any]) -> dict[str, Any]:
    from xcit_dino.provenance import recording

    with recording() as results:
        _run(name, options)

    from xcit_dino.train.distributed import dist

    return dist.from_main(lambda: results[0])  # of the network; those of baselines follow
