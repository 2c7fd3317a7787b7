"""The report: right numbers, everything escaped, nothing loaded; what is absent is listed."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from jinja2 import UndefinedError

from xcit_dino.errors import InputError
from xcit_dino.eval import knn, neighbors
from xcit_dino.eval.config import KnnConfig, LinearConfig, ReportConfig
from xcit_dino.files import write_atomic
from xcit_dino.options import read_yaml
from xcit_dino.provenance import record_result
from xcit_dino.report import accuracy, report
from xcit_dino.report.images import Images
from xcit_dino.report.page import SCRIPT, TEMPLATES, render
from xcit_dino.report.provenance import nearest_recipe
from xcit_dino.report.published import differences_from_published, published
from xcit_dino.report.training import attempts, cost, forgotten
from xcit_dino.train.config import CONFIGS
from xcit_dino.train.run.reader import headline, read_run, title_of

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
        if data.strip():  # not the line breaks between tags
            assert not re.search(r"\d %", data), "a line may begin with the percent sign"
            self.text += data.replace("\N{NO-BREAK SPACE}", " ")

    def count(self, tag: str, kind: str = "") -> int:
        return sum(t == tag and kind in (a.get("class") or "") for t, a in self.tags)


def make_run(folder: Path, lift: float = 30.0, **options: object) -> Path:
    folder.mkdir(parents=True)
    options = {"arch": "demo", "epochs": 3, "lr": 5e-4} | options
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    lines = [
        {"step": s, "time": f"2026-01-01T00:{s:02d}:00+00:00", "loss": 8 - s / 10, "lr": 5e-4,
         "images_per_s": 100.0 + s, "data_wait": 0.02}
        for s in range(1, 30)
    ]  # fmt: skip
    lines.append({"step": 30, "knn_top1": 44.0, "loss": math.nan})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for network, top1 in {"": 21.5 + lift, "/random": 21.5, "/pixels": 18.25}.items():
        metrics = {f"top{n}_k{k}": top1 + n - k / 100 for n in (1, 5) for k in (10, 20)}
        protocol = {"nb_knn": [10, 20], "temperature": 0.07, "val_images": 100, "val_index": "v"}
        record_result(folder, f"knn{network}", metrics, protocol, wall_seconds=1.5)
    return folder


def add_tries(folder: Path, last: str = "end") -> None:
    """Two attempts: killed after ten minutes, then twenty minutes on two processes."""

    def line(event: str, minute: int, **facts: object) -> dict[str, object]:
        return {"event": event, "time": f"2026-01-01T00:{minute:02d}:00+00:00", **facts}

    shared = {"processes": 2, "global_batch": 8, "total_steps": 40, "host": "node1"}
    shared |= {"hardware": {"gpus": []}, "commit": "abc123"}
    lines = [
        line("start", 0, step=0, **shared),
        line("end", 10, step=10, reason="no word: killed"),
        line("start", 15, step=8, **shared),
    ]
    lines += [line("end", 35, step=30, reason="done")] if last == "end" else []
    (folder / "tries.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def written(*runs: Path, **options: object) -> tuple[str, Page]:
    """The text of the report of these runs, and its parts."""
    report.run(ReportConfig(runs, **{"pictures": False} | options))
    text = (runs[0] / "report.html").read_text()
    return text, Page(text)


def test_shows_what_was_measured(tmp_path):
    run = make_run(tmp_path / "run")
    _, page = written(run)
    assert "k-NN, k = 20, top-1" in page.text and "52.3" in page.text  # 21.5 + 30 + 1 - 0.2
    assert "+30.0 over random weights, +33.2 over raw pixels" in page.text
    assert "52.40 / 56.40" in page.text and "wall_seconds1.5" in page.text
    assert page.count("polyline") == 5  # loss, k-NN, learning rate, throughput, waiting
    assert "images per second, median115" in page.text and "time waiting for data2.0 %" in page.text


def test_a_lift_is_over_a_baseline_of_the_same_protocol_only(tmp_path):
    run = make_run(tmp_path / "run")
    same = {"nb_knn": [10, 20], "temperature": 0.07, "val_images": 100, "val_index": "v"}
    metrics = {f"top{n}_k{k}": 70.0 for n in (1, 5) for k in (10, 20)}
    record_result(run, "knn", metrics, same | {"crop": 64, "network": "teacher"})
    _, page = written(run)
    assert "70.0" in page.text and "over random weights" not in page.text
    assert "Random weights: measured by another protocol (crop 64 / absent)" in page.text
    assert "crop absent" in page.text, "the earlier result is in the table, and what it differs in"
    others = {"network": "random", "seed": 0}
    record_result(run, "knn/random", metrics | {"top1_k20": 45.0}, same | {"crop": 64} | others)
    assert "+25.0 over random weights" in written(run)[1].text


def test_is_it_good_beside_baselines_start_and_teacher(tmp_path):
    run = make_run(tmp_path / "run", teacher_model="Big")
    _, page = written(run)
    # 51.3 and 21.5 of 100 images: 2 sqrt((51.3 * 48.7 + 21.5 * 78.5) / 100) = 12.9
    assert (
        "k-NN, k = 20: 52.3 %, better than random weights and raw pixels. Random weights 22.3 %, "
        "raw pixels 19.1 %. Differences below 13.0 points may be chance."
    ) in page.text
    with open(run / "metrics.jsonl") as file:
        lines = file.readlines()
    first = {"step": 0, "knn_top1": 20.0, "knn_top5": 40.0, "knn_frozen_top1": 61.0,
             "knn_frozen_top5": 80.0}  # fmt: skip
    (run / "metrics.jsonl").write_text(json.dumps(first) + "\n" + "".join(lines))
    assert (
        "During training, k-NN: 44.0 % at step 30. Starting weights 20.0 %; frozen teacher: Big "
        "61.0 %."
    ) in written(run)[1].text
    small = make_run(tmp_path / "small", lift=5)
    assert "52.3 %" not in written(small)[1].text
    assert "27.3 %, not clearly better than random weights or raw pixels" in written(small)[1].text
    worse = make_run(tmp_path / "worse", lift=-15)  # by 15.0 and 11.8; two errors are 9.8 and 9.4
    assert "7.3 %, worse than random weights and raw pixels." in written(worse)[1].text


LINEAR = {"evaluation": "linear", "network": "teacher", "arch": "demo", "crop": 32, "resize": 32,
          "seed": 0, "epochs": 100, "layers": ["cls"], "weights": "a",
          "val_index": "v"}  # fmt: skip


def record_linear(folder: Path, top1: float, baseline: str = "", **protocol: object) -> None:
    facts = LINEAR | ({"network": baseline} if baseline else {}) | protocol
    name = f"linear/{baseline}" if baseline else "linear"
    record_result(folder, name, {"top1": top1}, facts, val_images=180)


def only_linear(folder: Path, **options: object) -> Path:
    """A run without results yet."""
    run = make_run(folder, global_crops_size=32, data_path="shards", **options)
    (run / "results.json").unlink()
    return run


def test_random_weights_are_compared_at_the_same_layers_only(tmp_path):
    run = only_linear(tmp_path / "run")
    record_linear(run, 61.1, "random", layers=["deep"])
    record_linear(run, 66.1, "pixels", layers=["deep"])  # which have no layers
    record_linear(run, 70.6)
    text = written(run)[1].text
    assert "over random weights" not in text and "+4.5 over raw pixels" in text
    assert "Not compared with random weights; xcit-dino linear" in text
    assert text.count("andom weights: measured by another protocol (layers cls / deep)") == 2
    record_linear(run, 63.3, "random")
    assert "+7.3 over random weights" in written(run)[1].text
    record_linear(run, 72.8, layers=["deep"])
    assert "+11.7 over random weights" in written(run)[1].text, "of the older one that fits"
    record_linear(run, 40.0, layers=["deep"], arch="other")
    assert "over random weights" not in written(run)[1].text


def test_leads_within_chance_are_no_better_by_linear_alone(tmp_path):
    run = only_linear(tmp_path / "run")
    for network, top1 in {"random": 61.1, "pixels": 66.1, "": 70.6}.items():
        record_linear(run, top1, network)
    # 2 sqrt((70.6 * 29.4 + 61.1 * 38.9) / 180) = 9.95
    assert (
        "Linear probe: 70.6 %, not clearly better than random weights or raw pixels. Random "
        "weights 61.1 %, raw pixels 66.1 %. Differences below 9.9 points may be chance."
    ) in written(run)[1].text
    entries = json.loads((run / "results.json").read_text())
    for entry in entries.values():
        del entry["val_images"]  # results of earlier versions
    (run / "results.json").write_text(json.dumps(entries))
    assert (
        "Linear probe: 70.6 %, higher than random weights and raw pixels. Random weights 61.1 %, "
        "raw pixels 66.1 %. Which differences may be chance is not known."
    ) in written(run)[1].text


FEW = {"labels_per_class": 10, "draws": 3}


def test_few_labels_say_how_few_and_how_far_the_draws_differ(tmp_path):
    run = make_run(tmp_path / "run")
    metrics = {"top1_k5": 58.33, "top1_k5_std": 6.19, "top5_k5": 100.0}
    record_result(run, "knn-few", metrics, FEW | {"nb_knn": [5]})
    record_result(run, "linear-few/random", {"top1": 40.0, "top1_std": 3.0}, FEW)
    record_result(run, "linear-few", {"top1": 49.63, "top1_std": 4.04}, FEW)
    text = written(run)[1].text
    assert "Linear probe, 10 labels a class, top-149.6" in text and "Last weights" not in text
    assert "+9.6 over random weights" in text
    assert "mean of 3 draws ± 4.0 (their standard deviation)" in text
    assert "k-NN, 10 labels a class, k = 558.33 ± 6.19" in text, "in the table of all results"
    _, by_k = accuracy.all_results(read_run(run)).data
    names = [row[0] for row in by_k.rows]
    assert names[-1] == "Pretrained, 10 labels a class" and len(set(names)) == len(names) == 4


def test_the_newest_linear_result_names_its_layers(tmp_path):
    run = only_linear(tmp_path / "run")
    record_linear(run, 72.8, layers=["deep"])
    record_linear(run, 71.1)
    table, *_ = accuracy.all_results(read_run(run)).data
    assert [row[-1] for row in table.rows] == ["layers cls", "layers deep"]
    assert "layers cls  ·" in written(run)[1].text
    protocol = LINEAR | {"layers": ["cls", "deep"]}
    record_result(run, "linear", {"top1": 70.0}, protocol, chosen={"lr": 0.5, "layers": "deep"})
    assert "layers cls, deep  ·  lr 0.5 and layers deep chosen on" in written(run)[1].text


def test_the_command_for_baselines_measures_them_alike(tmp_path):
    run = only_linear(tmp_path / "a run")
    begins = f"random weights and raw pixels; xcit-dino linear --output_dir '{run}'"
    for options, words in (
        ({}, ""),
        ({"layers": ["deep"]}, "--layers deep "),
        ({"crop": 48, "resize": 48, "layers": ["cls", "deep"]},
         "--layers cls deep --crop_size 48 "),
        ({"resize": 40, "epochs": 5, "batch": 64, "chosen_on": "20 % of the training images"},
         "--epochs 5 --probe_batch_size 64 --holdout 0.2 --resize_size 40 "),
        ({"network": "student"}, "--checkpoint_key student "),
    ):  # fmt: skip
        default = {"layers": list(LinearConfig().layers)}
        record_linear(run, 70.6, **default | options)
        text = written(run)[1].text
        assert f"{begins} {words}--baselines true does it." in text
    again = "raw pixels; the command that measured it, again with --baselines true, does it."
    record_result(run, "linear", {"top1": 70.0}, LINEAR, weights_file="elsewhere.pth")
    assert again in written(run)[1].text
    (run / "config.yaml").unlink()
    record_linear(run, 70.6)
    assert again in written(run)[1].text


def test_nothing_is_loaded_and_only_the_named_script_runs(tmp_path):
    text, page = written(make_run(tmp_path / "run"))
    assert not {"link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"src", "onclick", "onload"} & set(attributes)
        assert (attributes.get("href") or "#").startswith("#")
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert policy and policy.startswith("default-src 'none'") and f"'sha256-{digest}'" in policy
    assert page.count("script") == 1 and f"<script>{SCRIPT}</script>" in text


def test_all_outside_text_is_escaped(tmp_path):
    run = make_run(tmp_path / "a<b>&'\"", arch=EVIL, data_path=EVIL, **{EVIL: EVIL})
    record_result(run, EVIL, {EVIL: 1.0}, {EVIL: EVIL, "list": [EVIL], "map": {EVIL: EVIL}})
    record_result(run, "finetune", {"top1": 1.0}, {"arch": EVIL, "start": EVIL, "crop": EVIL,
                                                   "resize": EVIL, "precision": EVIL})  # fmt: skip
    add_tries(run)
    tries = (run / "tries.jsonl").read_text().replace("node1", EVIL.replace('"', '\\"'))
    (run / "tries.jsonl").write_text(tries)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 31, EVIL: 3.0, "words": EVIL}) + "\n")
    other = make_run(tmp_path / "c<script>")
    for runs in ((run,), (run, other)):
        text, page = written(*runs, pictures=True)
        assert text.count("<script") == 1 and "<img" not in text and EVIL in page.text
        assert all("onerror" not in attributes for _, attributes in page.tags)


def test_templates_hold_all_html_and_fail_on_unknown_names(tmp_path):
    for path in TEMPLATES.parent.glob("*.py"):
        assert not re.search(r"</?[a-z]+[ >]", path.read_text()), path
    with pytest.raises(UndefinedError, match="has no attribute 'summary'"):
        render("tiles", data={"groups": {}})
    assert "&lt;b&gt;" in render("stats", data={"<b>": 1})


def test_runs_are_ranked_where_their_protocols_are_equal(tmp_path):
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second", lift=10, lr=0.1)
    third = make_run(tmp_path / "third", lift=50)
    record_result(third, "knn", {"top1_k20": 90.0}, {"nb_knn": [20], "val_index": "other"})
    _, page = written(first, second)
    assert "★ 52.30" in page.text and "lead 20.00 ± " in page.text and "0.0005" in page.text
    assert page.count("polyline") >= 10  # each curve twice, and keys
    _, page = written(first, second, third)
    assert (
        "not ranked, the protocols differ" in page.text and "val_index v / v / other" in page.text
    )


def test_published_numbers_stand_beside_ours_with_what_differs(tmp_path):
    run = make_run(tmp_path / "run", arch="xcit_small_12_p16")
    record_result(run, "linear", {"top1": 70.0}, {"crop": 224, "val_index": "v"})
    record_result(run, "distill", {"top1": 80.0}, {"arch": "xcit_nano_12_p8", "val_images": 50_000})
    _, page = written(run)
    assert "76.0k-NN (DINO README)" in page.text and "77.8linear" in page.text
    assert "validation images 100 instead of ImageNet's 50,000" in page.text
    assert "features of one crop" in page.text
    assert "80.076.3distilled, 224 (XCiT README)same as published" in page.text
    assert [p.top1 for p in published("xcit_small_12_p8", "knn")] == [77.1]
    assert published("xcit_pico_6_p8", "knn") == []
    assert differences_from_published("knn", {"crop": 224}, 50_000) == []


@pytest.mark.parametrize("last", ["start", "end"])
def test_attempts_and_their_cost(tmp_path, last):
    run = make_run(tmp_path / "run")
    add_tries(run, last)
    found = read_run(run)
    minutes = [attempt.seconds / 60 for attempt in attempts(found)]
    facts = cost(found)
    if last == "end":
        assert minutes == [10, 20] and facts["training time"] == "0:30:00"
        assert facts["process hours (CPU)"] == "1.00" and facts["images seen"] == "240"
        assert not found.absent
    else:
        assert "is active, or was killed" in found.absent[0] and "step 30 of 40" in found.absent[0]
    _, page = written(run)
    assert "no word: killed" in page.text and page.count("path", "mark") > 0


def test_what_is_absent_is_listed_and_the_rest_shown(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "results.json").unlink()
    _, page = written(run)
    assert "nothing evaluated yet" in page.text and page.count("polyline") == 5
    (run / "results.json").write_text('{"knn": {"top1": 3}, "linear": {"metr')
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "lo')
    assert "not readable" in written(run)[1].text
    (run / "results.json").write_text('{"knn": {"top1": 3}}')
    assert "result knn: of another version" in written(run)[1].text
    (run / "config.yaml").write_text("arch: [")
    (run / "metrics.jsonl").unlink()
    record_result(run, "knn", {"top1_k5": 3.0}, {})
    _, page = written(run, pictures=True)
    assert "curves: no metrics.jsonl" in page.text and "k-NN, k = 5" in page.text
    assert "confusions, map of the features: the run's config.yaml has no data_path" in page.text


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--output .*file/report.html: "):
        report.run(ReportConfig((run,), output=tmp_path / "file" / "report.html", pictures=False))


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no run in it"):
        report.run(ReportConfig((tmp_path,)))


def test_finetuning_inside_a_run_is_shown_with_it(tmp_path):
    run = make_run(tmp_path / "run")
    record_result(run / "finetune", "finetune", {"top1": 88.0, "top5": 99.0}, {"crop": 32})
    record_result(run / "finetune", "finetune/ema", {"top1": 87.0, "top5": 99.0}, {"crop": 32})
    record_result(run, "evaluate/head", {"top1": 50.0, "top5": 99.0}, {})
    _, page = written(run)
    for part in ("Finetuned, top-1", "88.0", "Averaged weights", "Classifier: backbone and head"):
        assert part in page.text


def test_the_nearest_recipe_and_what_differs_from_it(tmp_path):
    recipe = read_yaml(CONFIGS / "pretrain" / "xcit_small_12_p8.yaml")
    run = make_run(tmp_path / "run", **recipe | {"lr": 0.123, "epochs": 7, "num_workers": 99})
    name, different = nearest_recipe(read_run(run))
    assert name == "pretrain/xcit_small_12_p8.yaml"
    assert different == {"epochs": (recipe["epochs"], 7), "lr": (recipe["lr"], 0.123)}


def test_alarms_are_shown(tmp_path):
    run = make_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "alarm_uniform": 1.0}\n{"step": 40, "alarm_uniform": 0.0}\n')
    _, page = written(run)
    assert "step 31: uniform collapse. Change: sharpen: a lower --teacher_temp" in page.text
    assert "step 40: uniform collapse is over" in page.text
    assert page.count("polyline") == 5  # they are no curves


def test_forgetting_is_shown_as_the_terminal_says_it(tmp_path):
    """Once when it begins, by the run's own threshold, and when it is over."""
    run = make_run(tmp_path / "run", forgetting_threshold=0.6)
    kept = {0: 1.0, 10: 0.7, 20: 0.55, 30: 0.4, 40: 0.8}
    with open(run / "metrics.jsonl", "w") as file:
        file.writelines(f'{{"step": {n}, "neighbors_kept": {k}}}\n' for n, k in kept.items())
    sentences = forgotten(read_run(run))
    assert len(sentences) == 2 and "--freeze_batchnorm true" in sentences[0]
    assert sentences[0].startswith(
        "step 20: the starting weights are being forgotten: 55% of each image's nearest neighbors "
        "are still the same. Change: a lower --lr"
    )
    assert sentences[1] == "step 40: enough of the starting weights is preserved again"
    assert sentences[0] in written(run)[1].text


