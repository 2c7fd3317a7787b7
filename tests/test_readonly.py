"""Commands that read a run folder, where it cannot be written to: they do their work, and not a
byte or a time in it changes. One that would write there is refused before its work begins."""

from __future__ import annotations

import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import crowd
from tests.crowd import AUGMENTED, COMMANDS, DINO, KEYS, SUPERVISED, TEACHER

ELSEWHERE = f"--output_dir own/new --pretrained_weights run {KEYS}"
READING = {  # the run is the source, and what is written goes elsewhere
    "knn": f"knn {ELSEWHERE} --nb_knn 5 --baselines",
    "linear": f"linear {ELSEWHERE} --epochs 2",
    "linear, dino": f"linear {ELSEWHERE} --epochs 2 {AUGMENTED}",
    "evaluate": f"evaluate {ELSEWHERE} --pretrained_weights tuned.pth --data_path shards "
    "--arch xcit_pico_6_p8",
    "evaluate --head": f"evaluate {ELSEWHERE} --head run/linear_head.safetensors",
    "embed": f"embed {ELSEWHERE} --examples 2",
    "report": "report run other --output own/page.html",
    "finetune": f"finetune {SUPERVISED} --output_dir own/new",
    "distill": f"distill {SUPERVISED} {TEACHER} --output_dir own/new",
} | {
    name: COMMANDS[name]
    for name in (
        "pretrain from it", "attention", "watch", "report compare", "weights extract",
        "weights convert", "weights export", "launch status", "launch logs",
    )
}  # fmt: skip
INSIDE = {  # the read-only folder is where they would write
    name: COMMANDS[name]
    for name in (
        "pretrain", "knn", "linear", "linear, dino", "evaluate", "evaluate --head", "embed",
        "finetune", "distill", "report", "launch", "launch cancel",
    )
} | {
    "embed elsewhere": f"embed run/out {ELSEWHERE}",
    "attention": "attention photos run/out --output_dir run --device cpu --image_size 32",
    "report --output": "report other --output run/out.html",
    "weights extract": "weights extract run --output run/out.pth --prefix teacher",
    "weights convert": "weights convert run --output run/out.safetensors",
    "weights export": "weights export run --output run/out.safetensors",
    "pretrain from it": f"pretrain --output_dir run/out {DINO} --init_from run",
}  # fmt: skip
WAYS = [
    crowd.read_only_by_mount,
    pytest.param(crowd.read_only_by_mode, marks=pytest.mark.faults),
]


@pytest.fixture(params=WAYS, ids=["mount", "mode"])
def locked(request: pytest.FixtureRequest, crowd_place: Path) -> Any:
    """A new ``run``, and what makes it read-only for a process."""
    if not crowd.works(crowd_place, request.param):
        pytest.skip("this process may not make a folder read-only in this way")
    crowd.renew(crowd_place)
    yield partial(request.param, crowd_place / "run")
    for path in (crowd_place / "run").rglob("*"):
        path.chmod(path.stat().st_mode | 0o700)
    (crowd_place / "run").chmod(0o755)


@pytest.mark.parametrize("name", READING)
def test_reading_changes_nothing(name: str, locked: Any, crowd_place: Path) -> None:
    before = crowd.contents(crowd_place / "run")
    found = crowd.alone(crowd_place, READING[name], "own-0", locked)
    assert found.code == 0 and "Traceback" not in found.err, found.said
    assert crowd.contents(crowd_place / "run") == before


@pytest.mark.parametrize("name", INSIDE)
def test_writing_is_refused_first(name: str, locked: Any, crowd_place: Path) -> None:
    """In one line, before any work; and what it advises, done by the letter, works."""
    before = crowd.contents(crowd_place / "run")
    found = crowd.alone(crowd_place, INSIDE[name], "own-0", locked)
    assert found.code == 2 and found.err.count("\n") == 1 and not found.out, found.said
    assert crowd.contents(crowd_place / "run") == before
    if name == "launch cancel":
        assert "where and as whom the run was launched" in found.err
        return
    again = crowd.alone(crowd_place, advised(INSIDE[name], found.err), "own-1", locked)
    assert again.code == 0, f"{found.err}\n{again.said}"
    assert crowd.contents(crowd_place / "run") == before


def advised(words: str, message: str) -> str:
    """A command line after the advice at the end of a message."""
    if options := re.search(r".*: (--\w+ .*)$", message):
        return f"{words} {options[1]}".replace("ELSEWHERE", "own/it").replace("FILE", "own/it")
    assert re.search(r"(choose|name) (another folder|a file in another folder)", message), message
    return words.replace("run/out", "own/out")


def test_every_command_is_here() -> None:
    from xcit_dino import cli

    def called(words: str) -> str:
        name, _ = cli.find_command(shlex.split(words))
        assert name is not None
        return name

    known = {called(words) for words in COMMANDS.values()} | set(crowd.OTHERS)
    assert known == set(cli.COMMANDS)
    # launch cancel changes a run; what it and launch do on a read-only one is refused above
    reads = {called(words) for words in READING.values()}
    assert {called(words) for words in COMMANDS.values()} - reads == {"launch", "launch cancel"}
