"""Render the report: all HTML and SVG is in templates/, Python passes plain data.

Every value is escaped (autoescape), a misspelled name is an error (StrictUndefined). The page may
load nothing, and the only script that runs is templates/report.js: the policy names its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
STYLE = (TEMPLATES / "report.css").read_text()
PERCENT = re.compile(r"(\d) %")
OPTION = re.compile(r"(--[a-z0-9_]+)")
SCRIPT = (TEMPLATES / "report.js").read_text()


@dataclass(frozen=True)
class Section:
    """A titled part of the page; not shown where ``data`` is empty."""

    title: str
    template: str
    """Name of a file in templates/, which receives ``data``."""
    data: Any
    about: str = ""
    """How to read it."""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    sortable: bool = True
    """Whether clicking a column's header sorts by it."""
    prose: bool = False
    """Cells hold text rather than numbers: aligned left."""

    def __len__(self) -> int:
        return len(self.rows)


def tables(title: str, *content: Table, about: str = "") -> Section:
    """A section of tables, without those that have no rows."""
    return Section(title, "tables", [table for table in content if table], about)


@dataclass(frozen=True)
class Tile:
    """A captioned image."""

    source: str
    """A data: URI."""
    caption: str
    style: str = ""
    """CSS classes: right or wrong (frame), query, large or small, smooth."""


def render(template: str, **data: Any) -> Markup:
    """The text of one template."""
    return Markup(ENVIRONMENT.get_template(f"{template}.html.jinja").render(data))


def document(title: str, **data: Any) -> str:
    """The whole HTML page; ``data`` as templates/page.html.jinja uses it."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    parts = {"style": Markup(STYLE), "script": Markup(SCRIPT), "script_hash": f"sha256-{digest}"}
    return str(render("page", title=title, **parts, **data))


# -- filters of the templates ----------------------------------------------------------------------


def anchor(title: str) -> str:
    """A section's id."""
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def by_options(text: str) -> list[str]:
    """A text split at its options (``--lr``), which have the odd places."""
    return OPTION.split(text)


def plain(value: Any) -> str:
    """A JSON value as text: strings unchanged, lists with commas, the rest as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or "none"
    if isinstance(value, dict):
        return "; ".join(f"{name} {plain(item)}" for name, item in value.items())
    return json.dumps(value)


def timestamp(time: Any) -> str:
    """``2026-01-02T03:04:05+00:00``, always UTC, -> ``2026-01-02 03:04:05``."""
    return str(time).replace("T", " ").removesuffix("+00:00")


def sentence(text: str) -> str:
    """``loss 3.1`` -> ``Loss 3.1.``"""
    return f"{text[:1].upper()}{text[1:]}."


def fixed(value: float, digits: int = 1) -> str:
    """``3.14159`` -> ``3.1``."""
    return f"{value:.{digits}f}"


def unbroken(value: Any) -> Any:
    """A percent sign stays in the line of its number: ``31.4 %`` gets a no-break space."""
    if type(value) is not str:  # Markup is a rendered part, whose values have been here
        return value
    return PERCENT.sub("\\1\N{NO-BREAK SPACE}%", value)


ENVIRONMENT = Environment(
    finalize=unbroken,
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {
    "anchor": anchor, "by_options": by_options, "fixed": fixed, "plain": plain,
    "timestamp": timestamp,
}  # fmt: skip
