"""Options from YAML and flags: precedence, types, and every refusal in one line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import tyro

from xcit_dino import cli
from xcit_dino.command_line import parse, pop_option
from xcit_dino.errors import InputError
from xcit_dino.options import differing, dump_yaml, option_types, options, read_yaml, replace
from xcit_dino.ssl.config import pretrain_config
from xcit_dino.supervised.config import finetune_config
from xcit_dino.train.config import OptimConfig, RunConfig
from xcit_dino.train.run.folder import check_run, open_run


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


# -- options that do nothing beside the others


INEFFECTIVE = [
    ("pretrain --local_crops_number 0", "--local_crops_size 48", "--local_crops_scale 0.1 0.2"),
    ("pretrain --color_jitter_prob 0", "--color_jitter 0.1 0.1 0.1 0.1"),
    ("pretrain --color_jitter 0 0 0 0", "--color_jitter_prob 0.5"),
    ("pretrain --blur_prob 0 0 0", "--blur_sigma 1 2"),
    ("pretrain --head_nlayers 1", "--head_hidden_dim 64"),
    ("pretrain --warmup_epochs 0", "--warmup_lr 0.1"),
    ("pretrain --watchdog_minutes 0", "--on_stall abort"),
    ("pretrain --knn_every 0", "--knn_data_path a"),
    ("pretrain --num_workers 0", "--prefetch_factor 3"),
    ("pretrain --data_path a", "--cache_dir c", "--cache_gb 3"),
    ("pretrain --data_path s3://a", "--cache_gb 3"),
    ("distill --data_path a", "--cache_dir c"),
    ("finetune", "--checkpoint_key student", "--new_head true", "--color_jitter 0.3"),
    ("finetune --reprob 0", "--remode const", "--recount 2"),
    ("finetune --mixup 0 --cutmix 0", "--mixup_mode elem", "--mixup_prob 0.3"),
    ("finetune --cutmix 0", "--mixup_switch_prob 0.3"),
    ("finetune --mixup_prob 0", "--mixup 0.3", "--cutmix 0.3", "--mixup_mode pair"),
    ("distill", "--distillation_tau 3"),
    ("distill --distillation_alpha 0", "--teacher_size 64", "--distillation_type soft"),
    ("distill --distillation_alpha 1", "--smoothing 0.3"),
    ("linear --protocol dino", "--probe_batch_size 8"),
    ("embed --examples 0", "--seed 1"),
    ("report runs/a", "--output_dir b"),
    ("launch", "--array_parallelism 2"),
]


@pytest.mark.parametrize(
    ("line", "option"), [(line, option) for line, *rest in INEFFECTIVE for option in rest]
)
def test_an_option_that_does_nothing_beside_the_others_is_refused(line, option):
    """Also where the command line is that of a recipe, unless it gives the recipe's own value."""

    def parsed(words):
        name, rest = cli.find_command(words.split())
        make = cli.load(cli.COMMANDS[name].config)
        return make(rest, name) if not isinstance(make, type) else parse(make(), rest, name)

    config, name = parsed(line), option.split()[0][2:]
    with pytest.raises(InputError, match=f"--{name}: has no effect .*; leave it out"):
        parsed(f"{line} {option}")
    if line != "launch":
        value = dict(options(config))[name]
        if value is not None:
            words = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            assert parsed(f"{line} --{name} {words}") == config


def test_a_cache_serves_each_remote_data_set():
    words = "--data_path a --knn_every 1 --knn_data_path s3://b --cache_dir c --cache_gb 3"
    assert pretrain_config(words.split()).loader.cache_gb == 3


def test_what_does_nothing_may_stand_in_a_recipe_and_may_change(tmp_path):
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text("reprob: 0\nremode: const\nmixup: 0\ncutmix: 0\nmixup_mode: elem\n")
    words = ["--config", str(recipe), "--output_dir", str(run)]
    before = finetune_config(words)
    assert before.regularization.remode == "const"
    open_run(before, before.run)
    (run / "metrics.jsonl").write_text("{}\n")
    now = replace(before, {"remode": "pixel", "mixup_mode": "batch"})
    check_run(now, now.run)
    with pytest.raises(InputError, match="remode const -> pixel"):
        check_run(replace(now, {"reprob": 0.5}), now.run)
