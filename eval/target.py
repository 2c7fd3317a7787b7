"""The evaluated network: pretrained, randomly initialized, or none (raw pixels)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit_dino.errors import InputError
from xcit_dino.eval.config import AttentionConfig, EvalTargetConfig
from xcit_dino.eval.context import (
    Context,
    known_settings,
    make_context,
    resolve_input_settings,
    run_options,
)
from xcit_dino.eval.retrieval.config import RetrieveConfig
from xcit_dino.eval.video.config import PropagateConfig
from xcit_dino.files import check_writable, file_checksum
from xcit_dino.models.weights.load import load_backbone
from xcit_dino.models.zoo import canonical_name, create_model
from xcit_dino.train.distributed import dist
from xcit_dino.train.state import newest_checkpoint, weights_file

RANDOM_SEED = 0  # of the randomly initialized baseline
PIXELS = 32  # raw pixels are averaged to at most this side


@dataclass(frozen=True)
class EvalTarget:
    """The pretrained network: architecture and weights file."""

    arch: str
    weights: Path
    checkpoint_key: str | None
    channels: int = 3
    """Of its images."""


@dataclass(frozen=True)
class Network:
    """A backbone in evaluation mode, with the facts that identify it."""

    name: str
    """``pretrained``, ``random`` or ``pixels``."""
    model: nn.Module
    facts: dict[str, Any]
    """Part of the protocol and of the key of cached features."""

    @property
    def suffix(self) -> str:
        """Suffix of a result's name: ``""``, ``"/random"`` or ``"/pixels"``."""
        return "" if self.name == "pretrained" else f"/{self.name}"


class PixelFeatures(nn.Module):
    """The normalized image as features, average-pooled to at most 32 x 32: (B, C, H, W) -> (B,
    C x 1024)."""

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        small = F.adaptive_avg_pool2d(images, (min(PIXELS, height), min(PIXELS, width)))
        return small.flatten(1)


def resolve(config: EvalTargetConfig, world: dist.World) -> tuple[EvalTarget, Context]:
    """The evaluated network and its context; missing options are taken from the run folder, or, if
    that is new, from the run folder of the weights.

    Raises:
        InputError: arch, data or weights are missing; names the option.
    """
    weights_folder = config.pretrained_weights
    check_writable(config.output_dir, f"name another folder for the results: {elsewhere(config)}")
    run = run_options(config.output_dir) or (run_options(weights_folder) if weights_folder else {})
    arch = config.arch or run.get("arch")
    if not arch:
        raise InputError(f"--arch: needed, as {config.output_dir} holds no config.yaml of a run")
    data_path = config.data_path or run.get("data_path")
    if not data_path:
        raise InputError(
            f"--data_path: needed, as {config.output_dir} holds no config.yaml of a run"
        )
    if config.pretrained_weights is not None:
        weights = weights_file(config.pretrained_weights, "--pretrained_weights")
    elif (weights := newest_checkpoint(config.output_dir)) is None:
        raise InputError(
            f"--output_dir {config.output_dir} holds no checkpoint: pretrain first, "
            "or name a file with --pretrained_weights"
        )
    arch = canonical_name(arch)
    settings = known_settings(arch, weights, config.checkpoint_key, run)
    context = make_context(config, settings, run, data_path, world)
    for note in context.notes if world.is_main else ():
        print(note, flush=True)
    target = EvalTarget(arch, weights, config.checkpoint_key, context.inputs.channels)
    return target, context


def resolve_without_shards(
    config: AttentionConfig | PropagateConfig | RetrieveConfig, world: dist.World
) -> tuple[EvalTarget, Context]:
    """The network of a command that reads images or videos in no shard, and its context; missing
    options are taken from the run folder of the weights, else from the output folder.

    Raises:
        InputError: arch or weights are missing; names the option.
    """
    folder = config.pretrained_weights or config.output_dir
    folder = folder if folder.is_dir() else config.output_dir
    options = run_options(folder)
    arch = config.arch or options.get("arch")
    if not arch:
        raise InputError(f"--arch: needed, as {folder} holds no config.yaml of a run")
    arch = canonical_name(arch)
    if config.pretrained_weights is not None:
        weights = weights_file(config.pretrained_weights, "--pretrained_weights")
    else:
        weights = weights_file(config.output_dir, "--output_dir")
    settings = resolve_input_settings(arch, weights, config.checkpoint_key, options)
    given = EvalTargetConfig(
        config.output_dir, window=config.window, mean=config.mean, std=config.std,
        bands=tuple(options.get("bands") or ()) or None,
    )  # fmt: skip
    context = make_context(given, settings, {}, "", world)
    return EvalTarget(arch, weights, config.checkpoint_key, settings.channels), context


def elsewhere(config: EvalTargetConfig) -> str:
    """Options with which this evaluation would write to another folder."""
    words, run = ["--output_dir ELSEWHERE"], run_options(config.output_dir)
    if config.pretrained_weights is None:
        words += [f"--pretrained_weights {config.output_dir}"] if run else []
    elif not config.pretrained_weights.is_dir():  # then the run folder provided the rest
        for name in ("arch", "data_path"):
            if getattr(config, name) is None and run.get(name):
                words.append(f"--{name} {run[name]}")
    return " ".join(words)


def networks(config: EvalTargetConfig | RetrieveConfig, target: EvalTarget) -> Iterator[Network]:
    """Yield the pretrained network and, with ``--baselines``, a randomly initialized one and raw
    nearest-neighbor interpolation."""
    yield pretrained(target)
    if config.baselines:
        yield random_network(target.arch, target.channels)
        yield Network("pixels", PixelFeatures(), {"network": "pixels", "side": PIXELS})


def pretrained(target: EvalTarget) -> Network:
    """Load the backbone with the target's weights."""
    model = create_model(target.arch, num_classes=0, in_chans=target.channels)
    report = load_backbone(target.weights, model, which=target.checkpoint_key)
    if dist.is_main():
        print(report, flush=True)
    facts = {
        **report.facts,
        "arch": target.arch,
        "weights": file_checksum(target.weights),
    }
    return Network("pretrained", model.eval(), facts)


def random_network(arch: str, channels: int = 3) -> Network:
    """The same architecture, initialized from seed 0.

    In evaluation mode its batch-norms use their initial statistics (mean 0, variance 1): it has
    seen no image at all, as in the official code.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        model = create_model(arch, num_classes=0, in_chans=channels)
    return Network("random", model.eval(), {"network": "random", "arch": arch, "seed": RANDOM_SEED})
