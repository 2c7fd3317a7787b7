"""``report.html``: what a run reached, how it got there and where the numbers come from, in one
file that needs no network.

Several runs are shown side by side, in curves over one another and in tables with a column each.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from xcit_dino.errors import InputError
from xcit_dino.eval.config import ReportConfig
from xcit_dino.eval.results import check_writable
from xcit_dino.files import write_atomic
from xcit_dino.provenance import now
from xcit_dino.report import accuracy, origin, training
from xcit_dino.report.page import chips, document, moment, navigation, plain, section
from xcit_dino.report.training import spans
from xcit_dino.train.run.reader import Run, read_runs

Section = tuple[str, str, str]
"""Title, content, and how to read it."""


def run(config: ReportConfig) -> None:
    """Write the page.

    Raises:
        InputError: a folder that holds no run, or nothing can be written where the page is to go.
    """
    runs = read_runs(config.folders)
    output = config.output or config.folders[0] / "report.html"
    remedy = "name another file: --output FILE.html"
    check_writable(output.parent, remedy, f"--output {output}")
    try:
        write_atomic(output, page(runs, config.pictures))
    except OSError as error:
        raise InputError(f"--output {output}: {error.strerror}") from error
    print(f"report: {output}", flush=True)


def page(runs: Sequence[Run], pictures: bool = True) -> str:
    """The whole HTML text."""
    sections = measured(runs)
    absent = [words for run in runs for words in named(run, run.absent, runs)]
    if pictures:
        from xcit_dino.report.pictures import IN_COMPARISON, PARTS, pictures_of  # torch

        for run in runs:
            shown, missing = pictures_of(run, PARTS if len(runs) == 1 else IN_COMPARISON)
            titles = named(run, [title for title, _, _ in shown], runs)
            sections += [(title, *rest) for title, (_, *rest) in zip(titles, shown, strict=True)]
            absent += named(run, missing, runs)
    sections = [part for part in [*sections, *origins(runs)] if part[1]]
    *others, last = (run.name for run in runs)
    names = f"{', '.join(others)} and {last}" if others else last
    head = [
        f'<p class="eyebrow">xcit-dino report</p><h1>{escape(names)}</h1>',
        *(about_run(run, len(runs) > 1) for run in runs),
        notes(absent),
    ]
    body = [navigation(title for title, _, _ in sections), *(section(*part) for part in sections)]
    foot = f"<footer>Written {moment(now())} UTC by xcit-dino. This file needs no network.</footer>"
    return document(f"{names} - xcit-dino report", "".join([*head, *body, foot]))


def named(run: Run, texts: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """Texts with the run's name in front where there are several."""
    return [f"{run.name}: {text}" if len(runs) > 1 else text for text in texts]


def measured(runs: Sequence[Run]) -> list[Section]:
    """What was reached, and how training went."""
    found = side_by_side(runs) if len(runs) > 1 else accuracies(runs[0])
    restarts = (
        "Dotted vertical lines are restarts." if len(runs) == 1 and len(spans(runs[0])) > 1 else ""
    )
    return [
        *found,
        ("Training", training.curves(runs), restarts),
        ("Speed and cost", training.speed(runs), ""),
    ]


def accuracies(run: Run) -> list[Section]:
    """One run's results."""
    every = accuracy.all_results(run) + accuracy.knn_table([run])
    return [
        ("Accuracy", accuracy.headlines(run), ""),
        (
            "Beside the published numbers",
            accuracy.beside_published(run),
            "",
        ),
        ("All results", every, "A click on a column's name sorts by it."),
    ]


def side_by_side(runs: Sequence[Run]) -> list[Section]:
    """Several runs' results."""
    return [
        (
            "Side by side",
            accuracy.side_by_side(runs),
            "Top-1 accuracy. Runs are ranked only where their protocols are equal, field by field; "
            "± is one standard error from the number of validation images.",
        ),
        ("k-NN by number of neighbours", accuracy.knn_table(runs), ""),
        ("Different options", origin.different_options(runs), ""),
    ]


def origins(runs: Sequence[Run]) -> list[Section]:
    """Where the numbers come from."""
    about = "Everything that two accuracies must share to be compared."
    protocols = [
        (title, accuracy.protocols(run), about)
        for run in runs
        for title in named(run, ["Protocols"], runs)
    ]
    provenance = [
        (title, origin.origin(run), "")
        for run in runs
        for title in named(run, ["Provenance"], runs)
    ]
    return [*protocols, *provenance]


def about_run(run: Run, name: bool) -> str:
    """Short facts: architecture, length, data, commit."""
    known = run.config
    tries = [line for line in run.tries if line["event"] == "start"]
    commits = [fact.get("commit") for fact in (*tries, *run.results.values())]
    facts: dict[str, Any] = {
        "model": known.get("arch"),
        "epochs": known.get("epochs"),
        "steps": f"{run.metrics[-1]['step']:,}" if run.metrics else None,
        "image size": known.get("global_crops_size") or known.get("input_size"),
        "data": Path(str(known["data_path"])).name if known.get("data_path") else None,
        "seed": known.get("seed"),
        "commit": next((commit for commit in commits if commit), None),
    }
    shown = {name: plain(value) for name, value in facts.items() if value is not None}
    place = f"{run.name}: {run.folder}" if name else str(run.folder)
    return f'<p class="sub">{escape(place)}</p>{chips(shown)}'


def notes(absent: Sequence[str]) -> str:
    """What the page lacks, and why."""
    if not absent:
        return ""
    items = "".join(f"<li>{escape(words)}</li>" for words in absent)
    return f'<div class="notes"><p><b>Not shown</b></p><ul>{items}</ul></div>'
