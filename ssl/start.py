"""Where pretraining starts: the weights that ``--init_from`` names, and how their images were
prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xcit_dino.data.config import AugmentConfig
from xcit_dino.data.native.scaling import form_of, resolve_scaling
from xcit_dino.data.pixels import RGB8
from xcit_dino.errors import InputError, warn
from xcit_dino.eval.context import resolve_input_settings, run_options, timm_input_settings
from xcit_dino.eval.teacher import timm_weights
from xcit_dino.files import file_checksum
from xcit_dino.inputs import IMAGENET_MEAN, InputSettings
from xcit_dino.models.weights.load import find_network, found_in, input_settings
from xcit_dino.models.weights.pretraining import load_backbones, load_start
from xcit_dino.models.zoo import TIMM_PREFIX, check_timm_name
from xcit_dino.options import options, replace
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.trainer import DinoTrainer
from xcit_dino.train.distributed import dist
from xcit_dino.train.state import has_checkpoint, weights_file


def with_input_settings(config: PretrainConfig) -> PretrainConfig:
    """The options with ``--window``, ``--mean`` and ``--std`` filled in: those of the run being
    resumed, else of the weights to start from, else of the data, which of 8-bit RGB are ImageNet's;
    see ``data/native/scaling.py``.

    Raises:
        InputError: another number of values than the images have channels; an augmentation that
            they cannot have.
    """
    source, folder, own = config.start.init_from, config.run.output_dir, config.augment
    form = form_of(config.loader.data_path, config.loader.bands) or RGB8
    settings, resumed = None, has_checkpoint(folder)
    if resumed:
        settings = InputSettings.from_run(run_options(folder))
    elif source is not None and not (own.mean and own.std):
        settings = start_settings(source, config.model.arch)
    scaling = resolve_scaling(own, form, settings, same_data=resumed)
    resolved = replace(config, scaling.options)
    if dist.is_main() and resolved != config:
        say(scaling.lines, resolved.augment)
    if form.channels == 1 and own.channel_drop_prob:
        raise InputError(
            "--channel_drop_prob: the images have one channel, which has to stay; leave it out"
        )
    return resolved


def say(lines: list[str], augment: AugmentConfig) -> None:
    """Print how images are scaled and normalized, where that is not ImageNet's, and what is off
    for them."""
    if augment.mean != IMAGENET_MEAN:
        line = f"images are normalized by mean {augment.mean}, std {augment.std}"
        lines = [*lines, line]
    if off := augment.without_meaning(augment.channels):
        lines = [
            *lines,
            f"{', '.join(f'--{name}' for name in off)}: images of {augment.channels} channels have "
            "no saturation, hue and gray version, and are not solarized: these are off",
        ]
    for line in lines:
        print(line, flush=True)


def start_settings(source: str, arch: str) -> InputSettings | None:
    """How images were prepared for the initial weights."""
    if source.startswith(TIMM_PREFIX):
        check_timm_name(source.removeprefix(TIMM_PREFIX), f"--init_from {source}")
        return timm_input_settings(source)
    return resolve_input_settings(arch, weights_file(Path(source), "--init_from"))


def initialize(trainer: DinoTrainer) -> dict[str, Any]:
    """Load the weights that ``--init_from`` names, if any; returns facts about them."""
    start = trainer.config.start
    if start.init_from is None:
        return {}
    if start.init_from.startswith(TIMM_PREFIX):
        taken, facts = initialize_by_name(trainer, start.init_from)
        before = timm_input_settings(start.init_from)
    else:
        path = weights_file(Path(start.init_from), "--init_from")
        student, teacher, loss = trainer.student, trainer.teacher, trainer.loss
        if loss is None:
            report = load_backbones(path, find_network(path), student, teacher)
            taken = f"{report}, for the student and its average"
        else:
            taken = load_start(path, student, teacher, loss.center, start.new_head)
        facts = {"start": path.name, "start_weights": file_checksum(path)}
        before = input_settings(path)
    if trainer.world.is_main:
        print(taken, flush=True)
        warn_of_other_settings(trainer.config, before)
    return facts


def initialize_by_name(trainer: DinoTrainer, source: str) -> tuple[str, dict[str, Any]]:
    """Load timm's own weights as the backbones; returns one line on what was loaded, and facts."""
    state = timm_weights(source.removeprefix(TIMM_PREFIX), f"--init_from {source}")
    found = found_in(Path(source), state)
    report = load_backbones(Path(source), found, trainer.student, trainer.teacher)
    heads = "; their heads are new" if trainer.loss else ""
    return f"{report}, for student and teacher{heads}", {"start": source}


def warn_of_other_settings(config: PretrainConfig, before: InputSettings | None) -> None:
    """Warn if the run's bands, mean or std differ from those that the weights were trained with."""
    now = config.augment
    if before is None or before.channels != now.channels or not (now.mean and now.std):
        return
    ours = InputSettings.from_run(dict(options(config)))
    if ours is not None and (line := before.other_bands(ours)):
        warn(f"--init_from {config.start.init_from}: {line}")
    if (before.mean, before.std) != (now.mean, now.std):
        warn(
            f"--init_from {config.start.init_from}: was trained with --mean {spaced(before.mean)} "
            f"--std {spaced(before.std)}, and this run has {spaced(now.mean)} and "
            f"{spaced(now.std)}"
        )


def spaced(values: tuple[float, ...]) -> str:
    """Values as on a command line."""
    return " ".join(f"{value:g}" for value in values)
