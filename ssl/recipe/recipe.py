"""``xcit-dino recipe SHARDS OUT.yaml``: options that fit the data, the machine and the time."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from xcit_dino.cores import usable_cores
from xcit_dino.data.config import LoaderConfig
from xcit_dino.data.io.storage import open_source
from xcit_dino.data.shards.describe import Description, describe, evenly, shorter_side
from xcit_dino.data.shards.index import ShardIndex, is_url, resolve_split
from xcit_dino.errors import InputError, one_line, warn
from xcit_dino.files import check_writable, write_atomic
from xcit_dino.options import options
from xcit_dino.options import replace as with_options
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.fit import misfits
from xcit_dino.ssl.recipe import tables
from xcit_dino.ssl.recipe.augmentation import augmentation
from xcit_dino.ssl.recipe.config import RecipeConfig
from xcit_dino.ssl.recipe.rules import Budget, choose, kind_of, network, per_second
from xcit_dino.ssl.recipe.speed import images_per_second
from xcit_dino.ssl.recipe.tables import Choice
from xcit_dino.train.distributed import dist


def run(config: RecipeConfig) -> None:
    """Choose, print and write a recipe.

    Raises:
        InputError: the file exists, the shards are no training set, or the time is too short.
    """
    refuse_existing(config.out)
    data = described(config.shards)
    print(f"{config.shards}: {data.text}", flush=True)
    budget = budget_of(config, data)
    load = os.getloadavg()[0]
    if budget.device == "cpu" and load > budget.cores / 2:
        warn(
            f"other programs use this machine (a load of {load:.1f} on {budget.cores} cores): the "
            "recipe fits the speed that they leave"
        )
    choices, rate = measured(config, data, budget)
    recipe = config_of(choices)
    lines = misfits(recipe, resolve_split(config.shards, "train"), budget.gpus)
    for choice in choices:
        if choice.reason and choice not in tables.FIXED:
            print(f"{choice.option:<20} {shown(choice.value):<18} {choice.reason}")
    for line in [*recipe.remarks(), *lines, *advice(data, recipe, budget)]:
        warn(line)
    refuse_existing(config.out)
    write_atomic(config.out, text_of(config, data, budget, choices, rate))
    print(f"{config.out} written; start it: {start_of(config)}")


def advice(data: Description, recipe: PretrainConfig, budget: Budget) -> Iterator[str]:
    """What would serve better than any recipe."""
    batch = recipe.run.batch_size_per_gpu * recipe.run.accum_iter * budget.gpus
    steps = recipe.run.epochs * (data.images // batch)
    if steps < tables.LEAST_STEPS:
        yield f"{steps} steps are hardly enough to learn from: take more --hours"
    if data.images < tables.FEW:
        yield (
            f"{data.images:,} images are few to start from random weights; trained weights are a "
            "better start: pretrain --init_from"
        )


def refuse_existing(out: Path) -> None:
    """Raise InputError where there is such a file already, or none can be written."""
    if os.path.lexists(out):
        raise InputError(f"{out}: exists, and is not overwritten; give another name")
    check_writable(out.parent, "choose another folder", str(out))


def described(shards: str) -> Description:
    """The training set, with the number of its validation images.

    Raises:
        InputError: no index, or no image whose size can be read.
    """
    root = resolve_split(shards, "train")
    index = ShardIndex.load(root)
    data = described_there(index) if is_url(root) else describe(Path(root))
    if not data.sides:
        raise InputError(
            f"{shards}: of no image the size can be read; find out why: xcit-dino shards check "
            f"{shards}"
        )
    with contextlib.suppress(InputError):
        val = ShardIndex.load(resolve_split(shards, "val"))
        data = replace(data, val_images=val.num_samples)
    return data


def described_there(index: ShardIndex) -> Description:
    """A set whose shards lie elsewhere."""
    source = open_source(index, LoaderConfig(data_path=index.root))
    found = source.read_many([index.locate(n) for n in evenly(index.num_samples)])
    sides = [shorter_side(raw) for raw in found if isinstance(raw, bytes)]
    highest = int(index.labels.max(initial=-1))
    return Description(
        images=index.num_samples,
        sides=tuple(sorted(side for side in sides if side)),
        channels=index.pixels.channels,
        dtype=index.pixels.dtype,
        classes=max(len(index.classes or ()), highest + 1) if highest >= 0 else 0,
        targets=index.targets,
    )


def budget_of(config: RecipeConfig, data: Description) -> Budget:
    """Time and machine.

    Raises:
        InputError: several GPUs of a machine that has none, or is not to use any.
    """
    device = dist.init(config.device).device.type
    if config.gpus > 1 and device != "cuda":
        raise InputError(f"--gpus {config.gpus}: this is measured on CPUs; leave it out")
    here = min(config.gpus, torch.cuda.device_count() or 1)  # the rest is on other nodes
    return Budget(
        hours=config.hours,
        device=device,
        cores=max(1, usable_cores() // here),
        gpus=config.gpus,
        num_workers=config.num_workers,
        precision=config.precision,
        kind=kind_of(data) if config.kind == "auto" else config.kind,
    )


def measured(config: RecipeConfig, data: Description, budget: Budget) -> tuple[list[Choice], float]:
    """The choices, and the images per second that they rest on: the smallest network is measured,
    then, as long as a larger one seems to pay, that one."""
    rates: dict[str, float] = {}
    while (size := network(data, budget, rates).size) not in rates:
        with tempfile.TemporaryDirectory() as folder:
            lasting = {"output_dir": folder, "epochs": 100_000}  # no schedule comes to its end
            choices = all_choices(config, data, budget, rates)
            recipe = with_options(config_of(choices), lasting)
            print(f"measuring {recipe.model.arch} ...", end=" ", flush=True)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    rates[size] = budget.gpus * images_per_second(recipe)
            except torch.OutOfMemoryError:
                pass  # its tensors are freed when this block is left
        if size in rates:
            print(per_second(rates[size]), flush=True)
        else:
            print("too large for the GPU's memory", flush=True)
            budget = smaller(budget, recipe)
    return all_choices(config, data, budget, rates), rates[size]


def smaller(budget: Budget, recipe: PretrainConfig) -> Budget:
    """With half the images in memory at once.

    Raises:
        InputError: it was one.
    """
    torch.cuda.empty_cache()
    if (images := recipe.run.batch_size_per_gpu // 2) == 0:
        raise InputError(
            f"--device cuda: not one image of {recipe.model.arch} fits into the GPU's memory; free "
            "it, or take --device cpu"
        )
    return replace(budget, most_images=images)


def all_choices(
    config: RecipeConfig, data: Description, budget: Budget, rates: dict[str, float]
) -> list[Choice]:
    """Those of the rules, the augmentation's, and what the command line gives."""
    chosen = choose(data, budget, rates)
    names = {choice.option for choice in chosen}
    chosen += [c for c in augmentation(budget.kind, data) if c.option not in names]
    place = config.shards if is_url(config.shards) else os.path.abspath(config.shards)
    chosen.append(Choice("data_path", place, "data"))
    if config.device != "auto":
        chosen.append(Choice("device", config.device, "time", "the one that was measured"))
    return chosen


