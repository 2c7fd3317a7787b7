"""The report's curves, and what the training took."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from typing import Any

from xcit_dino.progress import clock
from xcit_dino.report.charts import line_chart, number
from xcit_dino.report.page import card, fold, grid, stats, table
from xcit_dino.train.run.metrics import Line
from xcit_dino.train.run.reader import Run

PANELS = {  # group -> (title, unit, metrics drawn together); what is in none is folded away
    "Learning and health": (
        ("Loss = teacher entropy + KL", "nats", ("loss", "teacher_entropy", "kl")),
        ("k-NN of the teacher, top-1", "%", ("knn_top1",)),
        ("k-NN on the other data, top-1", "%", ("knn_other_top1",)),
        ("Validation", "%", ("val_top1", "val_ema_top1")),
        ("Teacher's answers, 0 is collapse", "share", ("information", "mean_entropy")),
        ("Spread of features, 1 is even", "", ("feature_std",)),
        ("Directions that features use", "", ("effective_rank",)),
        ("Prototypes used", "share", ("prototypes_used",)),
        ("Gradient norm", "", ("grad_norm",)),
        ("Steps skipped as not finite", "share", ("skipped",)),
    ),
    "Schedule": (
        ("Learning rate", "", ("lr",)),
        ("Weight decay", "", ("weight_decay",)),
        ("Teacher momentum", "", ("momentum_teacher",)),
        ("Teacher temperature", "", ("teacher_temp",)),
    ),
    "Speed": (
        ("Throughput", "images/s", ("images_per_s",)),
        ("Waiting for data", "share of time", ("data_wait",)),
        ("Memory", "GiB", ("memory_gib",)),
    ),
}
NO_CURVES = {"step", "epoch", "time", "freeze_last_layer"}
TITLES = {
    "kl": "KL", "teacher_entropy": "teacher entropy", "mean_entropy": "entropy of their mean",
    "val_top1": "last weights", "val_ema_top1": "averaged weights",
}  # fmt: skip


def curves(runs: Sequence[Run]) -> str:
    """Charts of everything that was logged, in groups."""
    logged = dict.fromkeys(name for run in runs for line in run.metrics for name in line)
    names = [
        n for n in logged if not (n in NO_CURVES or n.startswith("alarm")) and is_curve(runs, n)
    ]
    parts = [alarms(run) for run in runs]
    known = set()
    for title, panels in PANELS.items():
        charts = [chart(runs, *panel) for panel in panels]
        known |= {name for _, _, drawn in panels for name in drawn}
        if any(charts):
            kind = "charts four" if len(panels) == 4 else "charts"
            parts.append(f"<h3>{title}</h3>{grid(map(card, filter(None, charts)), kind)}")
    others = [chart(runs, name, "", (name,)) for name in names if name not in known]
    if any(others):
        parts.append(card(fold("Other curves", grid(filter(None, others), "charts"))))
    return "".join(parts)


def alarms(run: Run) -> str:
    """Signs of collapse that were reported while the run went on."""
    items = []
    for line in run.metrics:
        for name in (name for name in line if name.startswith("alarm_")):
            kind = name.removeprefix("alarm_").replace("_", " ")
            over = "" if line[name] else " is over"
            items.append(f"{run.name}, step {line['step']:,}: {kind} collapse{over}")
    words = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f'<div class="notes bad"><p><b>Alarms</b></p><ul>{words}</ul></div>' if items else ""


def chart(runs: Sequence[Run], title: str, unit: str, names: Sequence[str]) -> str:
    """One chart: of one run several metrics, of several runs the first metric."""
    restarts = [line["step"] for run in runs for line in run.tries if line["event"] == "start"]
    from_zero = any(names == panel[2] for panel in PANELS["Speed"])
    if len(runs) > 1:
        lines = [(run.name, series(run, names[0])) for run in runs]
        if len(names) > 1:
            title = f"{title.partition(' =')[0]}: {TITLES.get(names[0], names[0])}"
        return line_chart(title, lines, "step", unit, from_zero=from_zero)
    found = [(TITLES.get(name, name), series(runs[0], name)) for name in names]
    found = [(name, points) for name, points in found if points]
    return line_chart(title, found, "step", unit, restarts, from_zero)


def series(run: Run, name: str) -> list[tuple[float, float]]:
    """Points over optimiser steps of a number that a run logged."""
    return [(line["step"], line[name]) for line in run.metrics if is_number(line.get(name))]


def is_curve(runs: Sequence[Run], name: str) -> bool:
    """Whether a run logged numbers of this name."""
    return any(series(run, name) for run in runs)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


# -- speed and cost --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """One try, from its first to its last sign of life."""

    start: Line
    end: Line
    """Of the try's end, or of the last metrics of a run that goes on."""

    @property
    def seconds(self) -> float:
        times = (self.start.get("time"), self.end.get("time"))
        if None in times:
            return 0.0
        began, ended = (datetime.fromisoformat(str(time)) for time in times)
        return max(0.0, (ended - began).total_seconds())

    @property
    def process_hours(self) -> float:
        return self.seconds * self.start.get("processes", 1) / 3600


def spans(run: Run) -> list[Span]:
    """All tries of a run."""
    found: list[Span] = []
    last = {"reason": "goes on, or was killed"} | (run.metrics[-1] if run.metrics else {})
    for line in run.tries:
        if line["event"] == "start":
            found.append(Span(line, last))
        elif found:
            found[-1] = Span(found[-1].start, line)
    return found


def cost(run: Run) -> dict[str, str]:
    """Name -> value of what the training took; empty where nothing is known."""
    facts = {}
    if speeds := [line["images_per_s"] for line in run.metrics if "images_per_s" in line]:
        facts["images a second, median"] = number(statistics.median(speeds))
        waits = [line["data_wait"] for line in run.metrics if "data_wait" in line]
        facts["time waiting for data"] = f"{100 * statistics.fmean(waits):.1f} %" if waits else ""
    if memory := [line["memory_gib"] for line in run.metrics if "memory_gib" in line]:
        facts["memory, most"] = f"{max(memory):.1f} GiB"
    if run.metrics:
        facts["steps"] = f"{run.metrics[-1]['step']:,}"
    if tries := spans(run):
        batch = tries[-1].start.get("global_batch")
        if batch and run.metrics:
            facts["images seen"] = f"{batch * run.metrics[-1]['step']:,}"
        on_gpus = bool(tries[-1].start.get("hardware", {}).get("gpus"))
        facts["training time"] = clock(sum(span.seconds for span in tries))
        hours = sum(span.process_hours for span in tries)
        facts["GPU hours" if on_gpus else "process hours (CPU)"] = f"{hours:,.2f}"
    evaluations = [entry.get("wall_seconds", 0) for entry in run.results.values()]
    if any(evaluations):
        facts["evaluations"] = clock(sum(evaluations))
    return {name: value for name, value in facts.items() if value}


def speed(runs: Sequence[Run]) -> str:
    """What the runs took, a column each."""
    facts = [cost(run) for run in runs]
    if not any(facts):
        return ""
    if len(runs) == 1:
        return stats(facts[0])
    names = dict.fromkeys(name for found in facts for name in found)
    rows = [[name, *(found.get(name, "") for found in facts)] for name in names]
    return card(table(["", *(run.name for run in runs)], rows, sort=False))