def test_steps_between_two_lines_of_the_log_count(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    lines = ({"event": "start", "step": 0, "global_batch": 8, "time": "2026-01-01T00:00:00+00:00"},
             {"event": "end", "step": 4, "time": "2026-01-01T00:01:00+00:00"})  # fmt: skip
    (run / "tries.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = cost(read_run(run))
    assert (found["steps"], found["images seen"]) == ("4", "32")


def test_headlines():
    assert headline({"top1": 3.0}) == 3.0
    assert headline({"top1_k10": 1.0, "top1_k20": 2.0}) == 2.0
    assert headline({"top1_k100": 1.0, "top1_k10": 2.0}) == 2.0
    assert headline({"loss": 1.0}) is None
    assert title_of("knn/random", {"top1_k20": 1.0}) == "k-NN, k = 20: random weights"


# -- pictures: a real run on the demo images


def test_metrics_beside_the_headline(tmp_path):
    """Of k-NN the top-5 of the k that the headline is of; empty columns are left out."""
    knn = {"top1_k20": 40.0, "top5_k20": 70.25, "top5_k10": 60.0, "auroc": 81.5}
    assert plain(accuracy.further(knn)) == "top-5 70.25"
    assert not {"-", " "} & set(accuracy.further(knn)), "a line may break there"
    assert plain(accuracy.further({"top1_k20": 40.0, "auroc": 81.5})) == "AUROC 81.50"
    boxes = {"ap": 32.67, "ap50": 49.34, "mask_ap": 33.5, "mask_ap50": 48.9, "ar_100": 50.0}
    folder = make_run(tmp_path / "run")
    entry = {"metrics": boxes, "protocol": {"weights": "f00"}, "time": "2026-01-01T00:00:00"}
    (folder / "results.json").write_text(json.dumps({"detect": entry}))
    (table,) = accuracy.all_results(read_run(folder)).data
    assert table.header == ["result", "box AP, %", "further, %", "weights", "time (UTC)"]
    shown = [plain(cell) for cell in table.rows[0][1:3]]
    assert shown == ["32.67", "AP50 49.34, mask AP 33.50, mask AP50 48.90"]


def plain(text: str) -> str:
    """With spaces and hyphens that break."""
    return text.replace("\N{NO-BREAK SPACE}", " ").replace("\N{NON-BREAKING HYPHEN}", "-")


def test_pictures_of_a_real_run(run_folder):
    write_atomic(run_folder.path / "metrics.jsonl", '{"step": 1, "loss": 3.0}\n')
    knn.run(KnnConfig(target=run_folder.target(), nb_knn=(20,)))
    text, page = written(run_folder.path, pictures=True)
    missing = "attention maps, patch features: no whole checkpoint"
    assert missing in page.text  # and the others are shown
    assert "not readable" not in page.text
    for part in ("global 2", "local 8", "Class found", "classified as", "principal component"):
        assert part in page.text, part
    found = Images(read_run(run_folder.path)).found
    top1 = json.loads((run_folder.path / "results.json").read_text())["knn"]["metrics"]["top1_k20"]
    assert 100 * found.right.mean() == pytest.approx(top1)  # as knn classifies
    assert page.count("figure", "tile right") + page.count("figure", "tile wrong") == sum(
        8 for _ in neighbors.examples(found, 6, 6)
    )
    assert text.count("data:image/") == page.count("img")


@pytest.mark.parametrize("option", [{"crop_size": 24}, {"mean": (0.5, 0.5, 0.5)}])
def test_features_of_other_input_settings_are_not_taken(run_folder, option):
    knn.run(KnnConfig(target=run_folder.target(**option), nb_knn=(5,)))
    images = Images(read_run(run_folder.path))
    with pytest.raises(InputError, match=r"those cached are of (resize 24, not 32|mean \[0.5)"):
        assert images.found
    knn.run(KnnConfig(target=run_folder.target(), nb_knn=(5,)))  # the remedy
    assert len(images.found.labels) == 48


def test_missing_shards_are_listed(run_folder):
    config = run_folder.path / "config.yaml"
    config.write_text(config.read_text().replace(str(run_folder.data), "/nowhere"))
    record_result(run_folder.path, "knn", {"top1_k20": 30.0}, {})
    _, page = written(run_folder.path, pictures=True)
    parts = "what the network sees, nearest neighbors, confusions, map of the features"
    assert f"{parts}: --data_path /nowhere: no" in page.text
    assert "30.0" in page.text


def test_thousands_of_classes_get_a_table():
    from xcit_dino.report.neighbors import confusions
    from xcit_dino.train.run.reader import Run

    labels = np.arange(3000) % 1500
    predicted = np.where(np.arange(3000) < 2000, labels, (labels + 1) % 1500)
    zeros = np.zeros((3000, 20), np.int64)
    images = Images(Run(Path("run"), {}, [], [], {}))
    images.__dict__["found"] = neighbors.Neighbors(
        labels, zeros, labels, predicted, zeros, zeros, zeros, zeros
    )
    index = type("Index", (), {"classes": None, "labels": labels})()
    images.__dict__["train"] = images.__dict__["val"] = index
    page = Page(str(render("confusions", data=confusions(images))))
    assert "class 500" in page.text and page.count("svg") == 0
    assert page.count("tr") < 250


def test_principal_plane_against_torch():
    points = np.random.default_rng(0).normal(size=(50, 5)) * [5, 1, 3, 1, 1]
    plane, shares = neighbors.principal_plane(points)
    _, strengths, axes = torch.pca_lowrank(torch.from_numpy(points), q=5, niter=20)
    expected = (torch.from_numpy(points - points.mean(0)) @ axes[:, :2]).abs().numpy()
    assert np.abs(plane) == pytest.approx(expected, abs=1e-6)
    assert shares == pytest.approx((strengths**2 / (strengths**2).sum())[:2].numpy(), abs=1e-6)
