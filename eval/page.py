"""The look of the report: one style sheet, light and dark, and the few HTML parts it is made of.

Every text that comes from outside (file names, options, class names) goes through ``escape``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #15181d; --muted: #667085; --rule: #e4e7ec;
  --accent: #1f5fd6; --base: #a9b4c4; --good: #0a7d4b;
  --run-0: #1f5fd6; --run-1: #d9480f; --run-2: #0a7d4b; --run-3: #8b3fc7; --run-4: #b08800;
  --run-5: #c2255c; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0f1115; --card: #171a21; --text: #e8eaf0; --muted: #98a2b3; --rule: #2a2f3a;
  --accent: #6ea8fe; --base: #5a6577; --good: #4ade93;
  --run-0: #6ea8fe; --run-1: #ff9f6b; --run-2: #4ade93; --run-3: #c99bf5; --run-4: #e6c34a;
  --run-5: #ff8fb4; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; letter-spacing: -0.02em;
  overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 12px; letter-spacing: -0.01em; }
.sub { color: var(--muted); margin: 6px 0 0; overflow-wrap: anywhere; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
  padding: 20px 22px; }
.grid { display: grid; margin-bottom: 16px; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); }
.charts { grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); }
.kind { color: var(--muted); font-size: 13px; margin: 0; }
.headline { font-size: 40px; font-weight: 650; line-height: 1.15; letter-spacing: -0.03em;
  font-variant-numeric: tabular-nums; margin: 2px 0 0; }
.headline small { font-size: 18px; font-weight: 500; color: var(--muted); letter-spacing: 0; }
.lift { color: var(--good); font-weight: 600; margin: 0 0 12px; font-size: 14px; }
.lift.none { color: var(--muted); }
.bar { display: grid; grid-template-columns: 120px 1fr 52px; gap: 10px; align-items: center;
  font-size: 13px; margin-top: 6px; }
.bar b { font-weight: 500; text-align: right; font-variant-numeric: tabular-nums; }
.bar i { display: block; height: 10px; border-radius: 5px; background: var(--base);
  min-width: 2px; }
.bar.ours i { background: var(--accent); } .bar.ours, .bar.ours b { font-weight: 650; }
.bar span.track { background: var(--rule); border-radius: 5px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th { color: var(--muted); font-weight: 500; font-size: 13px; text-align: right; }
th, td { padding: 7px 12px; border-bottom: 1px solid var(--rule); }
td { text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr:last-child td { border-bottom: 0; } td.best { font-weight: 650; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.facts td:first-child { color: var(--muted); white-space: nowrap; width: 1%; }
figure { margin: 0; } figcaption { font-size: 13px; font-weight: 600; display: flex;
  justify-content: space-between; margin-bottom: 6px; }
figcaption .last { color: var(--muted); font-weight: 500; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--muted); font-size: 13px; }
path.rule { stroke: var(--rule); } polyline.line { fill: none; stroke: var(--line);
  stroke-width: 1.8; stroke-linejoin: round; } circle.end { fill: var(--line); }
details { border-top: 1px solid var(--rule); padding: 10px 0; }
details:first-of-type { border-top: 0; padding-top: 0; }
details:last-of-type { padding-bottom: 0; } summary { cursor: pointer; font-weight: 500; }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
code { font: 0.92em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 0 0 12px; font-size: 13px; }
.legend i { display: inline-block; width: 12px; height: 3px; margin-right: 7px;
  vertical-align: middle; background: var(--line); }
footer { color: var(--muted); font-size: 13px; margin-top: 40px; }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""


def document(title: str, body: str) -> str:
    """A whole HTML page; it may load nothing from anywhere."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def facts_table(facts: dict[str, Any]) -> str:
    """Names and values, one a row."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(plain(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f'<div class="scroll"><table class="facts">{rows}</table></div>'


def plain(value: Any) -> str:
    """A JSON value for a reader: texts as they are, lists with commas, the rest as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value) or "none"
    if isinstance(value, dict):
        return "; ".join(f"{name} {plain(item)}" for name, item in value.items())
    return json.dumps(value)


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
