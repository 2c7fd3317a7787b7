"""One import name over the folders, and Python's own ``ssl`` intact however a program starts."""

from __future__ import annotations

import ast
import os
import re
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("data", "models", "train", "eval", "ssl", "supervised", "report", "slurm")
IS_STDLIB = (
    "import ssl; assert hasattr(ssl, 'SSLContext'), ssl.__path__; import xcit_dino.ssl.config"
)


def test_every_folder_is_linked_into_the_package():
    for name in (*FOLDERS, "configs"):
        assert (ROOT / "xcit_dino" / name).resolve() == ROOT / name


def test_no_folder_is_a_regular_package():
    """A top-level ssl/__init__.py would hide the standard library's ssl from anything run here."""
    assert not [file for name in FOLDERS for file in (ROOT / name).rglob("__init__.py")]
    assert not (ROOT / "conftest.py").exists()
    assert hasattr(ssl, "SSLContext")


def test_no_file_carries_the_name_of_an_importable_module():
    """slurm/ is first on sys.path when launch.py runs, and the same could be any folder."""
    installed = sys.stdlib_module_names | {
        "submitit",
        "torch",
        "timm",
        "faiss",
        "webdataset",
        "yaml",
    }
    for folder in FOLDERS:
        assert not {f.stem for f in (ROOT / folder).rglob("*.py")} & installed


SPAWN = """
import multiprocessing, ssl
def child(_):
    import ssl
    return hasattr(ssl, "SSLContext")
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(child, [0]) == [True]
"""
SUBMITIT = """
import submitit, sys
def task():
    import ssl, xcit_dino.ssl.config
    return hasattr(ssl, "SSLContext")
executor = submitit.AutoExecutor(folder=sys.argv[1], cluster="local")
executor.update_parameters(timeout_min=1)
assert executor.submit(task).result() is True
"""


@pytest.mark.parametrize(
    "command",
    [
        ["-c", IS_STDLIB],
        ["-m", "pytest", "--version"],
        ["-m", "asyncio", "--help"],
        ["slurm/launch.py", "--help"],
        ["-m", "xcit_dino.cli", "--help"],
    ],
    ids=lambda c: " ".join(c)[:24],
)
def test_python_starts_from_the_root(command):
    subprocess.run(
        [sys.executable, *command], cwd=ROOT, check=True, capture_output=True, timeout=60
    )


def test_a_script_with_spawned_workers_starts_from_the_root(tmp_path):
    (tmp_path / "spawn.py").write_text(SPAWN)
    subprocess.run([sys.executable, tmp_path / "spawn.py"], cwd=ROOT, check=True, timeout=60)


def test_a_submitit_job_starts_from_the_root(tmp_path):
    (tmp_path / "job.py").write_text(SUBMITIT)
    command = [sys.executable, tmp_path / "job.py", tmp_path / "logs"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)


def test_torchrun_starts_from_the_root(tmp_path):
    (tmp_path / "job.py").write_text(IS_STDLIB)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", tmp_path / "job.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, env=env, capture_output=True)


# -- layers: data, models < train < eval < ssl, supervised < report < slurm

BELOW = {
    "data": set(),
    "models": set(),
    "train": {"data", "models"},
    "eval": {"data", "models", "train"},
    "ssl": {"data", "models", "train", "eval"},
    "supervised": {"data", "models", "train", "eval"},
    "report": {"data", "models", "train", "eval", "ssl", "supervised"},
    "slurm": {"data", "models", "train", "eval", "ssl", "supervised", "report"},
}
MOST_FILES = 16  # in a folder of code: what does not fit wants a room of its own


def imported(path: Path) -> set[str]:
    """Names of all modules a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_from_those_before_it(folder):
    for path in (ROOT / folder).rglob("*.py"):
        names = imported(path)
        ours = {n.split(".")[1] for n in names if n.startswith("xcit_dino.")} & set(FOLDERS)
        assert ours <= BELOW[folder] | {folder}, path
        if folder != "slurm":
            assert not any(n.split(".")[0] == "submitit" for n in names), path


def test_no_folder_of_code_is_crowded():
    rooms = (*FOLDERS, "bench")
    folders = [ROOT / name for name in rooms]
    folders += [sub for name in rooms for sub in (ROOT / name).rglob("*") if sub.is_dir()]
    crowded = {f: n for f in folders if (n := len(list(f.glob("*.py")))) > MOST_FILES}
    assert not crowded


def test_names_of_functions_in_strings_exist():
    """A job loads them, long after the command line was accepted."""
    for folder in (*FOLDERS, "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for module, name in re.findall(r'"(xcit_dino(?:\.\w+)+):(\w+)"', path.read_text()):
                file = ROOT / f"xcit_dino/{module.split('.', 1)[1].replace('.', '/')}.py"
                there = re.findall(r"^(?:def|class) (\w+)|^([A-Z]+) =", file.read_text(), re.M)
                assert name in {word for pair in there for word in pair}, (path, module, name)
