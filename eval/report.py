"""``report.html``: what a run reached, how it got there and where the numbers come from, in one
file.

The page loads nothing: charts are inline SVG, and a content policy forbids the network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from xcit_dino.errors import InputError
from xcit_dino.eval.charts import line_chart, number
from xcit_dino.eval.config import ReportConfig
from xcit_dino.eval.page import bar, document, facts_table, fold, table
from xcit_dino.train.config import read_yaml
from xcit_dino.train.metrics import read_metrics
from xcit_dino.train.provenance import now, read_results, write_atomic

NETWORKS = {"": "Pretrained", "random": "Random weights", "pixels": "Raw pixels"}
EVALUATIONS = {"knn": "k-NN", "linear": "Linear probe", "linear-dino": "Linear probe, augmented"}
HEADLINE_K = 20  # "20 is usually working the best" (DINO eval_knn.py)
CURVES = {  # metrics.jsonl name -> title; these first, all others folded away
    "loss": "Loss",
    "knn_top1": "k-NN top-1 during training, %",
    "kl": "KL(teacher, student), nats",
    "teacher_entropy": "Teacher entropy, nats",
    "lr": "Learning rate",
    "images_per_s": "Images per second",
}
NOT_CURVES = {"step", "epoch", "time"}


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def top1(self, evaluation: str, network: str) -> float | None:
        """Headline accuracy in percent, or None where it was not measured."""
        entry = self.results.get(f"{evaluation}/{network}" if network else evaluation)
        return None if entry is None else headline(entry["metrics"])


def run(config: ReportConfig) -> None:
    """Write the page.

    Raises:
        InputError: a folder that holds no run.
    """
    runs = [read_run(folder) for folder in config.folders]
    output = config.output or config.folders[0] / "report.html"
    write_atomic(output, page(runs))
    print(f"report: {output}", flush=True)


def read_run(folder: Path) -> Run:
    """Read a run folder; everything but the folder may be missing."""
    path = folder / "config.yaml"
    options = read_yaml(path) if path.is_file() else {}
    found = Run(folder, options, read_metrics(folder), read_results(folder))
    if not (found.config or found.metrics or found.results):
        raise InputError(f"{folder}: holds no run (no config.yaml, metrics.jsonl or results.json)")
    return found


def headline(metrics: dict[str, float]) -> float | None:
    """Top-1 of a result; of a k-NN result that of k = 20, or of its smallest k."""
    if "top1" in metrics:
        return metrics["top1"]
    by_k = {int(n.removeprefix("top1_k")): v for n, v in metrics.items() if n.startswith("top1_k")}
    return by_k.get(HEADLINE_K, by_k[min(by_k)]) if by_k else None


# -- the page --------------------------------------------------------------------------------------


def page(runs: list[Run]) -> str:
    """The whole HTML text."""
    names = " and ".join(run.name for run in runs)
    several = len(runs) > 1
    parts = [
        f"<h1>{escape(names)}</h1>",
        *(f'<p class="sub">{escape(about(run))}</p>' for run in runs),
        section("Accuracy", "".join(accuracy(run, several) for run in runs)),
        section("k-NN by number of neighbours", knn_tables(runs)),
        section("Training", curves(runs)),
        section("How it was measured", "".join(protocols(run, several) for run in runs)),
        section("Options of the run", "".join(options(run, several) for run in runs)),
        f"<footer>Written {escape(now())} by xcit-dino. This file needs no network.</footer>",
    ]
    return document(f"{names} - xcit-dino report", "".join(parts))


def section(title: str, content: str) -> str:
    """A titled part; nothing where there is no content."""
    return f"<h2>{escape(title)}</h2>{content}" if content else ""


def about(run: Run) -> str:
    """One line: architecture, data, length, last measured commit."""
    known = run.config
    facts = [
        known.get("arch"),
        f"data {known['data_path']}" if known.get("data_path") else None,
        f"{known['epochs']} epochs" if known.get("epochs") else None,
        f"{run.metrics[-1]['step']:,} steps" if run.metrics else None,
        next((f"commit {entry['commit']}" for entry in run.results.values()), None),
        str(run.folder),
    ]
    return "  ·  ".join(str(fact) for fact in facts if fact)


def accuracy(run: Run, named: bool) -> str:
    """A card for each evaluation: the pretrained backbone's accuracy, its baselines, the lift."""
    cards = []
    for evaluation, title in EVALUATIONS.items():
        top1 = {network: run.top1(evaluation, network) for network in NETWORKS}
        if top1[""] is None:
            continue
        measured = {network: value for network, value in top1.items() if value is not None}
        lifts = [
            f"{top1[''] - value:+.1f} over {NETWORKS[network].lower()}"
            for network, value in measured.items()
            if network
        ]
        beats_all = all(top1[""] > value for network, value in measured.items() if network)
        bars = "".join(bar(NETWORKS[n], value, not n) for n, value in measured.items())
        kind = f"{title}{f', k = {neighbours(run)}' if evaluation == 'knn' else ''}"
        cards.append(
            f'<div class="card"><p class="kind">{escape(f"{run.name}: " if named else "")}'
            f"{escape(kind)}, top-1</p>"
            f'<p class="headline">{top1[""]:.1f}<small> %</small></p>'
            f'<p class="lift{"" if beats_all else " none"}">'
            f"{escape(', '.join(lifts)) or '&nbsp;'}</p>{bars}</div>"
        )
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""


