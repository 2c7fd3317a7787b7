"""The report's provenance: code, recipe, versions, hardware, data, every restart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xcit_dino.errors import InputError
from xcit_dino.progress import clock
from xcit_dino.report.page import card, facts_table, fold, moment, plain, table
from xcit_dino.report.training import spans
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.supervised.config import DistillConfig, FinetuneConfig
from xcit_dino.train.config import CONFIGS, dump_yaml, option_types, read_yaml, replace
from xcit_dino.train.run.folder import FREE
from xcit_dino.train.run.reader import Run

KINDS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "distill": DistillConfig}


def origin(run: Run) -> str:
    """Where the run's numbers come from."""
    measured = [line for line in run.tries if line["event"] == "start"]
    measured += list(run.results.values())
    commits = dict.fromkeys(str(fact["commit"]) for fact in measured if "commit" in fact)
    newest = max(measured, key=lambda fact: str(fact.get("time", "")), default={})
    protocols = [entry["protocol"] for entry in run.results.values()]
    facts: dict[str, Any] = {"folder": str(run.folder), "commit": list(commits)}
    for split in ("train", "val"):
        sums = dict.fromkeys(p[f"{split}_index"] for p in protocols if f"{split}_index" in p)
        facts[f"data, {split}: SHA-256 of the index"] = list(sums)
    facts["data"] = run.config.get("data_path")
    facts |= {name: newest.get(name) for name in ("versions", "hardware")}
    known = {name: value for name, value in facts.items() if value}
    return card(facts_table(known) + restarts(run) + recipe_table(run)) + options(run)


def restarts(run: Run) -> str:
    """Every try of the run."""
    rows = [
        [
            str(number), f"{span.start['step']:,}", f"{span.end.get('step', 0):,}",
            clock(span.seconds), str(span.start.get("processes", "")),
            str(span.start.get("host", "")), str(span.start.get("commit", "")),
            moment(span.start.get("time", "")),
            str(span.end.get("reason", "")),
        ]
        for number, span in enumerate(spans(run), 1)
    ]  # fmt: skip
    header = ["try", "from step", "to step", "time", "processes", "host", "commit",
              "began (UTC)", "end"]  # fmt: skip
    return f"<h3>Starts and restarts</h3>{table(header, rows)}" if rows else ""


def recipe_table(run: Run) -> str:
    """Options that differ from those of the nearest recipe."""
    if not run.config:
        return ""
    recipe, different = nearest_recipe(run)
    if recipe is None:
        return "<h3>Options beside the recipe</h3><p>There is no recipe for this model.</p>"
    title = f"<h3>Options beside the recipe {plain(recipe)}</h3>"
    rows = [[name, plain(theirs), plain(ours)] for name, (theirs, ours) in different.items()]
    if not rows:
        return f"{title}<p>None differs.</p>"
    return f'{title}<div class="texts">{table(["option", "recipe", "this run"], rows)}</div>'


def nearest_recipe(run: Run) -> tuple[str | None, dict[str, tuple[Any, Any]]]:
    """(name, option -> (recipe's, run's value)) of the recipe for the run's architecture that
    differs least."""
    arch = run.config.get("arch")
    best: tuple[str | None, dict[str, tuple[Any, Any]]] = (None, {})
    for path in sorted((CONFIGS / run.kind).glob("*.yaml")):
        try:
            recipe = replace(KINDS[run.kind](), read_yaml(path), source=str(path))
        except InputError:  # a recipe of the user's own making may be out of date
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
    """Options as a config.yaml gives them: lists instead of tuples."""
    import yaml

    return yaml.safe_load(dump_yaml(config))


def known_options(run: Run) -> dict[str, Any]:
    """The run's options that this version knows."""
    types = option_types(KINDS[run.kind])
    return {name: value for name, value in run.config.items() if name in types}


def options(run: Run) -> str:
    """The run's config.yaml, folded."""
    if not run.config:
        return ""
    return card(fold(f"All {len(run.config)} options", facts_table(run.config)))


def different_options(runs: Sequence[Run]) -> str:
    """Options in which runs differ, a column each."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    rows = [
        [name, *(plain(run.config[name]) if name in run.config else "absent" for run in runs)]
        for name in names
        if any(run.config.get(name) != runs[0].config.get(name) for run in runs)
    ]
    return card(table(["option", *(run.name for run in runs)], rows), "texts")
