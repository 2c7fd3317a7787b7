"""The report's accuracies: headlines, published numbers beside them, every result, side by side."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from xcit_dino.report import compare
from xcit_dino.report.charts import number
from xcit_dino.report.page import bar, card, facts_table, fold, grid, moment, table
from xcit_dino.report.published import published, unlike
from xcit_dino.train.run.reader import (
    EVALUATIONS,
    NETWORKS,
    TRAINED,
    Run,
    bare,
    headline,
    in_order,
    ks_of,
    title_of,
)


def headlines(run: Run) -> str:
    """A card for each evaluation: accuracy, what it is better than, protocol."""
    return grid(headline_card(run, evaluation) for evaluation in EVALUATIONS)


def headline_card(run: Run, evaluation: str) -> str:
    """The newest result of one evaluation, beside what was measured by the same protocol; '' where
    it was not made."""
    entry = run.entry(evaluation)
    top1 = run.top1(evaluation)
    if entry is None or top1 is None:
        return ""
    names = NETWORKS if evaluation in ("knn", "linear", "linear-dino") else TRAINED
    measured, unlike = beside(run, evaluation, entry, names)
    lifts = [
        f"{round(top1, 1) - round(value, 1):+.1f} over {names[network].lower()}"
        for network, value in measured.items()
        if network in ("random", "pixels")
    ]
    beaten = all(top1 > value for network, value in measured.items() if network != "")
    bars = "".join(bar(names[n], value, not n) for n, value in measured.items())
    words = "".join(f'<p class="how">{escape(w)}</p>' for w in (*unlike, in_short(run, entry)))
    return card(
        f'<p class="kind">{escape(title_of(evaluation, entry["metrics"]))}, top-1</p>'
        f'<p class="headline">{top1:.1f}<small> %</small></p>'
        f'<p class="lift{"" if lifts and beaten else " none"}">'
        f"{escape(', '.join(lifts)) or '&nbsp;'}</p>{bars}{words}"
    )


def beside(
    run: Run, evaluation: str, entry: dict[str, Any], names: dict[str, str]
) -> tuple[dict[str, float], list[str]]:
    """(network -> top-1 of those measured by the same protocol, a sentence for each of the
    others)."""
    measured, unlike = {}, []
    for network, title in names.items():
        name = f"{evaluation}/{network}"
        other = compare.baseline(run, entry, name) if network else entry
        if other is not None:
            measured[network] = headline(other["metrics"])
        elif others := run.entries(name):
            fields = compare.unlike_baseline(entry, others[0])
            words = (f"{field} {compare.versus(values)}" for field, values in fields.items())
            unlike.append(f"{title}: measured by another protocol ({'; '.join(words)})")
    return {network: value for network, value in measured.items() if value is not None}, unlike


def in_short(run: Run, entry: dict[str, Any]) -> str:
    """The protocol in a line."""
    protocol = entry["protocol"]
    images = val_images(run, entry)
    facts = [
        f"the {protocol['network']}" if protocol.get("network") else None,
        f"T = {protocol['temperature']}" if "temperature" in protocol else None,
        f"{protocol['epochs']} epochs" if "epochs" in protocol else None,
        f"lr {entry['chosen']['lr']:g} chosen on held-out training images"
        if "chosen" in entry
        else None,
        f"start {protocol['start']}" if "start" in protocol else None,
        f"resize {protocol.get('resize')}, crop {protocol['crop']}" if "crop" in protocol else None,
        f"{images:,} validation images" if images else None,
        protocol.get("precision"),
    ]
    return "  ·  ".join(str(fact) for fact in facts if fact)


def val_images(run: Run, entry: dict[str, Any]) -> int | None:
    """How many images an accuracy rests on; another result on the same index may say it."""
    index = entry["protocol"].get("val_index")
    same = (e["protocol"] for e in run.results.values() if e["protocol"].get("val_index") == index)
    found = (protocol.get("val_images") for protocol in (entry["protocol"], *same))
    return next((count for count in found if count), None)


def beside_published(run: Run) -> str:
    """Published numbers of the same model, and what keeps them from being compared with ours."""
    arch, rows = str(run.config.get("arch", "")), []
    for evaluation in EVALUATIONS:
        entry, top1 = run.entry(evaluation), run.top1(evaluation)
        if entry is None or top1 is None:
            continue
        arch = entry["protocol"].get("arch", arch)
        words = unlike(evaluation, entry["protocol"], val_images(run, entry))
        rows += [
            [
                title_of(evaluation, entry["metrics"]), f"{top1:.1f}", f"{other.top1:.1f}",
                f"{other.what} ({other.source})", "; ".join(words) or "like the published",
            ]
            for other in published(arch, evaluation)
        ]  # fmt: skip
    if not rows:
        sentence = f"No number was published for {arch or 'this model'} in these evaluations."
        return f'<p class="about">{escape(sentence)}</p>' if run.results else ""
    header = ["evaluation", "ours", "published", "of, on ImageNet-1k", "how ours differs"]
    return card(table(header, rows, sort=False), "texts")


def all_results(run: Run) -> str:
    """Every entry of the results, and every k of k-NN."""
    rows = []
    for name, entry in ordered(run.results):
        metrics = entry["metrics"]
        top1, top5 = headline(metrics), metrics.get("top5")
        if ks := ks_of(metrics):
            top5 = metrics.get(f"top5_k{20 if 20 in ks else ks[0]}")
        rows.append([
            title_of(name, metrics),
            "" if top1 is None else f"{top1:.2f}",
            "" if top5 is None else f"{top5:.2f}",
            f"{entry['wall_seconds']:,.1f}" if "wall_seconds" in entry else "",
            str(entry["protocol"].get("weights") or entry["protocol"].get("network", "")),
            moment(entry.get("time", "")),
            unlike_newest(run, name),
        ])  # fmt: skip
    header = ["result", "top-1, %", "top-5, %", "seconds", "weights", "time (UTC)", "differs in"]
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return card(table(header, rows))


def unlike_newest(run: Run, key: str) -> str:
    """How an older result's protocol differs from that of the newest of its name."""
    newest = run.results.get(bare(key), run.results[key])
    ours, theirs = (compare.flattened(e["protocol"]) for e in (run.results[key], newest))
    names = [n for n in dict.fromkeys([*ours, *theirs]) if ours.get(n) != theirs.get(n)]
    return "; ".join(f"{name} {compare.versus([ours.get(name)])}" for name in names)


