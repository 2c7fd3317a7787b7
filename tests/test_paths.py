"""``~`` in every option that is a path, on the command line and in YAML."""

from __future__ import annotations

import os
import typing
from pathlib import Path
from typing import Any

import pytest

from xcit_dino.cli import COMMANDS, load, make_config
from xcit_dino.command_line import parse
from xcit_dino.errors import InputError
from xcit_dino.options import coerce, option_types, options, replace
from xcit_dino.paths import LOCATION, expand
from xcit_dino.slurm.config import LaunchConfig
from xcit_dino.slurm.stages import launch_config, return_class
from xcit_dino.slurm.tools.rehearse import rehearse_config
from xcit_dino.ssl.config import PretrainConfig

WORDS = {  # options that are text and no path
    "arch", "teacher_model", "split", "aa", "prefix", "may_change", "label_column", "splits",
    "partition", "account", "qos", "constraint", "exclude", "comment", "mem", "slurm", "job_name",
    "stages", "setup", "stage", "masks", "mask_classes", "image_key", "label_key", "pixels",
    "window", "boxes", "group_column",
}  # fmt: skip
CLASSES = {
    name: made if isinstance(made := load(command.config), type) else return_class(made)
    for name, command in COMMANDS.items()
    if name not in ("launch", "launch rehearse")
} | {"launch": LaunchConfig}


def kinds(kind: Any) -> set[Any]:
    """All types and marks inside an annotation."""
    inside = (typing.get_args(kind) or ()) if typing.get_origin(kind) is not typing.Literal else ()
    return {kind} | set().union(*(kinds(part) for part in inside))


def paths(config_class: type) -> list[str]:
    """Options that are paths or locations."""
    types = option_types(config_class).items()
    return [name for name, kind in types if {Path, LOCATION} & kinds(kind)]


@pytest.mark.parametrize("command", CLASSES)
def test_text_is_a_path_or_known_to_be_none(command: str) -> None:
    """A new option of text has to be a Path, a Location, or in the list above."""
    types = option_types(CLASSES[command])
    text = {name for name, kind in types.items() if str in kinds(kind)}
    assert text - set(paths(CLASSES[command])) <= WORDS


@pytest.mark.parametrize("command", CLASSES)
def test_a_home_folder_in_every_path(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config_class = CLASSES[command]
    names = paths(config_class)
    try:
        default = config_class()
    except (InputError, TypeError):
        pytest.skip("has no defaults")
    given = {name: "~/x.safetensors" for name in names}
    lists = {
        name
        for name in names
        if tuple in map(typing.get_origin, kinds(option_types(config_class)[name]))
    }
    given |= {name: ["~/x.safetensors", "~/y"] for name in lists}
    found = dict(options(replace(default, given)))
    assert all("~" not in str(found[name]) for name in names)
    assert all(str(found[name]) == f"{tmp_path}/x.safetensors" for name in set(names) - lists)


def test_the_command_line_and_files_open_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("output_dir: ~/run\nepochs: 3\n")
    make = load(COMMANDS["pretrain"].config)
    config = make(["--config=~/own.yaml", "--data_path=~/shards"], "pretrain")
    assert config.run.output_dir == tmp_path / "run" and config.run.epochs == 3
    assert str(config.loader.data_path) == str(tmp_path / "shards")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("arch: xcit_nano_12_p16\n")
    tuned = load(COMMANDS["finetune"].config)(["--pretrained_weights", "~/run"], "finetune")
    assert tuned.run.output_dir == tmp_path / "run" / "finetune"
    made = load(COMMANDS["shards make"].config)
    packed = parse(made(), ["~/photos", "~/shards"], "make")
    assert (packed.src, packed.dst) == (f"{tmp_path}/photos", tmp_path / "shards")
    checked = parse(load(COMMANDS["shards check"].config)(), ["~/shards"], "check")
    assert checked.dst == f"{tmp_path}/shards"


def test_the_launcher_opens_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "defaults.yaml").write_text("shared_dir: ~/big\n")
    words = ["--arch", "xcit_nano_12_p16", "--launch_defaults=~/defaults.yaml"]
    assert launch_config(words).run == tmp_path / "big" / "xcit_nano_12_p16"
    assert rehearse_config(words[2:]).folder == tmp_path / "big" / "rehearsal"
    named = launch_config(
        [*words, "--output_dir", "~/run", "--stages", "pretrain,knn", "--knn.data_path=~/s"]
    )
    assert named.run == tmp_path / "run"
    assert named.stages[1].config.target.data_path == f"{tmp_path}/s"
    assert rehearse_config(["--output_dir=~/try"]).folder == tmp_path / "try"


def test_what_is_no_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert expand("pipe:cat ~/x/{shard}") == "pipe:cat ~/x/{shard}"
    assert expand("s3://bucket/~x") == "s3://bucket/~x"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="~nobody-here/x: no user 'nobody-here'") as error:
        expand("~nobody-here/x")
    remedy = str(error.value).partition("absolute path (")[2].partition(")")[0]
    assert expand(remedy) == os.path.abspath("~nobody-here/x")


def test_a_home_folder_that_does_not_exist_is_refused_with_the_option():
    with pytest.raises(InputError, match="cache_dir: ~nobody-here/x: no user 'nobody-here'"):
        replace(PretrainConfig(), {"cache_dir": "~nobody-here/x"})


@pytest.mark.parametrize("command", CLASSES)
def test_an_empty_path_is_refused(command: str) -> None:
    config_class = CLASSES[command]
    for name in paths(config_class):
        nothing: Any = ""
        if tuple in map(typing.get_origin, kinds(option_types(config_class)[name])):
            nothing = [""]
        with pytest.raises(InputError, match="^an empty path; write . for"):
            coerce(nothing, option_types(config_class)[name])


def test_an_empty_path_on_the_command_line() -> None:
    for command, words in (
        ("pretrain", ["--output_dir", ""]), ("pretrain", ["--config="]),
        ("finetune", ["--pretrained_weights", " "]), ("shards make", ["photos", "", ]),
    ):  # fmt: skip
        with pytest.raises(InputError, match="^--.*: an empty path; write . for"):
            make_config(command, words)
