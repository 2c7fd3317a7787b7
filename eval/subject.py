"""What is evaluated: a network (pretrained, randomly initialised, or none: raw pixels) on two
splits of images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit_dino.data.index import ShardIndex, resolve_split
from xcit_dino.errors import InputError
from xcit_dino.eval.config import SubjectConfig
from xcit_dino.models.weights import load_backbone
from xcit_dino.models.zoo import canonical_name, create_model
from xcit_dino.train import dist
from xcit_dino.train.config import read_yaml
from xcit_dino.train.provenance import file_checksum
from xcit_dino.train.state import newest_checkpoint, weights_file

RANDOM_SEED = 0  # of the randomly initialised baseline
PIXELS = 32  # raw pixels are averaged to at most this side
PROTOCOL_CROP, PROTOCOL_RESIZE = 224, 256  # DINO eval_knn.py, eval_linear.py


@dataclass(frozen=True)
class Subject:
    """The images, their geometry, and the weights of the pretrained network."""

    arch: str
    weights: Path
    checkpoint_key: str | None
    data_path: str
    resize: int
    crop: int

    def index(self, split: str) -> ShardIndex:
        """Opened shards of ``train`` or ``val``."""
        return ShardIndex.load(resolve_split(self.data_path, split))


@dataclass(frozen=True)
class Network:
    """A backbone in evaluation mode, and what tells it from others."""

    name: str
    """``pretrained``, ``random`` or ``pixels``."""
    model: nn.Module
    facts: dict[str, Any]
    """Goes into the protocol and into the key of cached features."""

    @property
    def suffix(self) -> str:
        """``""``, ``"/random"`` or ``"/pixels"``: the end of a result's name."""
        return "" if self.name == "pretrained" else f"/{self.name}"


class Pixels(nn.Module):
    """The normalised image as features, averaged over areas to at most 32 x 32: (B, 3, H, W) -> (B,
    3072)."""

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        small = F.adaptive_avg_pool2d(images, (min(PIXELS, height), min(PIXELS, width)))
        return small.flatten(1)


def resolve(config: SubjectConfig) -> Subject:
    """Fill what the options leave out from the run folder.

    Raises:
        InputError: no arch, data or weights, with the option that gives them.
    """
    run = run_options(config.output_dir)
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
    trained_size = run.get("global_crops_size") or run.get("input_size")  # of a finetuning run
    resize, crop = geometry(config, trained_size)
    return Subject(
        canonical_name(arch), weights, config.checkpoint_key, str(data_path), resize, crop
    )


def run_options(folder: Path) -> dict[str, Any]:
    """The options of a run folder's ``config.yaml``; empty where there is none."""
    path = folder / "config.yaml"
    return read_yaml(path) if path.is_file() else {}


def geometry(config: SubjectConfig, trained_size: int | None) -> tuple[int, int]:
    """(shorter side after resizing, side of the centre crop) in pixels.

    The protocol's 256 / 224 scales with the size the run was trained at. Up to 64 px the whole
    image is kept: a margin of an eighth, harmless in a photograph, would cut into the object of a
    small image.
    """
    crop = config.crop_size or trained_size or PROTOCOL_CROP
    if config.resize_size != -1:
        return config.resize_size, crop
    return (crop if crop <= 64 else round(crop * PROTOCOL_RESIZE / PROTOCOL_CROP)), crop


def networks(config: SubjectConfig, subject: Subject) -> Iterator[Network]:
    """The pretrained network and, with ``--baselines``, a randomly initialised one and raw
    pixels."""
    yield pretrained(subject)
    if config.baselines:
        yield random_network(subject.arch)
        yield Network("pixels", Pixels(), {"network": "pixels", "side": PIXELS})


def pretrained(subject: Subject) -> Network:
    """The backbone with the subject's weights."""
    model = create_model(subject.arch, num_classes=0)
    report = load_backbone(subject.weights, model, which=subject.checkpoint_key)
    if dist.is_main():
        print(report, flush=True)
    facts = {
        "network": report.network,
        "arch": subject.arch,
        "weights": file_checksum(subject.weights),
    }
    return Network("pretrained", model.eval(), facts)


def random_network(arch: str) -> Network:
    """The same architecture as initialised from seed 0.

    In evaluation mode its batch-norms hold their initial statistics (mean 0, variance 1): it has
    seen no image at all, as in the official code.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        model = create_model(arch, num_classes=0)
    return Network("random", model.eval(), {"network": "random", "arch": arch, "seed": RANDOM_SEED})
