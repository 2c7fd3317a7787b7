"""``xcit-dino report compare A B``: which run is better, where their protocols are the same.

Accuracies are ranked only where everything that affects them is equal except the network itself;
otherwise the fields that differ are listed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from xcit_dino.errors import InputError, warn
from xcit_dino.eval.config import CompareConfig
from xcit_dino.report.page import plain
from xcit_dino.train.run.reader import (
    Run,
    bare,
    headline,
    in_order,
    metric_by_k,
    read_runs,
    title_of,
)

# What is compared, as opposed to how it is measured: these may differ.
MAY_DIFFER = frozenset(
    "arch weights seed start start_weights head recipe.arch recipe.seed "
    "recipe.drop_path_rate".split()
)
# A file with one network does not record whether it is a teacher or a student, but it is never the
# weight average of a finetuning.
UNSPECIFIED, NEVER_UNSPECIFIED = "model", "model_ema"
# Fields in which another network differs by nature: raw pixels, or one of the same file. Random
# weights differ in nothing but the weights, so the layers and the architecture have to be the same.
BY_NATURE = MAY_DIFFER | frozenset("network side features layers".split())
BY_WEIGHTS = MAY_DIFFER - {"arch"} | {"network"}
Entry = dict[str, Any]
CHECKSUM = re.compile("[0-9a-f]{32,}")
LONGEST_VALUE = 60  # characters


@dataclass(frozen=True)
class Ranking:
    """One evaluation of several runs, comparable where ``differences`` is empty."""

    name: str
    title: str
    top1: list[float | None]
    """Percent, one per run; None where a run lacks the evaluation."""
    differences: dict[str, list[Any]]
    """Field of the protocol -> its values, one per run that has the evaluation."""
    error: float | None
    """Standard error of a difference in points, from the number of validation images; None where
    that is not known, or the headline is no share of images."""
    networks: tuple[str, ...] = ()
    """Which network of its file was measured in each run, where the names differ."""

    @property
    def best(self) -> int | None:
        """Index of the best run; None where they cannot be ranked, or are equal."""
        found = [value for value in self.top1 if value is not None]
        if self.differences or len(found) < 2 or found.count(max(found)) > 1:
            return None
        return self.top1.index(max(found))

    @property
    def verdict(self) -> str:
        """The lead of the best, or why there is none."""
        if self.differences:
            return f"not ranked, the protocols differ: {listed(self.differences)}"
        found = sorted((value for value in self.top1 if value is not None), reverse=True)
        if len(found) < 2:
            return "measured once"
        lead = found[0] - found[1]
        known = f"± {self.error:.1f} points" if self.error is not None else "points, ± not known"
        networks = f" (network {versus(self.networks)})" if self.networks else ""
        return f"lead {lead:.2f} {known}{networks}" if lead else f"equal{networks}"

    def cells(self, best: str, absent: str = "") -> list[str]:
        """Accuracies as text, the best one inserted into ``best`` ("{} best")."""
        cells = [absent if value is None else f"{value:.2f}" for value in self.top1]
        if self.best is not None:
            cells[self.best] = best.format(cells[self.best])
        return cells


def listed(differences: dict[str, list[Any]]) -> str:
    """``crop 32 / 224; resize 36 / 256``."""
    return "; ".join(f"{name} {versus(values)}" for name, values in differences.items())


def versus(values: Iterable[Any]) -> str:
    """``32 / 224``; None is "absent", checksums and long values are shortened."""
    texts = ("absent" if value is None else plain(value) for value in values)
    texts = (text[:12] if CHECKSUM.fullmatch(text) else text for text in texts)
    most = LONGEST_VALUE
    return " / ".join(t if len(t) <= most else f"{t[: most - 1]}…" for t in texts)


def run(config: CompareConfig) -> None:
    """Print how the runs' accuracies compare.

    Raises:
        InputError: folders without runs, or nothing that can be ranked.
    """
    from rich.console import Console
    from rich.table import Table

    if not config.runs:
        raise InputError("report compare: name two run folders or more")
    runs = read_runs(config.runs)
    rankings = rank(runs)
    table = Table(title="Top-1 accuracy, %", title_justify="left", box=None, show_edge=False)
    for column in ("evaluation", *(run.name for run in runs), "verdict"):
        table.add_column(column, overflow="fold", justify="left")
    for ranking in rankings:
        cells = ranking.cells(best="[bold]{}[/] best", absent="-")
        table.add_row(ranking.title, *cells, ranking.verdict)
    console = Console()
    console.print(table)
    for text in (text for run in runs for text in run.absent if "not readable" in text):
        warn(text)
    comparable = [r for r in rankings if not r.differences and r.top1.count(None) <= len(runs) - 2]
    if not comparable:
        fields = sorted({name for ranking in rankings for name in ranking.differences})
        raise InputError(
            "nothing can be ranked: "
            + (f"the protocols differ in {', '.join(fields)}" if fields else "no evaluation in two")
            + "; evaluate both with the same shards, options and version"
        )


def rank(runs: Sequence[Run]) -> list[Ranking]:
    """Rankings of every evaluation that a run has, the known ones first.

    One per protocol that two runs share, with the newest result of each; then one of the newest
    results that are in none of these.
    """
    names = dict.fromkeys(bare(key) for run in runs for key in in_order(run.results))
    return [ranking for name in in_order(names) for ranking in rankings_of(name, runs)]


def rankings_of(name: str, runs: Sequence[Run]) -> list[Ranking]:
    """One evaluation of several runs."""
    rows: list[list[Entry | None]] = []
    for number, run in enumerate(runs):
        for entry in run.entries(name):
            row = next((r for r in rows if not differences_of(first(r), entry)), None)
            if row is None:
                rows.append(row := [None] * len(runs))
            row[number] = row[number] or entry  # the newest comes first
    shared = [row for row in rows if len(runs) - row.count(None) > 1]
    newest = [next(iter(run.entries(name)), None) for run in runs]
    if any(entry is not None and not any(entry in row for row in shared) for entry in newest):
        shared.append(newest)
    hints = differences([first(row)["protocol"] for row in shared]) if len(shared) > 1 else {}
    return [ranking_of(name, runs, row, hints) for row in shared]


def differences_of(
    a: Entry, b: Entry, ignored: frozenset[str] = MAY_DIFFER
) -> dict[str, list[Any]]:
    """Fields of the protocol that make two results incomparable."""
    return differences([a["protocol"], b["protocol"]], ignored)


def first(row: Sequence[Entry | None]) -> Entry:
    """The first result of a row."""
    return next(entry for entry in row if entry is not None)


def ranking_of(
    name: str, runs: Sequence[Run], row: Sequence[Entry | None], hints: Iterable[str]
) -> Ranking:
    """Results of several runs; hints: fields that distinguish this protocol from other results of
    the same name."""
    measured = [entry for entry in row if entry is not None]
    top1 = [None if entry is None else headline(entry["metrics"]) for entry in row]
    found = [value for value in top1 if value is not None]
    counts = (val_images(run, entry) for run, entry in zip(runs, row, strict=True) if entry)
    images = next(filter(None, counts), None)
    error = None
    if images and found and is_share(measured[0]["metrics"]):
        variances = [value * (100 - value) / images for value in sorted(found)[-2:]]
        error = math.sqrt(sum(variances))
    protocols = [flatten(entry["protocol"]) for entry in measured]
    different = differences(protocols)
    title = title_of(name, measured[0]["metrics"])
    if hints and not different:
        facts = (f"{hint} {versus([protocols[0].get(hint)])}" for hint in hints)
        title = f"{title} ({', '.join(facts)})"
    networks = tuple(str(protocol.get("network")) for protocol in protocols)
    same = len(set(networks)) == 1
    return Ranking(name, title, top1, different, error, () if same else networks)


def val_images(run: Run, entry: Entry) -> int | None:
    """Number of validation images, if need be from another result on the same index."""
    index = entry["protocol"].get("val_index")
    same = (e for e in run.results.values() if index and e["protocol"].get("val_index") == index)
    found = (e["protocol"].get("val_images") or e.get("val_images") for e in (entry, *same))
    return next(filter(None, found), None)


def is_share(metrics: dict[str, float]) -> bool:
    """Whether the headline is a share of the images: no mAP, no R2."""
    return "top1" in metrics or metric_by_k(metrics) == "top1"


def differences(
    protocols: Sequence[dict[str, Any]], ignored: frozenset[str] = MAY_DIFFER
) -> dict[str, list[Any]]:
    """Field -> its values, of all fields that are not ignored and not equal."""
    return {
        name: values
        for name, values in aligned([flatten(protocol) for protocol in protocols]).items()
        if name not in ignored and not comparable(name, values)
    }


def comparable(name: str, values: Sequence[Any]) -> bool:
    """Whether results with these values of a field may be compared."""
    if name == "network" and NEVER_UNSPECIFIED not in values:
        values = [value for value in values if value != UNSPECIFIED]
    return all(value == values[0] for value in values)


def baseline(run: Run, entry: Entry, name: str) -> Entry | None:
    """The newest result of a baseline (``knn/random``) with the protocol of ``entry``."""
    return next((b for b in run.entries(name) if not baseline_differences(entry, b, name)), None)


def baseline_differences(entry: Entry, other: Entry, name: str) -> dict[str, list[Any]]:
    """Fields of the protocol that make a result and a baseline of that name incomparable."""
    return differences_of(entry, other, BY_WEIGHTS if name.endswith("/random") else BY_NATURE)


def flatten(protocol: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields with dots in their names."""
    flat: dict[str, Any] = {}
    for name, value in protocol.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def aligned(dicts: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Name -> its value in each dictionary, None where it is absent."""
    names = dict.fromkeys(name for each in dicts for name in each)
    return {name: [each.get(name) for each in dicts] for name in names}
