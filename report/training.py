"""The report's learning curves, and the speed and cost of training."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from markupsafe import Markup

from xcit_dino.progress import clock
from xcit_dino.report.charts import line_chart, number
from xcit_dino.report.compare import aligned
from xcit_dino.report.page import Section, Table, tables
from xcit_dino.ssl.config import HealthConfig
from xcit_dino.ssl.diagnostics import KINDS
from xcit_dino.ssl.forgetting import ADVICE, KEPT, KNN_OTHER, OTHER, Judge
from xcit_dino.train.run.metrics import Line
from xcit_dino.train.run.reader import Run

Panel = tuple[str, str, Sequence[str]]
"""Title, unit, and the metrics drawn together."""
PANELS: dict[str, tuple[Panel, ...]] = {  # metrics in no group are folded away
    "Learning and health": (
        ("Loss (of DINO: teacher entropy + KL)", "", ("loss", "teacher_entropy", "kl")),
        ("Terms of the loss", "", ("dino_loss", "distill_loss", "koleo_loss")),
        ("k-NN of the teacher, top-1", "%", ("knn_top1", "knn_frozen_top1")),
        ("k-NN on the other data, top-1", "%", ("knn_other_top1",)),
        ("Neighbors kept since the start", "share", ("neighbors_kept", "neighbors_kept_other")),
        ("Features: CKA with the start", "", ("feature_cka", "feature_cka_other")),
        ("Validation", "%", ("val_top1", "val_ema_top1")),
        ("Teacher outputs, 0 is collapse", "share", ("information", "mean_entropy")),
        ("Feature std, 1 is uniform", "", ("feature_std",)),
        ("Effective rank of the features", "", ("effective_rank",)),
        ("Prototypes used", "share", ("prototypes_used",)),
        ("Gradient norm", "", ("grad_norm",)),
        ("Skipped steps (non-finite)", "share", ("skipped",)),
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
MEASURED = {KEPT, KEPT + OTHER, KNN_OTHER}  # of forgetting
NO_CURVES = {"step", "epoch", "time", "freeze_last_layer", "freeze_backbone"}
TITLES = {
    "kl": "KL", "teacher_entropy": "teacher entropy", "mean_entropy": "entropy of the mean",
    "knn_top1": "this run", "knn_frozen_top1": "frozen teacher",
    "dino_loss": "DINO", "distill_loss": "distillation", "koleo_loss": "KoLeo",
    "val_top1": "last weights", "val_ema_top1": "averaged weights",
}  # fmt: skip


def curves(runs: Sequence[Run]) -> Section:
    """Charts of everything that was logged, in groups."""
    groups = {title: charts(runs, panels) for title, panels in PANELS.items()}
    grouped = {name for panels in PANELS.values() for _, _, names in panels for name in names}
    logged = dict.fromkeys(name for run in runs for line in run.metrics for name in line)
    others = [
        (name, "", (name,))
        for name in logged
        if name not in NO_CURVES | grouped and not name.startswith("alarm")
    ]
    data = {
        "alarms": [
            f"{run.name}, {sentence}" if len(runs) > 1 else sentence
            for run in runs
            for sentence in (*collapses(run), *forgotten(run))
        ],
        "groups": {title: found for title, found in groups.items() if found},
        "other_curves": charts(runs, others),
    }
    restarts = len(runs) == 1 and len(attempts(runs[0])) > 1
    about = "Dotted vertical lines are restarts." if restarts else ""
    return Section("Training", "training", data if any(data.values()) else {}, about)


def collapses(run: Run) -> list[str]:
    """Alarms that were logged during training, and what to change."""
    found = []
    for line in run.metrics:
        for kind in KINDS:
            if (on := line.get(f"alarm_{kind.name.replace(' ', '_')}")) is not None:
                text = f"step {line['step']:,}: {kind.name} collapse"
                found.append(f"{text}. Change: {kind.advice}" if on else f"{text} is over")
    return found


def forgotten(run: Run) -> list[str]:
    """When less of the starting weights was preserved than ``--forgetting_threshold``, and what to
    change."""
    threshold = run.config.get("forgetting_threshold", HealthConfig.forgetting_threshold)
    judge = Judge("warn", threshold)
    found, before = [], ""
    for line in run.metrics:
        if not MEASURED & line.keys():
            continue
        lost = judge.lost(line["step"], line)
        if lost and not before:
            text = "the starting weights are being forgotten"
            found.append(f"step {line['step']:,}: {text}: {lost}. {ADVICE.capitalize()}")
        elif before and not lost:
            found.append(
                f"step {line['step']:,}: enough of the starting weights is preserved again"
            )
        before = lost
    return found


def charts(runs: Sequence[Run], panels: Iterable[Panel]) -> list[Markup]:
    """The charts of a group that have points."""
    return [found for panel in panels if (found := chart(runs, *panel))]


def chart(runs: Sequence[Run], title: str, unit: str, names: Sequence[str]) -> Markup:
    """One chart: several metrics of one run, or the first metric of several runs."""
    restarts = [line["step"] for run in runs for line in starts(run)]
    from_zero = any(names == panel[2] for panel in PANELS["Speed"])
    if len(runs) > 1:
        lines = [(run.name, series(run, names[0])) for run in runs]
        if len(names) > 1:
            title = f"{title.partition(' (')[0]}: {TITLES.get(names[0], names[0])}"
        return line_chart(title, lines, "step", unit, from_zero=from_zero)
    found = [(TITLES.get(name, name), series(runs[0], name)) for name in names]
    found = [(name, points) for name, points in found if points]
    if len(found) < len(names):
        title = title.partition(" (")[0]
    return line_chart(title, found, "step", unit, restarts, from_zero)


def series(run: Run, name: str) -> list[tuple[float, float]]:
    """(step, value) of a metric."""
    points = [(line["step"], line[name]) for line in run.metrics if is_number(line.get(name))]
    if name.startswith("knn_frozen") and points:  # measured once, and the same ever after
        points.append((run.metrics[-1]["step"], points[0][1]))
    return points


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


# -- speed and cost --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """From one start of the training to its end, or to its last line of metrics."""

    start: Line
    end: Line

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


def starts(run: Run) -> list[Line]:
    """What was logged at each start."""
    return [line for line in run.tries if line["event"] == "start"]


def attempts(run: Run) -> list[Attempt]:
    """All attempts of a run; the last one may not have ended yet."""
    found: list[Attempt] = []
    last = {"reason": run.activity.text} | (run.metrics[-1] if run.metrics else {})
    for line in run.tries:
        if line["event"] == "start":
            found.append(Attempt(line, last))
        elif found:
            found[-1] = Attempt(found[-1].start, line)
    return found


def last_step(run: Run) -> int:
    """The last step that was logged, or at which an attempt ended."""
    logged = run.metrics[-1]["step"] if run.metrics else 0
    return max([logged, *(attempt.end.get("step", 0) for attempt in attempts(run))])


def cost(run: Run) -> dict[str, str]:
    """Name -> value; empty where nothing was logged."""
    facts = {}
    if speeds := [line["images_per_s"] for line in run.metrics if "images_per_s" in line]:
        facts["images per second, median"] = number(statistics.median(speeds))
        waits = [line["data_wait"] for line in run.metrics if "data_wait" in line]
        facts["time waiting for data"] = f"{100 * statistics.fmean(waits):.1f} %" if waits else ""
    if memory := [line["memory_gib"] for line in run.metrics if "memory_gib" in line]:
        facts["memory, peak"] = f"{max(memory):.1f} GiB"
    if steps := last_step(run):
        facts["steps"] = f"{steps:,}"
    if found := attempts(run):
        if batch := found[-1].start.get("global_batch"):
            facts["images seen"] = f"{batch * steps:,}"
        on_gpus = bool(found[-1].start.get("hardware", {}).get("gpus"))
        facts["training time"] = clock(sum(attempt.seconds for attempt in found))
        hours = sum(attempt.process_hours for attempt in found)
        facts["GPU hours" if on_gpus else "process hours (CPU)"] = f"{hours:,.2f}"
    evaluations = [entry.get("wall_seconds", 0) for entry in run.results.values()]
    if any(evaluations):
        facts["evaluations"] = clock(sum(evaluations))
    return {name: value for name, value in facts.items() if value}


def speed(runs: Sequence[Run]) -> Section:
    """Speed and cost of the runs, one column each."""
    title, facts = "Speed and cost", [cost(run) for run in runs]
    if len(runs) == 1:
        return Section(title, "stats", facts[0])
    rows = [[name, *(value or "" for value in row)] for name, row in aligned(facts).items()]
    return tables(title, Table(["", *(run.name for run in runs)], rows, sortable=False))
