"""``xcit-dino report compare A B``: which run is better, where their protocols are the same.

Accuracies are ranked only where everything that bears on them is equal but the network itself;
otherwise the fields that differ are named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from xcit_dino.errors import InputError
from xcit_dino.eval.config import CompareConfig
from xcit_dino.report.page import plain
from xcit_dino.train.run.reader import Run, bare, headline, in_order, read_runs, title_of

# What is compared, as opposed to how it is measured: these may differ.
SUBJECT = frozenset(
    "arch weights seed start start_weights head recipe.arch recipe.seed "
    "recipe.drop_path_rate".split()
)
# A file of one network does not say whether it is a teacher or a student, but is no average of a
# finetuning's weights.
UNSAID, NOT_UNSAID = "model", "model_ema"
# What a baseline (random weights, raw pixels) has of its own.
OF_BASELINES = frozenset("network side features layers".split())
Entry = dict[str, Any]
CHECKSUM = re.compile("[0-9a-f]{32,}")
SHOWN = 60  # characters of a differing value


@dataclass(frozen=True)
class Ranking:
    """One evaluation of several runs; ``differences`` empty: they can be compared."""

    name: str
    title: str
    top1: list[float | None]
    """Percent, one a run; None where a run lacks the evaluation."""
    differences: dict[str, list[Any]]
    """Field of the protocol -> its values, one for each run that has the evaluation."""
    error: float | None
    """Standard error of a difference in points, from the number of validation images."""
    networks: tuple[str, ...] = ()
    """Which network of its file was measured in each run, where they are called differently."""

    @property
    def best(self) -> int | None:
        """Number of the best run; None where they cannot be ranked, or are equal."""
        found = [value for value in self.top1 if value is not None]
        if self.differences or len(found) < 2 or found.count(max(found)) > 1:
            return None
        return self.top1.index(max(found))

    @property
    def verdict(self) -> str:
        """In words: the best and by how much, or why there is none."""
        if self.differences:
            parts = (f"{name} {versus(values)}" for name, values in self.differences.items())
            return f"not ranked, the protocols differ: {'; '.join(parts)}"
        found = sorted((value for value in self.top1 if value is not None), reverse=True)
        if len(found) < 2:
            return "measured once"
        lead = found[0] - found[1]
        error = f" ± {self.error:.1f}" if self.error is not None else ""
        named = f" (network {versus(self.networks)})" if self.networks else ""
        return f"lead {lead:.2f}{error} points{named}" if lead else f"equal{named}"


def versus(values: Iterable[Any]) -> str:
    """``32 / 224``; a field that one protocol lacks is said so, checksums are cut short."""
    words = ("absent" if value is None else plain(value) for value in values)
    words = (w[:12] if CHECKSUM.fullmatch(w) else w for w in words)
    return " / ".join(w if len(w) <= SHOWN else f"{w[: SHOWN - 1]}…" for w in words)


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
        cells = [f"{value:.2f}" if value is not None else "-" for value in ranking.top1]
        if (best := ranking.best) is not None:
            cells[best] = f"[bold]{cells[best]}[/] best"
        table.add_row(ranking.title, *cells, ranking.verdict)
    console = Console()
    console.print(table)
    comparable = [r for r in rankings if not r.differences and r.top1.count(None) <= len(runs) - 2]
    if not comparable:
        fields = sorted({name for ranking in rankings for name in ranking.differences})
        raise InputError(
            "nothing can be ranked: "
            + (f"the protocols differ in {', '.join(fields)}" if fields else "no evaluation in two")
            + "; evaluate both alike (the same shards, options and version)"
        )


def rank(runs: Sequence[Run]) -> list[Ranking]:
    """Every evaluation that a run has, the known ones first: the newest results of one protocol
    beside each other, for each protocol that two runs share; then the newest ones that are in none
    of these."""
    names = dict.fromkeys(bare(key) for run in runs for key in in_order(run.results))
    return [ranking for name in in_order(names) for ranking in rankings_of(name, runs)]


def rankings_of(name: str, runs: Sequence[Run]) -> list[Ranking]:
    """One evaluation of several runs."""
    rows: list[list[Entry | None]] = []
    for number, run in enumerate(runs):
        for entry in run.entries(name):
            row = next((r for r in rows if not unlike(first(r), entry)), None)
            if row is None:
                rows.append(row := [None] * len(runs))
            row[number] = row[number] or entry  # the newest comes first
    shared = [row for row in rows if len(runs) - row.count(None) > 1]
    newest = [next(iter(run.entries(name)), None) for run in runs]
    if any(entry is not None and not any(entry in row for row in shared) for entry in newest):
        shared.append(newest)
    hints = differences([first(row)["protocol"] for row in shared]) if len(shared) > 1 else {}
    return [ranking_of(name, row, hints) for row in shared]


def unlike(a: Entry, b: Entry) -> dict[str, list[Any]]:
    """Fields of two results' protocols that keep them from being compared."""
    return differences([a["protocol"], b["protocol"]])


def first(row: Sequence[Entry | None]) -> Entry:
    """The first result that is there."""
    return next(entry for entry in row if entry is not None)


def ranking_of(name: str, row: Sequence[Entry | None], hints: Iterable[str]) -> Ranking:
    """Results of several runs; hints: fields that tell the protocol from others of the name."""
    there = [entry for entry in row if entry is not None]
    top1 = [None if entry is None else headline(entry["metrics"]) for entry in row]
    found = [value for value in top1 if value is not None]
    images = there[0]["protocol"].get("val_images")
    error = None
    if images and found:
        variances = [value * (100 - value) / images for value in sorted(found)[-2:]]
        error = math.sqrt(sum(variances))
    protocols = [flattened(entry["protocol"]) for entry in there]
    different = differences(protocols)
    title = title_of(name, there[0]["metrics"])
    if hints and not different:
        facts = (f"{hint} {versus([protocols[0].get(hint)])}" for hint in hints)
        title = f"{title} ({', '.join(facts)})"
    networks = tuple(str(protocol.get("network")) for protocol in protocols)
    same = len(set(networks)) == 1
    return Ranking(name, title, top1, different, error, () if same else networks)


def differences(
    protocols: Sequence[dict[str, Any]], but: frozenset[str] = frozenset()
) -> dict[str, list[Any]]:
    """Field -> values of every field of the protocols that is not the subject (or in ``but``) and
    not equal."""
    flat = [flattened(protocol) for protocol in protocols]
    names = dict.fromkeys(name for protocol in flat for name in protocol)
    values = {name: [protocol.get(name) for protocol in flat] for name in names}
    return {
        name: found
        for name, found in values.items()
        if name not in SUBJECT | but and not alike(name, found)
    }


def alike(name: str, values: Sequence[Any]) -> bool:
    """Whether the values of a field do not keep results from being compared."""
    if name != "network" or NOT_UNSAID in values:
        return all(value == values[0] for value in values)
    return len({value for value in values if value != UNSAID}) < 2


def baseline(run: Run, entry: Entry, name: str) -> Entry | None:
    """The newest result of a baseline (``knn/random``) that was measured as ``entry`` was."""
    found = run.entries(name)
    return next((b for b in found if not unlike_baseline(entry, b)), None)


def unlike_baseline(entry: Entry, other: Entry) -> dict[str, list[Any]]:
    """Fields of the protocol that keep a baseline from standing beside a result."""
    return differences([entry["protocol"], other["protocol"]], OF_BASELINES)


def flattened(protocol: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields with dots in their names."""
    flat: dict[str, Any] = {}
    for name, value in protocol.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
