"""The report in a real browser: images load, no errors, nothing overflows, tables sort."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Browser, find_chromium
from tests.report.test_report import add_tries, make_run
from xcit_dino.eval import knn
from xcit_dino.eval.config import KnnConfig, ReportConfig
from xcit_dino.options import replace
from xcit_dino.provenance import record_result
from xcit_dino.report import charts, report
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.pretrain import pretrain_with_knn as pretrain

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="needs Chromium (Debian: apt chromium)"),
]
TINY = {
    "arch": "xcit_pico_6_p8", "out_dim": 64, "head_hidden_dim": 32, "head_bottleneck_dim": 16,
    "global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 4, "epochs": 2,
    "batch_size_per_gpu": 48, "num_workers": 0, "log_every": 1, "device": "cpu",
    "precision": "fp32", "knn_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def run(tmp_path_factory, demo_shards) -> Path:
    """A small run that was really trained and evaluated, with its report."""
    folder = tmp_path_factory.mktemp("browser") / "a small run"
    pretrain(replace(PretrainConfig(), TINY | {"output_dir": folder, "data_path": demo_shards}))
    target = replace(KnnConfig(), {"output_dir": folder, "num_workers": 0, "nb_knn": (10, 20),
                                    "baselines": True, "device": "cpu"})  # fmt: skip
    knn.run(target)
    report.run(ReportConfig((folder,)))
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A report of three runs with names and values as long as they come."""
    folder = tmp_path_factory.mktemp("wide")
    runs = [make_run(folder / f"{n}-{'x' * 80}", data_path="/" + "very_long/" * 30) for n in "abc"]
    for number, run in enumerate(runs):
        add_tries(run)
        record_result(run, "linear", {"top1": 3.0}, {"note": "w" * 300 + str(number)})
    report.run(ReportConfig(tuple(runs), pictures=False))
    return runs[0]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_real_report(browser, run, width, dark):
    browser.open(run / "report.html", width, dark)
    assert browser.complaints == []
    images = browser.run("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
    assert len(images) > 50 and all(images)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.body.innerText.includes('Not shown')") is False
    lightness = browser.run(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    )
    assert lightness < 64 if dark else lightness > 192


@pytest.mark.parametrize("width", [390, 1280])
def test_long_names_do_not_overflow(browser, wide, width):
    browser.open(wide / "report.html", width)
    assert browser.complaints == []
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_charts_and_texts_stay_inside_their_boxes(browser, run):
    browser.open(run / "report.html", 1280)
    outside = browser.run(
        """[...document.querySelectorAll('.card')].flatMap(card => {
          const box = card.getBoundingClientRect();
          return [...card.querySelectorAll('svg, figcaption, .bar, .headline')].filter(e => {
            const inner = e.getBoundingClientRect();
            const out = inner.left < box.left - 1 || inner.right > box.right + 1;
            return out && !e.closest('.scroll');
          }).map(e => e.outerHTML.slice(0, 80));
        })"""
    )
    assert outside == []
    cut = browser.run(
        """[...document.querySelectorAll('svg[role] text')].filter(t => {
          const s = t.closest('svg').getBoundingClientRect(), b = t.getBoundingClientRect();
          return b.left < s.left - 2 || b.right > s.right + 2 || b.bottom > s.bottom + 2;
        }).map(t => t.textContent)"""
    )
    assert cut == []


def test_a_click_sorts_and_another_turns_round(browser, run):
    browser.open(run / "report.html", 1280)
    column = "document.querySelector('#all-results table.sort')"
    values = f"[...{column}.tBodies[0].rows].map(r => parseFloat(r.cells[1].textContent))"
    click = f"{column}.querySelectorAll('th button')[1].click()"
    before = browser.run(values)
    browser.run(click)
    assert browser.run(values) == sorted(before, reverse=True)
    browser.run(click)
    assert browser.run(values) == sorted(before)
    assert browser.run(f"{column}.querySelectorAll('th')[1].ariaSort") == "ascending"


def test_a_chart_tells_the_values_under_the_pointer(browser, run):
    """Step and value of the nearest logged line, as they are in the log; nothing after leaving."""
    browser.open(run / "report.html", 1280)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    chart = "document.querySelector('#training figure svg[role]')"
    send = (
        f"{chart}.dispatchEvent(new PointerEvent('KIND', {{clientX: AT + "
        f"{chart}.getBoundingClientRect().left, clientY: 9}}))"
    )
    texts = f"[...{chart}.querySelectorAll('.reading tspan')].map(t => t.textContent)"
    for at, step in ((0, min(losses)), (5000, max(losses))):
        browser.run(send.replace("KIND", "pointermove").replace("AT", str(at)))
        found = browser.run(texts)
        assert found[0] == f"step {step}" and found[1] == f"loss {charts.number(losses[step])}"
        assert len(found) == 4  # teacher entropy and KL
    browser.run(send.replace("KIND", "pointerleave").replace("AT", "0"))
    assert browser.run(texts) == []


def test_links_lead_somewhere_and_folds_open(browser, run):
    browser.open(run / "report.html", 1280)
    targets = browser.run(
        "[...document.querySelectorAll('nav a')].map(a => !!document.querySelector("
        "'#' + CSS.escape(decodeURI(a.hash.slice(1)))))"
    )
    assert len(targets) > 8 and all(targets)
    browser.run("document.querySelector('#protocols summary').click()")
    assert browser.run("document.querySelector('#protocols details table').offsetHeight") > 50
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("[...document.querySelectorAll('details')].every(d => d.open)")


def test_a_slider_leads_through_the_checkpoints(browser, run):
    """By the keyboard; on paper all are there."""
    browser.open(run / "report.html", 1280)
    frames = "[...document.querySelectorAll('.frame')]"
    shown = f"{frames}.filter(f => f.offsetHeight).map(f => f.dataset.name)"
    assert browser.run(shown) == ["epoch 2, step 4"]
    browser.run("document.querySelector('.slider input').focus()")
    for kind in ("rawKeyDown", "keyUp"):
        key = {"key": "ArrowLeft", "code": "ArrowLeft", "windowsVirtualKeyCode": 37}
        browser.call("Input.dispatchKeyEvent", type=kind, **key)
    assert browser.run(shown) == ["epoch 1, step 2"]
    slider = "document.querySelector('.slider input')"
    assert browser.run(f"{slider}.getAttribute('aria-valuetext')") == "epoch 1, step 2"
    assert browser.run("document.querySelector('.slider output').textContent") == "epoch 1, step 2"
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert len(browser.run(shown)) == 2
    assert browser.run("document.querySelector('.slider').offsetHeight") == 0
    browser.call("Emulation.setEmulatedMedia", media="")


def test_numbers_and_words_stay_whole_on_a_phone(browser, run):
    browser.open(run / "report.html", 390)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    broken = browser.run(
        """(() => {
          const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
          while (walk.nextNode()) {
            const node = walk.currentNode;
            if (node.parentElement.closest('script, svg')) continue;
            if (node.parentElement.closest('.facts td') && node.data.length > 20) continue;
            for (const word of node.data.matchAll(/[\\w.:,%]+/g)) {
              if (word[0].length > 26) continue;  // checksums and paths may break
              const range = document.createRange();
              range.setStart(node, word.index);
              range.setEnd(node, word.index + word[0].length);
              const tops = [...range.getClientRects()].filter(r => r.width).map(r => r.top);
              if (tops.some(top => top > tops[0] + 4)) found.push(word[0]);
            }
          }
          return found;
        })()"""
    )
    assert broken == []


def test_what_scrolls_is_reached_by_the_keyboard_and_named(browser, run):
    browser.open(run / "report.html", 390)
    browser.run("new Promise(r => requestAnimationFrame(() => setTimeout(r, 50)))")
    boxes = browser.run(
        """[...document.querySelectorAll('.scroll')].filter(b => b.offsetHeight).map(b => [
          b.scrollWidth > b.clientWidth, b.tabIndex === 0, b.getAttribute('aria-label') || ''])"""
    )
    assert any(wide for wide, _, _ in boxes)
    assert [b for b in boxes if not b[0] == b[1] == bool(b[2])] == []


def test_the_browser_would_notice(browser, tmp_path):
    """A page with a broken image, a script that fails and an overflow differs from a good one."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<img src='data:image/png;base64,AAAA'><div style='width:3000px'>wide</div>"
        "<script>console.error('ouch')</script>"
    )
    browser.open(page, 1280)
    assert any("ouch" in complaint for complaint in browser.complaints)
    assert browser.run("document.images[0].naturalWidth") == 0
    assert browser.run("document.documentElement.scrollWidth") > 1280
    browser.complaints.clear()
    (tmp_path / "again.html").write_text("<script src='http://127.0.0.1:9/x.js'></script>")
    browser.open(tmp_path / "again.html", 1280)
    assert any("asked the network" in complaint for complaint in browser.complaints)
    browser.complaints.clear()
