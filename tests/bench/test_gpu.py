"""bench/gpu/run.py on a CPU: every part with small sizes, and what is left where one is cut off or
a package is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from bench.gpu.notes import Notes, markdown
from bench.gpu.run import PARTS, install

ROOT = Path(__file__).parents[2]


def run(out: Path, *words: str, **environment: str) -> tuple[str, dict[str, dict]]:
    """(what was printed, notes of the parts by name)."""
    command = [sys.executable, "bench/gpu/run.py", "--device", "cpu", "--tiny", "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [*command, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=850
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads((out / "results.json").read_text())["parts"]
    return done.stdout, {part["name"]: part for part in parts}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_runs_on_a_cpu(tmp_path):
    printed, parts = run(tmp_path, "--minutes", "14")
    logs = {name: (tmp_path / f"{name}.log").read_text()[-3000:] for name in parts}
    ended = {name: (part["state"], part["why"]) for name, part in parts.items()}
    assert ended == dict.fromkeys(PARTS, ("done", "")), (ended, logs)
    for name, part in parts.items():
        assert part["tables"] and all(table["rows"] for table in part["tables"]), name
        for table in part["tables"]:
            assert {len(row) for row in table["rows"]} == {len(table["header"])}, name
    page = (tmp_path / "results.md").read_text()
    assert all(f"\n## {name}: " in page for name in PARTS) and "| step, images/s |" in page
    assert parts["step_p16"]["numbers"]["images_per_second"] > 0
    assert (tmp_path / "profile_trace.json.gz").stat().st_size > 1000
    assert "results.md" in printed


def test_a_part_that_is_cut_off_leaves_its_rows(tmp_path, monkeypatch):
    file = tmp_path / "sitecustomize.py"  # the machine part stops for good after its first row
    file.write_text(
        "import time, bench.gpu.notes as n\n"
        "row = n.Notes.row\n"
        "def slow(self, *cells):\n"
        "    row(self, *cells)\n"
        "    time.sleep(600 * (self.found['name'] == 'machine'))\n"
        "n.Notes.row = slow\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    out = tmp_path / "out"
    _, parts = run(out, "--part", "machine", "step_p8", "--minutes", "0.25", PYTHONPATH=path)
    assert parts["machine"]["state"] == "stopped" and parts["machine"]["why"] == "its time limit"
    assert len(parts["machine"]["tables"][0]["rows"]) == 1
    assert (parts["step_p8"]["state"], parts["step_p8"]["why"]) == ("skipped", "no time was left")


def test_a_part_without_its_packages_is_skipped(tmp_path):
    """As on a machine that has only torch, torchvision, numpy and timm."""
    (tmp_path / "faiss.py").write_text("raise ModuleNotFoundError('no', name='faiss')")
    out = tmp_path / "out"
    _, parts = run(out, "--part", "knn", "machine", PYTHONPATH=str(tmp_path))
    assert (parts["knn"]["state"], parts["knn"]["why"]) == (
        "skipped",
        "faiss is not installed here",
    )
    assert parts["machine"]["state"] == "done"
    assert "Skipped after" in (out / "results.md").read_text()


def test_wheels_are_unpacked_and_those_of_another_python_named(tmp_path):
    """On a Python that may have no pip."""
    assert install(None, tmp_path) == ""
    wheels, this = tmp_path / "wheels", f"cp3{sys.version_info.minor}"
    wheels.mkdir()
    assert "holds no wheels" in install(wheels, tmp_path)
    kinds = {"a": "py2.py3-none-any", "b": f"{this}-{this}-linux", "c": "cp36-abi3-linux"}
    for name, tag in (kinds | {"d": "cp27-cp27m-linux"}).items():
        with ZipFile(wheels / f"{name}-1.0-{tag}.whl", "w") as archive:
            archive.writestr(f"{name}.py", f"name = {name!r}")
    assert install(wheels, tmp_path).endswith(": d-1.0-cp27-cp27m-linux.whl\n")
    assert sorted(path.stem for path in (tmp_path / "packages").iterdir()) == list(kinds)


def test_a_part_finds_what_the_wheels_hold(tmp_path):
    """Before anything else of that name."""
    with ZipFile(tmp_path / "pytest-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("pytest.py", "raise ModuleNotFoundError('no', name='the_wheel')")
    _, parts = run(tmp_path / "out", "--part", "tests", "--wheels", str(tmp_path))
    assert parts["tests"]["why"] == "the_wheel is not installed here"


def test_a_page_of_results():
    notes = [{
        "name": "knn", "about": "k-NN", "state": "stopped", "why": "its time limit", "seconds": 3.2,
        "tables": [{"title": "Bank", "header": ["", "s"], "rows": [["ours | mine", "1"]]}],
    }]  # fmt: skip
    page = markdown(notes, "On cuda", "Commit 1.")
    assert page.splitlines() == [
        "# On cuda", "", "Commit 1.", "", "## knn: k-NN", "",
        "Stopped after 3 s: its time limit.", "", "Bank:", "",
        "|  | s |", "| --- | --- |", "| ours / mine | 1 |",
    ]  # fmt: skip


def test_notes_are_on_disk_after_every_row(tmp_path):
    notes = Notes(tmp_path / "a.json", "a", "about")
    notes.table("T", "x")
    notes.row("first", 1)
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["tables"] == [{"title": "T", "header": ["", "x"], "rows": [["first", "1"]]}]
    assert found["state"] == "running"
