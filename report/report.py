"""``report.html``: what a run reached, how it got there and where the numbers come from, in one
file that needs no network.

Several runs are shown side by side, in curves over one another and in tables with a column each.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from xcit_dino.errors import InputError
from xcit_dino.eval.config import ReportConfig
from xcit_dino.eval.pictures.false_color import check_shown
from xcit_dino.files import check_writable, write_atomic
from xcit_dino.options import replace as replace_options
from xcit_dino.provenance import now
from xcit_dino.report import accuracy, provenance, training
from xcit_dino.report.images import Images
from xcit_dino.report.page import Section, document
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.train.run.reader import Run, read_runs


def run(config: ReportConfig) -> None:
    """Write the page.

    Raises:
        InputError: a folder holds no run, or the page cannot be written.
    """
    runs = read_runs(config.folders)
    if config.show_channels:
        check_channels(runs, config.show_channels)
    output = config.output or config.folders[0] / "report.html"
    remedy = "name another file: --output FILE.html"
    check_writable(output.parent, remedy, f"--output {output}")
    try:
        write_atomic(output, page(runs, config.pictures, config.show_channels))
    except OSError as error:
        raise InputError(f"--output {output}: {error.strerror}") from error
    print(f"report: {output}", flush=True)


def check_channels(runs: Sequence[Run], shown: tuple[int, ...]) -> None:
    """Raise InputError where ``--show_channels`` fits the images of none of the runs."""
    reasons = []
    for run in runs:
        with suppress(InputError, OSError, ValueError):  # the page says what is missing
            context = Images(run).context
            try:
                return check_shown(shown, context)
            except InputError as reason:
                reasons.append(reason)
    if reasons:
        raise reasons[0]


def page(runs: Sequence[Run], pictures: bool = True, show_channels: tuple[int, ...] = ()) -> str:
    """The whole HTML text."""
    many = len(runs) > 1
    sections = comparison(runs) if many else results(runs[0])
    sections += [training.curves(runs), training.speed(runs)]
    absent = []
    for run in runs:
        shown, missing = pictures_of(run, many, show_channels) if pictures else ([], [])
        verdicts = [section for section in shown if section.template == "verdict"]
        sections = verdicts + sections
        sections += named(run, [section for section in shown if section not in verdicts], many)
        absent += [f"{run.name}: {reason}" if many else reason for reason in run.absent + missing]
    sections += [part for run in runs for part in named(run, [accuracy.protocols(run)], many)]
    sections += [part for run in runs for part in named(run, [provenance.provenance(run)], many)]
    *others, last = (run.name for run in runs)
    return document(
        f"{', '.join(others)} and {last}" if others else last,
        runs=[(f"{run.name}: {run.folder}" if many else run.folder, facts(run)) for run in runs],
        absent=absent,
        sections=[section for section in sections if section.data],
        time=now(),
    )


def results(run: Run) -> list[Section]:
    """Accuracies of one run."""
    parts = (
        accuracy.is_it_good,
        accuracy.headlines,
        accuracy.beside_start,
        accuracy.beside_published,
        accuracy.all_results,
    )
    return [part(run) for part in parts]


def comparison(runs: Sequence[Run]) -> list[Section]:
    """Accuracies of several runs, and the options in which they differ."""
    tables = (accuracy.side_by_side, accuracy.knn_by_k, provenance.different_options)
    return [table(runs) for table in tables]


def pictures_of(
    run: Run, many: bool, show_channels: tuple[int, ...] = ()
) -> tuple[list[Section], list[str]]:
    """The run's pictures, fewer beside other runs, and which of them are missing and why."""
    from xcit_dino.report.pictures import IN_COMPARISON, PARTS, sections_of  # imports torch

    return sections_of(run, IN_COMPARISON if many else PARTS, show_channels)


def named(run: Run, sections: Sequence[Section], many: bool) -> list[Section]:
    """Sections of one run, with its name in their titles where there are several."""
    return [replace(s, title=f"{run.name}: {s.title}") if many else s for s in sections]


def image_size(options: dict[str, Any]) -> str | int | None:
    """Side of the (global) crops in pixels, of each stage of a pretraining."""
    size = options.get("global_crops_size") or options.get("input_size")
    if len(options.get("stage_scales", ())) < 2:
        return size
    stages = replace_options(PretrainConfig(), options).stages
    return ", ".join(str(crops.global_crops_size) for _, crops in stages)


def facts(run: Run) -> dict[str, Any]:
    """Short facts: architecture, length, data, commit."""
    options = run.config
    commits = (fact.get("commit") for fact in (*training.starts(run), *run.results.values()))
    found = {
        "model": options.get("arch"),
        "epochs": options.get("epochs"),
        "steps": f"{steps:,}" if (steps := training.last_step(run)) else None,
        "image size": image_size(options),
        "data": Path(str(options["data_path"])).name if options.get("data_path") else None,
        "seed": options.get("seed"),
        "commit": next((commit for commit in commits if commit), None),
    }
    return {name: value for name, value in found.items() if value is not None}
