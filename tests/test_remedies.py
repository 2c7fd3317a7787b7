"""Every message that names an option or a command: it is printed, and its advice works."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ARCH
from tests.native_sets import make_set
from tests.remedies import ELSEWHERE, PARSED, PRETRAIN, RUN, Case
from xcit_dino import cli
from xcit_dino.data.pack.demo import make
from xcit_dino.data.shards.config import DemoConfig
from xcit_dino.errors import InputError
from xcit_dino.models.zoo import create_model

ROOT = Path(__file__).parents[1]
ENDINGS = {"InputError", "RunError", "Stopped", "warn"}
NAMES_REMEDY = re.compile(r"--[\w{]|xcit-dino \w|pip install")


def texts(node: ast.expr) -> list[str]:
    """What a message may be, ``{}`` where something is filled in."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        parts = (v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
        return ["".join(map(str, parts))]
    if isinstance(node, ast.BinOp):
        return [f"{a}{b}" for a in texts(node.left) for b in texts(node.right)]
    if isinstance(node, ast.IfExp):
        return [*texts(node.body), *texts(node.orelse)]
    return ["{}"]


def messages() -> Iterator[str]:
    """The messages of the package that name an option or a command."""
    walk = os.walk(ROOT / "xcit_dino", followlinks=True)
    for path in (Path(folder, n) for folder, _, files in walk for n in files if n.endswith(".py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name in ENDINGS:
                    yield from filter(NAMES_REMEDY.search, texts(node.args[0]))


MESSAGES = sorted(set(messages()))


def matches(part: str, text: str) -> bool:
    """Whether a message of the code is the one meant: by a part of it, or after ``=`` by all."""
    return text == part[1:] if part.startswith("=") else part in text


def template(message: str) -> str:
    """The shortest message of the code that a case stands for."""
    found = [text for text in MESSAGES if matches(message, text)]
    assert found, f"no message holds {message!r}"
    return min(found, key=len)


def test_every_message_has_a_case_or_a_reason() -> None:
    """A new message joins tests/remedies.py: with a case, or with the reason why it has none."""
    known = [one.message for one in (*PARSED, *RUN)] + list(ELSEWHERE)
    missing = [text for text in MESSAGES if not any(matches(p, text) for p in known)]
    assert missing == []
    assert [part for part in known if not any(matches(part, text) for text in MESSAGES)] == []


def pattern(message: str) -> str:
    """The message as a regular expression for what is printed."""
    return ".*".join(map(re.escape, template(message).split("{}")))


# -- the folders -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, demo_shards: Path) -> Path:
    """What the command lines work on, made once."""
    folder = tmp_path_factory.mktemp("remedies")
    for number in range(8):
        image = Image.new("RGB", (40, 40), (30 * number, 90, 200 - 20 * number))
        places = [
            f"photos/{'ab'[number % 2]}",
            "flat",
            "mixed/val",
            f"mixed/train/{'ab'[number % 2]}",
        ]
        places += [f"parts/{split}/{'ab'[number % 2]}" for split in ("train", "val")]
        for place in places:
            (folder / place).mkdir(parents=True, exist_ok=True)
            image.save(folder / place / f"{number}.png")
        for place in ("kinds", "deep"):
            (folder / place).mkdir(parents=True, exist_ok=True)
        image.save(folder / "kinds" / f"{number}.png")
        deep = np.full((40, 40), 400 * number, np.uint16)
        for place in ("kinds/deep", "deep/"):
            Image.fromarray(deep).save(folder / f"{place}{number}.png")
        (folder / "others" / "cd"[number % 2]).mkdir(parents=True, exist_ok=True)
        image.save(folder / "others" / "cd"[number % 2] / f"{number}.png")
    make(DemoConfig(folder / "redrawn", train=96, val=48, seed=1))
    make_set(folder / "bands", 5, "uint16", train=96, val=48, size=32)
    lines = [f"{n}.png,{'ab'[n % 2]}" for n in range(8)]
    (folder / "mixed.csv").write_text("\n".join(["name,label", *lines]) + "\n")
    (folder / "classes.txt").write_text("a\nb\n")
    torch.manual_seed(0)
    network = create_model(ARCH, num_classes=5).state_dict()
    bare = {k: v for k, v in network.items() if not k.startswith("head.")}
    half = {k: v for k, v in bare.items() if not k.startswith("norm.")}
    (folder / "heads").mkdir()
    torch.save(network, folder / "heads" / "classifier.pth")
    torch.save(
        {"teacher": {f"backbone.{k}": v for k, v in half.items()}}, folder / "heads/half.pth"
    )
    for name, size in (("other", (3, network["head.weight"].shape[1])), ("wide", (3, 7))):
        head = {"linear.weight": torch.zeros(size), "linear.bias": torch.zeros(size[0])}
        torch.save(head, folder / "heads" / f"{name}.pth")
    assert cli.main(["shards", "make", str(folder / "parts"), str(folder / "packed")]) == 0
    line = PRETRAIN.format(tmp=folder) + f" --data_path {demo_shards}"
    assert cli.main(shlex.split(line)) == 0
    return folder


@pytest.fixture
def places(
    base: Path, demo_shards: Path, run_folder, unlabeled: Path, tmp_path: Path
) -> dict[str, Path]:
    """Where each name in a command line leads; what a command may change is a copy."""
    tmp = tmp_path / "own"
    tmp.mkdir()
    (tmp / "list.yaml").write_text("- 1\n")
    (tmp / "broken.yaml").write_text("a: [1\n")
    (tmp / "others.txt").write_text("x\ny\n")
    copied = {"run": base / "run", "packed": base / "packed"}
    for name, source in copied.items():
        shutil.copytree(source, tmp_path / "copies" / name)
    for split in ("train", "val"):
        shutil.copytree(demo_shards / split, tmp_path / "copies" / "damaged" / split)
        shutil.copytree(
            demo_shards / split,
            tmp_path / "copies" / "away" / split,
            ignore=shutil.ignore_patterns("*.tar"),
        )
        (tmp_path / "copies" / "tars" / split).mkdir(parents=True)
        for tar in (demo_shards / split).glob("*.tar"):
            shutil.copy(tar, tmp_path / "copies" / "tars" / split)
    next((tmp_path / "copies" / "damaged" / "train").glob("index.*.npy")).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    shutil.copytree(base / "packed" / "train", tmp_path / "copies" / "trainonly" / "train")
    own = {
        name: tmp_path / "copies" / name
        for name in (*copied, "damaged", "tars", "away", "trainonly")
    }
    given = {
        name: base / name
        for name in (
            "photos",
            "flat",
            "mixed",
            "parts",
            "heads",
            "others",
            "redrawn",
            "kinds",
            "deep",
            "bands",
        )
    }
    return own | given | {
        "tmp": tmp, "empty": tmp_path / "empty", "classes": base / "classes.txt",
        "shards": demo_shards, "plain": unlabeled, "weights": run_folder.weights,
    }  # fmt: skip


def names(one: Case) -> str:
    return one.message


# -- the cases -------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", PARSED, ids=names)
def test_the_parser_s_remedies(one: Case, places: dict[str, Path]) -> None:
    with pytest.raises(InputError) as refusal:
        parse(one.bad, places)
    assert re.search(pattern(one.message), str(refusal.value)), refusal.value
    for line in one.good:
        parse(line, places)


def parse(line: str, places: dict[str, Path]) -> object:
    """The config that a command line comes to."""
    name, rest = cli.find_command(shlex.split(line.format(**places)))
    assert name is not None
    return cli.make_config(name, rest)


@pytest.mark.parametrize("one", RUN, ids=names)
def test_the_commands_remedies(
    one: Case, places: dict[str, Path], capfd: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(places["tmp"])
    code = cli.main(shlex.split(one.bad.format(**places)))
    said = capfd.readouterr().err
    assert code in (1, 2) and re.search(pattern(one.message), said), said
    for line in one.good:
        words = shlex.split(line.format(**places))
        assert cli.main(words) == 0, (words, capfd.readouterr().err)