def knn_table(runs: Sequence[Run]) -> str:
    """Every k of every network: top-1, with top-5 behind the slash."""
    rows, every = (
        [],
        sorted({k for r in runs for e in r.results.values() for k in ks_of(e["metrics"])}),
    )
    for run in runs:
        for name, entry in ordered(run.results):
            metrics = entry["metrics"]
            if ks := ks_of(metrics):
                network = bare(name).partition("/")[2]
                title = NETWORKS.get(network, network)
                if unlike := unlike_newest(run, name):
                    title = f"{title} ({unlike})"
                cells = [
                    f"{metrics[f'top1_k{k}']:.2f} / {metrics.get(f'top5_k{k}', 0):.2f}"
                    if k in ks
                    else ""
                    for k in every
                ]
                rows.append([f"{run.name}: {title}" if len(runs) > 1 else title, *cells])
    return card(table(["k-NN, top-1 / top-5, %", *(f"k = {k}" for k in every)], rows))


def ordered(results: dict[str, Any]) -> list[tuple[str, Any]]:
    """Results with the known evaluations first."""
    return [(name, results[name]) for name in in_order(results)]


def side_by_side(runs: Sequence[Run]) -> str:
    """Accuracies of several runs, ranked only where the protocols are equal."""
    rows = []
    for ranking in compare.rank(runs):
        cells = ["" if value is None else f"{value:.2f}" for value in ranking.top1]
        if (best := ranking.best) is not None:
            cells[best] = f"★ {cells[best]}"
        rows.append([ranking.title, *cells, ranking.verdict])
    return card(table(["top-1, %", *(run.name for run in runs), "verdict"], rows), "texts")


def protocols(run: Run) -> str:
    """Each result with its numbers, protocol and provenance, folded."""
    folds = []
    for name, entry in ordered(run.results):
        metrics = {m: number(entry["metrics"][m]) for m in by_number(entry["metrics"])}
        rest = {k: v for k, v in entry.items() if k not in ("metrics", "protocol", "grid")}
        top1 = headline(entry["metrics"])
        title = name if top1 is None else f"{name}: top-1 {top1:.2f} %"
        folds.append(fold(title, facts_table(metrics | entry["protocol"] | rest)))
    return card("".join(folds))


def by_number(names: Iterable[str]) -> list[str]:
    """Names in the order of the numbers in them: k20 before k100."""
    return sorted(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
