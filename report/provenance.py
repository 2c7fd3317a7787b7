"""The report's provenance: code, recipe, versions, hardware, data, every restart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from xcit_dino.errors import InputError
from xcit_dino.options import dump_yaml, option_types, read_yaml, replace
from xcit_dino.progress import clock
from xcit_dino.report.compare import aligned
from xcit_dino.report.page import Section, Table, plain, tables, timestamp
from xcit_dino.report.training import attempts, starts
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.supervised.config import DistillConfig, FinetuneConfig
from xcit_dino.supervised.detect.config import DetectConfig
from xcit_dino.supervised.segment.config import SegmentConfig
from xcit_dino.train.config import CONFIGS
from xcit_dino.train.run.folder import FREE
from xcit_dino.train.run.reader import Run

KINDS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "distill": DistillConfig,
         "segment": SegmentConfig, "detect": DetectConfig}  # fmt: skip


def provenance(run: Run) -> Section:
    """Where the run's numbers come from."""
    measured = [*starts(run), *run.results.values()]
    newest = max(measured, key=lambda fact: str(fact.get("time", "")), default={})
    protocols = [entry["protocol"] for entry in run.results.values()]
    facts = {
        "folder": str(run.folder),
        "commit": distinct(measured, "commit"),
        "data, train: SHA-256 of the index": distinct(protocols, "train_index"),
        "data, val: SHA-256 of the index": distinct(protocols, "val_index"),
        "data": run.config.get("data_path"),
        "versions": newest.get("versions"),
        "hardware": newest.get("hardware"),
    }
    recipe, changed = nearest_recipe(run)
    rows = [[name, plain(theirs), plain(ours)] for name, (theirs, ours) in changed.items()]
    data = {
        "facts": {name: value for name, value in facts.items() if value},
        "attempts": attempts_table(run),
        "recipe": recipe,
        "changed": Table(["option", "recipe", "this run"], rows),
        "options": run.config,
    }
    return Section("Provenance", "provenance", data)


def distinct(facts: Iterable[dict[str, Any]], name: str) -> list[str]:
    """Different values of a field, in order."""
    return list(dict.fromkeys(str(fact[name]) for fact in facts if name in fact))


def attempts_table(run: Run) -> Table:
    """Every start of the run and how it ended."""
    rows = [
        [
            str(number),
            f"{attempt.start['step']:,}",
            f"{attempt.end.get('step', 0):,}",
            clock(attempt.seconds),
            *(str(attempt.start.get(name, "")) for name in ("processes", "host", "commit")),
            timestamp(attempt.start.get("time", "")),
            str(attempt.end.get("reason", "")),
        ]
        for number, attempt in enumerate(attempts(run), 1)
    ]
    header = "attempt, from step, to step, time, processes, host, commit, start (UTC), end"
    return Table(header.split(", "), rows)


def nearest_recipe(run: Run) -> tuple[str | None, dict[str, tuple[Any, Any]]]:
    """The recipe of the run's architecture from which the run differs least: its name (None: there
    is none), and option -> (recipe's value, run's value)."""
    arch = run.config.get("arch")
    best: tuple[str | None, dict[str, tuple[Any, Any]]] = (None, {})
    for path in sorted((CONFIGS / run.kind).glob("*.yaml")):
        try:
            recipe = replace(KINDS[run.kind](), read_yaml(path), source=str(path))
        except InputError:  # a user's own recipe may be out of date
            continue
        values = as_read(recipe)
        if values["arch"] != arch:
            continue
        different = {
            name: (values[name], value)
            for name, value in run.config.items()
            if name in values and name not in FREE and values[name] != value
        }
        if best[0] is None or len(different) < len(best[1]):
            best = f"{run.kind}/{path.name}", different
    return best


def as_read(config: Any) -> dict[str, Any]:
    """Options as read from a config.yaml: lists instead of tuples."""
    import yaml

    return yaml.safe_load(dump_yaml(config))


def known_options(run: Run) -> dict[str, Any]:
    """The run's options that exist in this version."""
    types = option_types(KINDS[run.kind])
    return {name: value for name, value in run.config.items() if name in types}


def different_options(runs: Sequence[Run]) -> Section:
    """Options in which runs differ, one column per run."""
    rows = [
        [name, *("not set" if value is None else plain(value) for value in values)]
        for name, values in aligned([run.config for run in runs]).items()
        if any(value != values[0] for value in values) and name != "output_dir"
    ]
    header = ["option", *(run.name for run in runs)]
    return tables("Different options", Table(header, rows, prose=True))
