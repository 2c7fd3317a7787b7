"""The report's accuracies: headlines, published numbers beside them, every result, side by side."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from xcit_dino.report import baselines, compare
from xcit_dino.report.charts import number
from xcit_dino.report.page import Section, Table, plain, sentence, tables, timestamp
from xcit_dino.report.published import differences_from_published, published
from xcit_dino.train.run.metrics import Line
from xcit_dino.train.run.reader import (
    EVALUATIONS,
    HEADLINES,
    NETWORKS,
    TRAINED,
    Run,
    bare,
    headline,
    headline_k,
    in_order,
    ks_of,
    metric_by_k,
    title_of,
)

FURTHER = {  # metrics beside the headline, in percent
    "macro_f1": "macro F1", "auroc": "AUROC", "ap50": "AP50", "mask_ap": "mask AP",
    "mask_ap50": "mask AP50", "pixel_accuracy": "pixels", "mean_accuracy": "mean of classes",
    "j_mean": "J", "f_mean": "F", "map_easy": "mAP Easy", "map_hard": "mAP Hard",
    "recall_1": "recall at 1",
}  # fmt: skip
PLUS_MINUS = "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"
UNBROKEN = str.maketrans(" -", "\N{NO-BREAK SPACE}\N{NON-BREAKING HYPHEN}")
WITH_BASELINES = (
    "knn", "linear", "linear-dino", "knn-few", "linear-few", "masks", "retrieve", "propagate",
)  # fmt: skip
HELD_OUT = "held-out training images"
RANKED = (
    "Top-1 accuracy, or what the first column names. Runs are ranked only where their protocols "
    "are equal, field by field; ± is one standard error from the number of validation images."
)


@dataclass(frozen=True)
class Headline:
    """The newest result of one evaluation."""

    title: str
    top1: float
    bars: dict[str, float]
    """Network -> top-1 in percent by the same protocol; the first is this result."""
    lifts: list[str]
    """Its lead over each baseline."""
    notes: list[str]

    @property
    def best(self) -> bool:
        """Whether it is better than baselines and other networks."""
        _, *others = self.bars.values()
        return bool(self.lifts) and all(self.top1 > value for value in others)


def headlines(run: Run) -> Section:
    """A card per evaluation: accuracy, lead over baselines, protocol."""
    found = [headline_of(run, *result) for result in newest_results(run)]
    return Section("Accuracy", "headlines", found)


def is_it_good(run: Run) -> Section:
    """The newest accuracies beside random weights, raw pixels, the start and the teacher."""
    lines = [line for result in newest_results(run) if (line := judged(run, *result))]
    return Section("Is it good?", "verdict", {"lines": lines + since_start(run)} if lines else {})


def judged(run: Run, evaluation: str, entry: dict[str, Any], top1: float) -> tuple[str, str] | None:
    """(verdict, numbers) of a result beside its baselines; None for evaluations without any."""
    if evaluation not in ("knn", "linear"):
        return None
    title = f"{title_of(evaluation, entry['metrics'])}: {top1:.1f} %"
    others, lacking, notes = dict[str, float](), list[str](), list[str]()
    for network in ("random", "pixels"):
        name, words = f"{evaluation}/{network}", NETWORKS[network].lower()
        same = compare.baseline(run, entry, name)
        if same is not None and (value := headline(same["metrics"])) is not None:
            others[words] = value
            continue
        lacking.append(words)
        notes += [sentence(f"{words}: {other_protocol(entry, other, name)}")
                  for other in run.entries(name)[:1]]  # fmt: skip
    if lacking:
        command = baselines.command(run, evaluation, entry)
        notes.insert(0, f"Not compared with {' and '.join(lacking)}; {command} does it.")
    if not others:
        return f"{title}.", " ".join(notes)
    images = compare.val_images(run, entry) if compare.is_share(entry["metrics"]) else None
    margins = {name: margin(top1, value, images) for name, value in others.items()}
    better = [name for name, value in others.items() if top1 - value > margins[name]]
    worse = [name for name, value in others.items() if value - top1 > margins[name]]
    rest = [name for name in others if name not in better + worse]
    above, same, below = ("better than", "not clearly better than", "worse than")
    if not images:
        above, same, below = ("higher than", "equal to", "lower than")
    words = [f"{above} {' and '.join(better)}"] if better else []
    words += [f"{same} {' or '.join(rest)}"] if rest else []
    words += [f"{below} {' and '.join(worse)}"] if worse else []
    word = ", but ".join(words)
    numbers = ", ".join(f"{name} {value:.1f} %" for name, value in others.items())
    widest = max(margins.values())
    error = f" Differences below {widest:.1f} points may be chance." if images and widest else ""
    error = error if images else " Which differences may be chance is not known."
    return f"{title}, {word}.", " ".join([sentence(numbers) + error, *notes])


def other_protocol(entry: dict[str, Any], other: dict[str, Any], name: str) -> str:
    """Why a result is not compared with a baseline of that name."""
    fields = compare.listed(compare.baseline_differences(entry, other, name))
    return f"measured by another protocol ({fields})"


def margin(one: float, other: float, images: int | None) -> float:
    """Two standard errors of the difference of two accuracies in percent; 0 if the number of images
    is not known."""
    variance = one * (100 - one) + other * (100 - other)
    return 2 * math.sqrt(variance / images) if images else 0.0


def since_start(run: Run) -> list[tuple[str, str]]:
    """The last k-NN of pretraining beside the starting weights and the frozen teacher."""
    found = measured_in_training(run)
    if len(found) < 2:
        return []
    parts = [f"{title} {line[f'{name}_top1']:.1f} %" for title, name, line in found[1:]]
    top1, step = (found[0][2][name] for name in ("knn_top1", "step"))
    return [(f"During training, k-NN: {top1:.1f} % at step {step:,}.", sentence("; ".join(parts)))]


def newest_results(run: Run) -> list[tuple[str, dict[str, Any], float]]:
    """(evaluation, newest entry, top-1 in percent) of each evaluation that was made."""
    found = ((name, run.entry(name), run.top1(name)) for name in EVALUATIONS)
    return [(name, entry, top1) for name, entry, top1 in found if entry and top1 is not None]


def headline_of(run: Run, evaluation: str, entry: dict[str, Any], top1: float) -> Headline:
    """A result beside the baselines and other networks that were measured by its protocol."""
    networks = NETWORKS if evaluation in WITH_BASELINES else TRAINED
    averaged = networks is TRAINED and entry["protocol"].get("network") == "model_ema"
    own = networks["ema" if averaged else ""]
    bars, lifts, notes = {own: top1}, [], []
    for network, title in networks.items():
        name = f"{evaluation}/{network}"
        if not network or title == own or not (others := run.entries(name)):
            continue
        same = compare.baseline(run, entry, name)
        if same is None:
            notes.append(f"{title}: {other_protocol(entry, others[0], name)}")
        elif (value := headline(same["metrics"])) is not None:
            bars[title] = value
            if network in ("random", "pixels", "copy"):
                lifts.append(f"{round(top1, 1) - round(value, 1):+.1f} over {title.lower()}")
    notes.append(protocol_summary(run, entry))
    title = title_in_full(evaluation, entry)
    name = headline_name(entry["metrics"])
    title += "" if title.endswith(name) else f", {name}"
    return Headline(title, top1, bars, lifts, notes)


def title_in_full(name: str, entry: dict[str, Any]) -> str:
    """The title of a result; of few labels with their number: ``Linear probe, 10 labels a
    class``."""
    labels = entry["protocol"].get("labels_per_class", "few")
    words = f"{labels} label{'' if labels == 1 else 's'} a class"
    return title_of(name, entry["metrics"]).replace("few labels", words)


def spread(metrics: dict[str, float]) -> float | None:
    """Standard deviation of the headline over the draws of few labels."""
    return metrics.get(f"top1_k{headline_k(metrics)}_std" if ks_of(metrics) else "top1_std")


def protocol_summary(run: Run, entry: dict[str, Any]) -> str:
    """The protocol in one line."""
    protocol, deviation = entry["protocol"], spread(entry["metrics"])
    images, layers = compare.val_images(run, entry), protocol.get("layers")
    many = isinstance(layers, list) and len(layers) > 1
    facts = [
        f"mean of {protocol['draws']} draws ± {deviation:.1f} (their standard deviation)"
        if deviation is not None
        else None,
        f"the {protocol['network']}" if protocol.get("network") else None,
        f"{protocol['initial_share']:.0%} of it still the weights before the first step"
        if "initial_share" in protocol
        else None,
        f"T = {protocol['temperature']}" if "temperature" in protocol else None,
        f"{protocol['epochs']} epochs" if "epochs" in protocol else None,
        f"layers {plain(layers)}" if layers else None,
        f"lr {entry['chosen']['lr']:g}"
        + (f" and layers {entry['chosen'].get('layers')}" if many else "")
        + f" chosen on {protocol.get('chosen_on', HELD_OUT)}"
        if "chosen" in entry
        else None,
        f"start {protocol['start']}" if "start" in protocol else None,
        f"resize {protocol.get('resize')}, crop {protocol['crop']}" if "crop" in protocol else None,
        f"{images:,} validation images" if images else None,
        f"{protocol['videos']} videos, {protocol['objects']} objects"
        if "videos" in protocol
        else None,
        protocol.get("precision"),
    ]
    return "  ·  ".join(str(fact) for fact in facts if fact)


def beside_published(run: Run) -> Section:
    """Published numbers of the same model, and how the protocols differ."""
    title = "Compared with published numbers"
    arch, rows = str(run.config.get("arch", "")), []
    for evaluation, entry, top1 in newest_results(run):
        protocol = entry["protocol"]
        arch = protocol.get("arch", arch)
        fields = differences_from_published(evaluation, protocol, compare.val_images(run, entry))
        rows += [
            [
                title_of(evaluation, entry["metrics"]), f"{top1:.1f}", f"{other.top1:.1f}",
                f"{other.what} ({other.source})", "; ".join(fields) or "same as published",
            ]
            for other in published(arch, evaluation, protocol.get("collection", ""))
        ]  # fmt: skip
    if not rows:
        sentence = f"No number was published for {arch or 'this model'} in these evaluations."
        return Section(title, "tables", sentence if run.results else "")
    named = " or as named" if any(", on " in row[3] for row in rows) else ""
    header = ["evaluation", "ours", "published", f"of, on ImageNet-1k{named}", "how ours differs"]
    return tables(title, Table(header, rows, sortable=False, prose=True))


def all_results(run: Run) -> Section:
    """Every entry of the results, and every k of k-NN."""
    rows = []
    for name, entry in ordered(run.results):
        metrics = entry["metrics"]
        top1, std = headline(metrics), spread(metrics)
        deviation = "" if std is None else f"{PLUS_MINUS}{std:.2f}"
        rows.append([
            title_in_full(name, entry),
            "" if top1 is None else f"{top1:.2f}{deviation}",
            further(metrics),
            f"{entry['wall_seconds']:,.1f}" if "wall_seconds" in entry else "",
            str(entry["protocol"].get("weights") or entry["protocol"].get("network", "")),
            timestamp(entry.get("time", "")),
            differences_within_name(run, name),
        ])  # fmt: skip
    measures = dict.fromkeys(headline_name(entry["metrics"]) for entry in run.results.values())
    header = ["result", f"{' or '.join(measures)}, %", "further, %", "seconds", "weights"]
    header += ["time (UTC)", "differs in"]
    filled = [column for column in range(len(header)) if any(row[column] for row in rows)]
    header, rows = [header[c] for c in filled], [[row[c] for c in filled] for row in rows]
    about = "Click a column's name to sort by it."
    return tables("All results", Table(header, rows), knn_table([run]), about=about)


def further(metrics: dict[str, float]) -> str:
    """Metrics beside the headline: top-5 where there are so many classes, else the others:
    ``"AP50 61.20, mask AP 38.10"``."""
    top5 = f"top5_k{headline_k(metrics)}" if ks_of(metrics) else "top5"
    named = {top5: "top-5"} if top5 in metrics else FURTHER
    found = [f"{text} {metrics[name]:.2f}" for name, text in named.items() if name in metrics]
    return ", ".join(one.translate(UNBROKEN) for one in found)


def differences_within_name(run: Run, key: str) -> str:
    """Fields of an older result's protocol that differ from the newest result of its name; of the
    newest those in which an older one differs."""
    entry, newest = run.results[key], run.results.get(bare(key), run.results[key])
    others = run.entries(key) if entry is newest else [newest]
    fields = compare.aligned([compare.flatten(e["protocol"]) for e in (entry, *others)])
    return "; ".join(
        f"{name} {compare.versus([own])}"
        for name, (own, *values) in fields.items()
        if any(value != own for value in values)
    )


def beside_start(run: Run) -> Section:
    """The k-NN of the run beside that of its frozen teacher and of the weights it began with."""
    named = measured_in_training(run)
    rows = [
        [title, *(f"{line.get(f'{name}_{top}', 0.0):.2f}" for top in ("top1", "top5"))]
        + [f"{line['step']:,}" if name == "knn" else ""]
        for title, name, line in named
    ]
    header = ["k-NN, k = 20", "top-1, %", "top-5, %", "step"]
    about = "Measured during pretraining on the same images, by the same protocol."
    return tables(
        "Beside the teacher and the starting weights",
        Table(header, rows if len(rows) > 1 else [], sortable=False),
        about=about,
    )


def measured_in_training(run: Run) -> list[tuple[str, str, Line]]:
    """(network, prefix of its metrics, line of the log) of this run, if k-NN was measured while it
    trained, of its starting weights and of its frozen teacher."""
    teacher = run.config.get("teacher_model") or "teacher"
    measured = [line for line in run.metrics if "knn_top1" in line]
    if not measured:
        return []
    named = [("this run", "knn", measured[-1])]
    named += [("starting weights", "knn", line) for line in measured[:1] if not line["step"]]
    frozen = [line for line in run.metrics if "knn_frozen_top1" in line]
    return named + [(f"frozen teacher: {teacher}", "knn_frozen", line) for line in frozen[:1]]


def knn_by_k(runs: Sequence[Run]) -> Section:
    """k-NN accuracies of several runs."""
    return tables("k-NN by number of neighbors", knn_table(runs))


def knn_table(runs: Sequence[Run]) -> Table:
    """Every k of every network: top-1, with top-5 after the slash, or mAP or R2."""
    columns = sorted({k for r in runs for e in r.results.values() for k in ks_of(e["metrics"])})
    rows, names = [], dict[str, None]()
    for run in runs:
        for name, entry in ordered(run.results):
            metrics = entry["metrics"]
            if not (ks := ks_of(metrics)):
                continue
            evaluation, _, network = bare(name).partition("/")
            title = f"{run.name}: " if len(runs) > 1 else ""
            title += NETWORKS.get(network, network)
            title += title_in_full(evaluation, entry).removeprefix("k-NN").partition(", k =")[0]
            if fields := differences_within_name(run, name):
                title += f" ({fields})"
            shown = [metric_by_k(metrics)] + ["top5"] * (f"top5_k{ks[0]}" in metrics)
            cells = [" / ".join(f"{metrics[f'{name}_k{k}']:.2f}" for name in shown) for k in ks]
            found = dict(zip(ks, cells, strict=True))
            rows.append([title, *(found.get(k, "") for k in columns)])
            names[" / ".join((headline_name(metrics), "top-5")[: len(shown)])] = None
    return Table([f"k-NN, {', '.join(names)}, %", *(f"k = {k}" for k in columns)], rows)


def ordered(results: dict[str, Any]) -> list[tuple[str, Any]]:
    """Results with the known evaluations first."""
    return [(name, results[name]) for name in in_order(results)]


def side_by_side(runs: Sequence[Run]) -> Section:
    """Accuracies of several runs, ranked only where the protocols are equal."""
    rows = [[r.title, *r.cells(best="★ {}"), r.verdict] for r in compare.rank(runs)]
    header = ["top-1, %", *(run.name for run in runs), "verdict"]
    return tables("Side by side", Table(header, rows, prose=True), about=RANKED)


def protocols(run: Run) -> Section:
    """Each result with its numbers, protocol and provenance, folded."""
    folds = {}
    for name, entry in ordered(run.results):
        metrics = {m: number(entry["metrics"][m]) for m in by_number(entry["metrics"])}
        rest = {k: v for k, v in entry.items() if k not in ("metrics", "protocol", "grid")}
        top1 = headline(entry["metrics"])
        label = headline_name(entry["metrics"])
        title = name if top1 is None else f"{name}: {label} {top1:.2f} %"
        folds[title] = metrics | entry["protocol"] | rest
    about = "Everything that two accuracies must share to be comparable."
    return Section("Protocols", "protocols", folds, about)


def headline_name(metrics: dict[str, float]) -> str:
    """What the headline of a result is called."""
    by_k = HEADLINES.get(metric_by_k(metrics), "top-1")
    return next((text for name, text in HEADLINES.items() if name in metrics), by_k)


def by_number(names: Iterable[str]) -> list[str]:
    """Names in the order of the numbers in them: k20 before k100."""
    return sorted(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
