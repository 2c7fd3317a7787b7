"""Change one option of a command and observe its effect: the basis of test_options.py.

A command is run in this process, in a folder of its own that holds the same few files each time, so
that two outcomes differ only in what an option makes of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from xcit_dino.cli import main

CHANGING = re.compile(  # times, rates and memory in what is printed
    r"\d+:\d\d(:\d\d)?|(img/s|wait|GiB|eta|took|first step) +[\d.,%:]+|[\d.,]+ a second"
    r"|after [\d.]+ s|[\d.]+ (ms|s)\b|job \d+|\d{4}-\d\d-\d\d[T ]\S*|about [\d,]+"
    r"|--num_workers \d+ would"
)


@dataclass(frozen=True)
class Turn:
    """Another value, or several, of one option, and where it has to be seen."""

    values: tuple[str, ...]
    """Words after the option; one entry a value."""
    shows: str = ""
    """The part of the :class:`Outcome` in which the values have to differ from the base command's
    and from each other."""
    given: dict[str, str] = field(default_factory=dict)
    """Options that the base command gets too."""
    before: dict[str, str] | None = None
    """Options of a first run of the command in the same folder."""
    within: Callable[[pytest.MonkeyPatch], None] | None = None
    """What befalls the command."""
    refused: str = ""
    """Part of the one line by which the values are refused."""


def turn(*values: str, shows: str = "", **rest: Any) -> Turn:
    """``turn("0.1", shows="weights")``"""
    return Turn(values, shows, **rest)


def refused(*values: str, by: str, **rest: Any) -> Turn:
    """Values that end in one line and exit code 2."""
    return Turn(values, refused=by, **rest)


@dataclass
class Outcome:
    """What a command has left."""

    folder: Path
    code: int
    printed: str
    calls: list[Any]

    @cached_property
    def files(self) -> list[str]:
        """Names of all files that are there."""
        paths = (p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*"))
        return sorted(re.sub(r"(tfevents|hparams/).*", r"\1", path) for path in paths)

    @cached_property
    def contents(self) -> dict[str, str]:
        """Checksums of the files that hold what was computed or packed."""
        kinds = (".tar", ".npy", ".png", ".csv", ".gif", ".pth", ".safetensors", ".html", ".onnx")
        kinds += (".pdparams", ".md", "index.json")
        return {
            path.relative_to(self.folder).as_posix(): hashlib.sha256(
                re.sub(rb"Written [^<]*", b"", path.read_bytes())
            ).hexdigest()
            for path in sorted(self.folder.rglob("*"))
            if path.name.endswith(kinds) and path.is_file() and not path.is_symlink()
        }

    @cached_property
    def features(self) -> list[str]:
        """Checksums of the cached features."""
        return sorted(v for k, v in self.contents.items() if "/features/" in k)

    @cached_property
    def weights(self) -> str:
        """Checksum of all networks in the newest checkpoint of ``new``."""
        newest = max((self.folder / "new/checkpoints").glob("*.pth"), key=lambda path: path.name)
        state = torch.load(newest, weights_only=True)
        found = hashlib.sha256()
        for name in (
            "student",
            "teacher",
            "loss",
            "model",
            "Student",
            "model_ema",
            "segmenter",
            "detector",
        ):
            for key, value in state.get(name, {}).items():
                found.update(f"{key} {tuple(value.shape)}".encode() + value.numpy().tobytes())
        return found.hexdigest()

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """Lines of metrics.jsonl without times and memory."""
        text = (self.folder / "new/metrics.jsonl").read_text()
        unsteady = r"time|seconds|images_per_s|data_wait|memory|seconds"
        return [
            {k: v for k, v in json.loads(line).items() if not re.search(unsteady, k)}
            for line in text.splitlines()
        ]

    @cached_property
    def accuracies(self) -> dict[str, Any]:
        """Metrics and chosen point of every result in every folder."""
        return {
            f"{path.parent.name}/{name}": (entry["metrics"], entry.get("grid"))
            for path in self.folder.rglob("results.json")
            for name, entry in json.loads(path.read_text()).items()
        }


def run(
    words: list[str], folder: Path, *, within: Any = None, spy: Any = None, before: Any = None
) -> Outcome:
    """One command line in its folder."""
    calls: list[Any] = []
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.chdir(folder)
        for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HOME"):
            patch.setenv(name, str(folder / "home"))
        if before is not None:
            quietly(before)
        if within is not None:
            within(patch)
        if spy is not None:
            spy(patch, calls.append)
        torch.manual_seed(0)
        code, printed = quietly(words)
    return Outcome(folder, code, tidy(printed, folder), calls)


def quietly(words: list[str]) -> tuple[int, str]:
    """Exit code and everything that was printed."""
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = main(words)
    return code, text.getvalue()


def done(words: list[str], said: str = "") -> None:
    """Run a command that has to succeed."""
    code, printed = quietly(words)
    assert code == 0, f"{said or words}\n{printed[-3000:]}"


def tidy(printed: str, folder: Path) -> str:
    """What was printed, without what differs each time."""
    return CHANGING.sub("", printed.replace(str(folder.resolve()), "").replace(str(folder), ""))


def words_of(command: str, options: dict[str, str], positionals: tuple[str, ...]) -> list[str]:
    """A command line; positional arguments by name."""
    first = [w for name in positionals for w in options.get(name, "").split()]
    rest = {k: v for k, v in options.items() if k not in positionals}
    flags = (w for k, v in rest.items() for w in (f"--{k}", *split(v)))
    return [*command.split(), *first, *flags]


def split(value: str) -> list[str]:
    """``"1 2"`` are two words; a value in quotes is one."""
    return [value[1:-1]] if value.startswith("'") else value.split()


def fresh(folder: Path, source: Path) -> Path:
    """A copy of the files that every command finds; large ones are links."""

    def copy(source: str, target: str) -> None:
        large = source.endswith((".pth", ".tar"))
        (os.symlink if large else shutil.copyfile)(source, target)

    shutil.copytree(source, folder, copy_function=copy)
    return folder
