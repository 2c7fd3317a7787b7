"""The parts of the report's page: document, cards, tables that sort, tiles of pictures.

Every text that comes from outside (file names, options, class names) goes through ``escape``. The
page may load nothing, and of scripts only the one below runs: the policy names its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE = (Path(__file__).parent / "report.css").read_text()
SCRIPT = """
for (const head of document.querySelectorAll("table.sort th")) {
  head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending";
    const body = head.closest("table").tBodies[0], column = head.cellIndex;
    const key = (row) => {
      const text = row.cells[column].textContent.replace(/,/g, "");
      const value = parseFloat(text);
      return isNaN(value) ? text : value;
    };
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      const less = typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0)
        : typeof x === "number" ? -1 : 1;
      return up ? less : -less;
    };
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...[...body.rows].sort(order));
  });
}
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details")) fold.open = true;
});
"""


def document(title: str, body: str) -> str:
    """A whole HTML page; it may load nothing from anywhere."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    policy += f"; script-src 'sha256-{digest}'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def section(title: str, content: str, about: str = "") -> str:
    """A titled part with a sentence on how to read it; nothing where there is no content."""
    if not content:
        return ""
    words = f'<p class="about">{escape(about)}</p>' if about else ""
    return f'<section id="{anchor(title)}"><h2>{escape(title)}</h2>{words}{content}</section>'


def navigation(titles: Iterable[str]) -> str:
    """Links to the sections."""
    links = (f'<a href="#{anchor(title)}">{escape(title)}</a>' for title in titles)
    return f"<nav>{' '.join(links)}</nav>"


def anchor(title: str) -> str:
    """A section's name in links."""
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def card(content: str, kind: str = "") -> str:
    """A box."""
    return f'<div class="card {kind}">{content}</div>' if content else ""


def grid(cards: Iterable[str], kind: str = "") -> str:
    """Boxes side by side, as many as the window is wide."""
    content = "".join(cards)
    return f'<div class="grid {kind}">{content}</div>' if content else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], sort: bool = True) -> str:
    """A table of texts; a click on a column's head sorts by it."""
    if not rows:
        return ""
    cells = [f"<button>{escape(cell)}</button>" if sort else escape(cell) for cell in header]
    head = "".join(f'<th scope="col">{cell}</th>' for cell in cells)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    kind = ' class="sort"' if sort else ""
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def facts_table(facts: dict[str, Any]) -> str:
    """Names and values, one a row."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(plain(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'


def plain(value: Any) -> str:
    """A JSON value for a reader: texts as they are, lists with commas, the rest as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or "none"
    if isinstance(value, dict):
        return "; ".join(f"{name} {plain(item)}" for name, item in value.items())
    return json.dumps(value)


def moment(time: Any) -> str:
    """``2026-01-02T03:04:05+00:00``, always UTC, -> ``2026-01-02 03:04:05``."""
    return str(time).replace("T", " ").removesuffix("+00:00")


def fold(title: str, content: str) -> str:
    """Content that a click opens."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def bar(label: str, percent: float, ours: bool) -> str:
    """A labelled bar of 0 to 100 percent."""
    width = min(100.0, max(0.0, percent))
    return (
        f'<div class="bar{" ours" if ours else ""}"><span>{escape(label)}</span>'
        f'<span class="track"><i style="width:{width:.1f}%"></i></span><b>{percent:.1f}</b></div>'
    )


def chips(facts: dict[str, Any]) -> str:
    """Short facts in a row."""
    parts = (
        f"<li><span>{escape(name)}</span> {escape(plain(value))}</li>"
        for name, value in facts.items()
    )
    return f'<ul class="chips">{"".join(parts)}</ul>'


def tile(source: str, caption: str = "", kind: str = "", title: str = "") -> str:
    """A picture (a data: URI) with words below; ``kind`` right or wrong gives it a frame."""
    words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    about = escape(title or caption, quote=True)
    return (
        f'<figure class="tile {kind}"><img src="{source}" alt="{about}" title="{about}">'
        f"{words}</figure>"
    )


def tiles(rows: Iterable[Sequence[str]]) -> str:
    """Rows of pictures, short ones side by side; on a narrow window a row scrolls by itself."""
    shown = "".join(f'<div class="scroll tiles">{"".join(row)}</div>' for row in rows)
    return f'<div class="rows">{shown}</div>'


def stats(facts: dict[str, str]) -> str:
    """Numbers with their names, a small box each."""
    boxes = (
        f'<div class="card"><p class="kind">{escape(name)}</p>'
        f'<p class="stat">{escape(value)}</p></div>'
        for name, value in facts.items()
    )
    return grid(boxes, "stats")