def config_of(choices: Sequence[Choice]) -> PretrainConfig:
    """The choices as options of a pretraining."""
    return with_options(PretrainConfig(), {each.option: each.value for each in choices})


# -- the file --------------------------------------------------------------------------------------

TAGS = {
    "data": "follows from the data",
    "time": "follows from the hours and the speed measured on this machine",
    "dino": "default of the official main_dino.py",
    "vissl": "VISSL, configs/config/pretrain/dino/dino_16gpus_xcit_small_12_p16.yaml",
    "ssl4eo": "zhu-xlab/SSL4EO-S12, pretrain_dino_s2c.py (arXiv 2211.07044)",
    "celldino": "facebookresearch/dinov2, dinov2/data/cell_dino",
    "ours": "this project's choice, with the reason (ssl/recipe/tables.py)",
}


def text_of(
    config: RecipeConfig, data: Description, budget: Budget, choices: Sequence[Choice], rate: float
) -> str:
    """The recipe as YAML: a comment on the whole, then the options in groups."""
    by_name = {choice.option: choice for choice in choices}
    where = "a GPU" if budget.gpus == 1 else f"{budget.gpus} GPUs"
    where = where if budget.device == "cuda" else f"CPUs ({budget.cores} cores)"
    used = dict.fromkeys(choice.source for choice in choices)
    lines = [
        f"# DINO pretraining for {one_line(config.shards)}:",
        f"# {data.text}.",
        f"# {config.hours:g} h on {where}, at {per_second(rate)} when the recipe was made.",
        "#",
        f"# {start_of(config)}",
        f"# {start_of(config, 'python slurm/launch.py')}",
        "#",
        "# Where each number comes from:",
        *(f"#   {f'[{tag}]':<10} {TAGS[tag]}" for tag in TAGS if tag in used),
    ]
    for section in sections():
        group = [line_of(by_name[name]) for name in section if name in by_name]
        lines += [*group, ""] if group else []
    return "\n".join(lines[:-1]) + "\n"


def sections() -> Iterator[list[str]]:
    """Names of the options of a pretraining, section by section, the network first."""
    default = PretrainConfig()
    names = sorted((field.name for field in fields(default)), key=lambda name: name != "model")
    for name in names:
        section = getattr(default, name)
        assert is_dataclass(section)
        yield [option for option, _ in options(section)]


def line_of(choice: Choice) -> str:
    """``lr: 0.006    # [ours] reason``"""
    value = f"{choice.option}: {shown(choice.value)}"
    return f"{value:<38} # [{choice.source}] {choice.reason}".rstrip()


def shown(value: Any) -> str:
    """A value as YAML has it, in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 16, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def start_of(config: RecipeConfig, command: str = "xcit-dino pretrain") -> str:
    """The command line that trains with the recipe."""
    name = shlex.quote(f"runs/{config.out.stem}")
    return one_line(f"{command} --config {shlex.quote(str(config.out))} --output_dir {name}", 2000)
