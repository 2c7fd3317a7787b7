"""Results of one part of a benchmark: tables, on disk after every row, as JSON and Markdown."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OURS = ("xcit_dino", "bench", "tests")


@dataclass(frozen=True)
class Setting:
    """What every part is given; seconds: its time limit; data: folder of labeled shards."""

    device: str
    tiny: bool
    out: Path
    data: str | None
    seconds: float


class Notes:
    """A part's results in ``FILE.json``, rewritten at every change, so that nothing is lost when
    the process is killed.

    Keys: ``name``, ``about``, ``state`` (``running``, ``done``, ``stopped``, ``failed``,
    ``skipped``), ``why``, ``seconds``, ``tables`` (``title``, ``header``, ``rows``), ``numbers``.
    """

    def __init__(self, file: Path, name: str, about: str) -> None:
        self.file = file
        self.found: dict[str, Any] = {
            "name": name, "about": about, "state": "running", "why": "", "seconds": 0.0,
            "tables": [], "numbers": {},
        }  # fmt: skip
        self._write()

    def table(self, title: str, *header: str) -> None:
        """Begin a table, whose first column names what a row is about."""
        self.found["tables"].append({"title": title, "header": ["", *header], "rows": []})
        self._write()

    def row(self, *cells: object) -> None:
        """Add a row to the newest table."""
        self.found["tables"][-1]["rows"].append([str(cell) for cell in cells])
        print("  ".join(map(str, cells)), flush=True)
        self._write()

    def number(self, name: str, value: float) -> None:
        """Store a number for other parts."""
        self.found["numbers"][name] = value
        self._write()

    def end(self, state: str, why: str = "") -> None:
        self.found |= {"state": state, "why": why}
        self._write()

    def _write(self) -> None:
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.found, indent=1))
        os.replace(partial, self.file)


def markdown(parts: Sequence[dict[str, Any]], heading: str, facts: str) -> str:
    """The page of all parts, with their tables as in docs/benchmarks.md."""
    lines = [f"# {heading}", "", facts, ""]
    for part in parts:
        lines += [f"## {part['name']}: {part['about']}", ""]
        if part["state"] != "done":
            why = f": {part['why']}" if part["why"] else ""
            lines += [f"{part['state'].capitalize()} after {part['seconds']:.0f} s{why}.", ""]
        for table in part["tables"]:
            lines += [f"{table['title']}:", "", *rows_of(table), ""]
    return "\n".join(lines)


def rows_of(table: dict[str, Any]) -> list[str]:
    """A table's lines, Markdown."""
    rows = [table["header"], ["---"] * len(table["header"]), *table["rows"]]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]


def enter(function: str, about: str, setting: Setting) -> None:
    """Run a part, ``module:function``, in a process of its own, with a log and notes of its own."""
    os.setsid()
    name = function.rpartition(":")[2]
    with open(setting.out / f"{name}.log", "w") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    notes = Notes(setting.out / f"{name}.json", name, about)
    try:
        resolve_name(function)(setting, notes)
        notes.end("done")
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        notes.end("failed" if missing in OURS else "skipped", f"{missing} is not installed here")
    except BaseException as error:
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        notes.end("failed", f"{type(error).__name__}: {first}"[:300])
        raise SystemExit(1) from error
