"""Recipes of containers and docs/install.md agree with each other and with pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "install.md").read_text()


def docker() -> dict[str, list[str]]:
    """Instruction -> its arguments, of each line of the Dockerfile."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line and not line.startswith("#"):
            instruction, _, arguments = line.partition(" ")
            found.setdefault(instruction, []).append(arguments)
    return found


def apptainer() -> tuple[dict[str, str], dict[str, list[str]]]:
    """The header, and section -> its lines, of apptainer.def."""
    head, *parts = re.split(r"^%", (ROOT / "apptainer.def").read_text(), flags=re.MULTILINE)
    header = dict(re.findall(r"^(\w+): (.+)$", head, re.MULTILINE))
    sections = {}
    for part in parts:
        name, *lines = part.splitlines()
        sections[name] = [line.strip() for line in lines if line.strip()]
    return header, sections


def test_both_recipes_do_the_same():
    made, (header, sections) = docker(), apptainer()
    assert set(made) == {"FROM", "COPY", "RUN", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert set(sections) == {"files", "post", "runscript"}
    assert header == {"Bootstrap": "docker", "From": made["FROM"][0]}
    assert sections["post"] == made["RUN"]
    *sources, target = made["COPY"][0].split()
    assert sections["files"] == [f"{source} {target}" for source in sources]
    assert made["ENTRYPOINT"] == ['["xcit-dino"]']
    assert sections["runscript"] == ['exec xcit-dino "$@"']


def test_a_container_holds_the_wheel_and_nothing_else():
    """A checkout's .venv, data and runs stay out of images."""
    *sources, target = docker()["COPY"][0].split()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored == ["*", *(f"!{source}" for source in sources)]
    for source in sources:
        assert f"{target}{Path(source).name}" in docker()["RUN"][0]


def test_the_page_installs_what_the_recipes_do():
    """The same pip command, elsewhere; and the commands in the recipes' comments."""
    command = docker()["RUN"][0].replace("--no-cache-dir ", "")
    command = command.replace("/opt/xcit-dino/*", "dist/*").replace("/opt/xcit-dino/", "")
    assert command in PAGE
    for name in ("Dockerfile", "apptainer.def"):
        comments = re.findall(r"^# (?:[\w -]+: )?(.+)$", (ROOT / name).read_text(), re.MULTILINE)
        commands = [
            part
            for line in comments
            for part in line.split(" && ")
            if " -" in part or " build" in part
        ]
        assert commands
        for each in commands:
            assert each in PAGE, f"{name}: {each}"


def test_the_lowest_versions_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(
        re.findall(r"^([\w-]+)(?:\[\w+\])?>=([\d.]+)", "\n".join(project["dependencies"]), re.M)
    )
    bounds["python"] = project["requires-python"].removeprefix(">=")
    table = re.findall(r"^\| (\w+) \| ([\d.]+) \|", PAGE, re.MULTILINE)
    assert len(table) == 5
    assert {name.lower(): lowest for name, lowest in table}.items() <= bounds.items()
    extras = re.search(r"with (`s3`.+?)\.\n", PAGE, re.DOTALL)
    assert extras and set(re.findall(r"`(\w+)`", extras[1])) == set(
        project["optional-dependencies"]
    )
