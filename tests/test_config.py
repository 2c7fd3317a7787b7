"""Options from YAML and flags: precedence, types, and every refusal in one line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import tyro

from xcit_dino.errors import InputError
from xcit_dino.train.config import (
    OptimConfig,
    RunConfig,
    differing,
    dump_yaml,
    option_types,
    options,
    parse,
    pop_option,
    read_yaml,
    replace,
)


@dataclass(frozen=True)
class Both:
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sizes: tuple[int, int] = (224, 96)
    shape: Literal["disk", "ring"] = "disk"
    fast: bool = False
    note: str | None = None


def flags(*argv):
    return parse(Both(), argv, "test")


def test_flags_take_dinos_names_with_underscores_or_dashes():
    config = flags("--batch_size_per_gpu", "8", "--clip-grad=1.5", "--sizes", "32", "16")
    assert config.run.batch_size_per_gpu == 8 and config.optim.clip_grad == 1.5
    assert config.sizes == (32, 16)


@pytest.mark.parametrize(
    "words", [["--fast"], ["--fast", "true"], ["--fast=True"], ["--fast", "1"]]
)
def test_booleans_read_as_in_dino(words):
    assert flags(*words, "--epochs", "3") == replace(Both(), {"fast": True, "epochs": 3})
    assert flags("--fast", "false") == Both()


def test_yaml_round_trip(tmp_path):
    config = replace(
        Both(), {"lr": 1e-5, "output_dir": Path("a b/ü"), "note": "x: [y]", "fast": True}
    )
    (tmp_path / "c.yaml").write_text(dump_yaml(config))
    assert replace(Both(), read_yaml(tmp_path / "c.yaml")) == config


def test_yaml_numbers_in_scientific_notation_are_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text("min_lr: 1e-6\nepochs: 3.0\n")  # YAML 1.1 reads 1e-6 as text
    config = replace(Both(), read_yaml(tmp_path / "c.yaml"))
    assert config.optim.min_lr == 1e-6 and config.run.epochs == 3


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--epoch", "3"], "--epoch; did you mean epochs"),
        (["--epochs", "many"], "epochs"),
        (["--epochs", "0"], "--epochs 0: must be from 1"),
        (["--lr", "nan"], "--lr nan"),
        (["--clip_grad", "-1"], "--clip_grad"),
        (["--lr", "1e30"], "--lr 1e+30"),
        (["--shape", "square"], "shape"),
        (["stray"], "stray"),
    ],
)
def test_bad_flags_are_one_line(argv, words):
    with pytest.raises(InputError) as error:
        flags(*argv)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochz: 3", "'epochz'; did you mean epochs"),
        ("epochs: three", "epochs must be int"),
        ("epochs: 2.5", "epochs must be int"),
        ("fast: 1", "fast must be bool"),
        ("sizes: [1]", "sizes must be"),
        ("- 3", "name: value"),
        ("a: [", "not YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_bad_yaml_is_one_line(text, words, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        replace(Both(), read_yaml(tmp_path / "c.yaml"), source="c.yaml")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match=r"--config nowhere\.yaml: No such file"):
        read_yaml(Path("nowhere.yaml"))


def test_pop_option_takes_the_last():
    argv = ["--config", "a", "--lr", "1", "--config=b"]
    assert pop_option(argv, "config") == ("b", ["--lr", "1"])
    with pytest.raises(InputError, match="--config needs a value"):
        pop_option(["--config"], "config")


def test_every_option_is_listed_once():
    names = [name for name, _ in options(Both())]
    assert len(names) == len(set(names)) == len(option_types(Both))


def test_differing():
    assert differing(Both(), replace(Both(), {"lr": 1.0})) == {"lr": (0.0005, 1.0)}


@dataclass(frozen=True)
class Positions:
    src: tyro.conf.Positional[Path] = tyro.MISSING
    more: tyro.conf.Positional[tuple[int, ...]] = ()
    name: str | None = "x"


def test_options_without_a_flag_take_the_words_left_over():
    config = parse(Positions(), ["a", "--name", "None", "1", "2"], "test")
    assert config == Positions(Path("a"), (1, 2), None)
    with pytest.raises(InputError, match=r"^SRC is missing \(see test --help\)$"):
        parse(Positions(), ["--name", "y"], "test")
    with pytest.raises(InputError, match="'stray' belongs to no option"):
        flags("--epochs", "3", "stray")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "many"], "--epochs many: must be int (see test --help)"),
        (["--epochs"], "--epochs needs a value (see test --help)"),
        (["--sizes", "1"], "--sizes 1: must be 2 values (see test --help)"),
        (
            ["--shape", "dsk"],
            "--shape dsk: must be one of disk, ring; did you mean disk? (see test --help)",
        ),
        (["--fast", "maybe"], "--fast maybe: must be bool (see test --help)"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(argv, message):
    with pytest.raises(InputError) as error:
        flags(*argv)
    assert str(error.value) == message