def neighbours(run: Run) -> int:
    """The k of the headline."""
    ks = run.results["knn"]["protocol"]["nb_knn"]
    return HEADLINE_K if HEADLINE_K in ks else min(ks)


def knn_tables(runs: list[Run]) -> str:
    """Every k of every network: top-1, with top-5 behind the slash."""
    rows, header = [], []
    for run in runs:
        for network, title in NETWORKS.items():
            entry = run.results.get(f"knn/{network}" if network else "knn")
            if entry is None:
                continue
            ks, metrics = entry["protocol"]["nb_knn"], entry["metrics"]
            header = header or ["top-1 / top-5, %", *(f"k = {k}" for k in ks)]
            name = f"{run.name}: {title}" if len(runs) > 1 else title
            cells = [f"{metrics[f'top1_k{k}']:.2f} / {metrics[f'top5_k{k}']:.2f}" for k in ks]
            rows.append([name, *cells])
    return f'<div class="card">{table(header, rows)}</div>' if rows else ""


def curves(runs: list[Run]) -> str:
    """Charts of what was logged, the telling ones open, the others folded."""
    names = list(dict.fromkeys(name for run in runs for line in run.metrics for name in line))
    numeric = [name for name in names if name not in NOT_CURVES and series(runs, name)]
    shown = [chart(runs, name) for name in CURVES if name in numeric]
    others = [chart(runs, name) for name in numeric if name not in CURVES]
    parts = []
    if len(runs) > 1 and numeric:
        labels = (
            f'<span style="--line: var(--run-{n % 6})"><i></i>{escape(run.name)}</span>'
            for n, run in enumerate(runs)
        )
        parts.append(f'<p class="legend">{"".join(labels)}</p>')
    if any(shown):
        parts.append(f'<div class="grid charts">{"".join(shown)}</div>')
    if any(others):
        parts.append(fold("All other curves", f'<div class="grid charts">{"".join(others)}</div>'))
    return "".join(parts)


def series(runs: list[Run], name: str) -> list[tuple[str, list[tuple[float, float]]]]:
    """(run's name, points over steps) of the runs that logged ``name`` as a number."""
    lines = [
        (run.name, [(line["step"], line[name]) for line in run.metrics if is_number(line, name)])
        for run in runs
    ]
    return lines if any(points for _, points in lines) else []


def is_number(line: dict[str, Any], name: str) -> bool:
    """Whether a line of metrics holds a number of this name."""
    return isinstance(line.get(name), int | float) and not isinstance(line.get(name), bool)


def chart(runs: list[Run], name: str) -> str:
    """A card with one chart."""
    figure = line_chart(CURVES.get(name, name), series(runs, name), "step")
    return f'<div class="card">{figure}</div>' if figure else ""


def protocols(run: Run, named: bool) -> str:
    """Each result with its numbers, protocol and provenance, folded."""
    folds = []
    for name, entry in run.results.items():
        metrics = {
            metric: number(entry["metrics"][metric]) for metric in by_number(entry["metrics"])
        }
        rest = {k: v for k, v in entry.items() if k not in ("metrics", "protocol", "grid")}
        top1 = headline(entry["metrics"])
        title = name if top1 is None else f"{name}: top-1 {top1:.2f} %"
        title = f"{run.name}: {title}" if named else title
        folds.append(fold(title, facts_table(metrics | entry["protocol"] | rest)))
    return f'<div class="card">{"".join(folds)}</div>' if folds else ""


def by_number(names: Iterable[str]) -> list[str]:
    """Names in the order of the numbers in them: k20 before k100."""
    return sorted(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])


def options(run: Run, named: bool) -> str:
    """The run's config.yaml, folded."""
    if not run.config:
        return ""
    title = f"{len(run.config)} options"
    folded = fold(f"{run.name}: {title}" if named else title, facts_table(run.config))
    return f'<div class="card">{folded}</div>'
