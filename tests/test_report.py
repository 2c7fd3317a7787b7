"""The report: right numbers, everything escaped, nothing loaded; charts with sane axes."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from xcit_dino.errors import InputError
from xcit_dino.eval import report
from xcit_dino.eval.charts import MOST_POINTS, line_chart, number, thin, ticks
from xcit_dino.eval.config import ReportConfig
from xcit_dino.train.provenance import record_result

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>'


class Page(HTMLParser):
    """Tags and texts of a page; fails on tags that are left open."""

    VOID = {"meta", "br", "img", "link", "input"}

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def make_run(folder: Path, lift: float = 30.0, name: str = "demo") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"arch": name, "epochs": 3, "lr": 5e-4}))
    lines = [{"step": s, "epoch": s / 9, "loss": 8 - s / 10, "lr": 5e-4} for s in range(1, 30)]
    lines.append({"step": 30, "knn_top1": 44.0, "loss": math.nan})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for network, top1 in {"": 21.5 + lift, "/random": 21.5, "/pixels": 18.25}.items():
        metrics = {f"top{n}_k{k}": top1 + n - k / 100 for n in (1, 5) for k in (10, 20)}
        protocol = {"nb_knn": [10, 20], "temperature": 0.07, "val_images": 100}
        record_result(folder, f"knn{network}", metrics, protocol, wall_seconds=1.5)
    return folder


def test_shows_what_was_measured(tmp_path):
    run = make_run(tmp_path / "run")
    report.run(ReportConfig((run,)))
    page = Page((run / "report.html").read_text())
    assert "k-NN, k = 20, top-1" in page.text and "52.3" in page.text  # 21.5 + 30 + 1 - 0.2
    assert "+30.0 over random weights, +33.2 over raw pixels" in page.text
    assert "52.40 / 56.40" in page.text and "wall_seconds1.5" in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 3  # loss, k-NN, learning rate


def test_nothing_is_loaded_and_nothing_runs(tmp_path):
    run = make_run(tmp_path / "run")
    report.run(ReportConfig((run,)))
    page = Page((run / "report.html").read_text())
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"src", "href", "onclick", "onload"} & set(attributes)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy and policy.startswith("default-src 'none'")


def test_all_foreign_text_is_escaped(tmp_path):
    run = make_run(tmp_path / "a<b>&'\"", name=EVIL)
    record_result(run, EVIL, {EVIL: 1.0}, {EVIL: EVIL, "list": [EVIL], "map": {EVIL: EVIL}})
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 31, EVIL: 3.0, "words": EVIL}) + "\n")
    other = make_run(tmp_path / "c<script>")
    report.run(ReportConfig((run, other)))
    text = (run / "report.html").read_text()
    page = Page(text)
    assert "<script" not in text and "<img" not in text and EVIL in page.text
    assert all("onerror" not in attributes for _, attributes in page.tags)


def test_runs_are_compared_and_parts_may_be_missing(tmp_path):
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second", lift=10)
    (second / "results.json").unlink()
    output = tmp_path / "both.html"
    report.run(ReportConfig((first, second), output=output))
    page = Page(output.read_text())
    assert "first and second" in page.text and "first: k-NN, k = 20" in page.text
    assert sum(tag == "polyline" for tag, _ in page.tags) == 6


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        report.run(ReportConfig((tmp_path,)))


def test_ticks_are_round_and_cover():
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.3, 0.97, 5) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    for low, high in ((0, 1), (-3, 7), (1e-9, 2e-9), (5, 5), (0, 0), (-1e6, 3e7), (99.5, 100.5)):
        found = ticks(low, high, 5)
        assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12
        assert 2 <= len(found) <= 7
        mantissa = (found[1] - found[0]) / 10 ** math.floor(math.log10(found[1] - found[0]) + 1e-9)
        assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-6


def test_long_curves_are_averaged_and_keep_their_ends():
    points = [(float(x), float(x % 7)) for x in range(10_001)]
    short = thin(points)
    assert len(short) <= MOST_POINTS
    assert short[0] == points[0] and short[-1] == points[-1]
    assert sum(y for _, y in short) / len(short) == pytest.approx(3, abs=0.05)


def test_a_curve_runs_from_corner_to_corner():
    chart = line_chart("rise", [("run", [(0, 0), (10, 100)])], "step")
    points = chart.split('points="')[1].split('"')[0].split()
    (x0, y0), (x1, y1) = ([float(v) for v in p.split(",")] for p in points)
    assert x1 > x0 and y1 < y0
    assert line_chart("empty", [("run", [(0, math.nan)])], "step") == ""
    assert "polyline" in line_chart("one point", [("run", [(3, 3)])], "step")


def test_numbers_are_short():
    assert [number(v) for v in (0, 12_000, 3.14159, 5e-4, 2e-6)] == [
        "0", "12,000", "3.14", "0.0005", "2e-06",
    ]  # fmt: skip
