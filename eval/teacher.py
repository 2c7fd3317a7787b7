"""A frozen teacher: its network and weights, and how the student's images reach it.

Distillation with labels (``supervised/distill.py``) uses its logits, distillation without
(``ssl/distillation.py``) its features.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit_dino.errors import InputError, warn
from xcit_dino.eval.context import known_settings, timm_input_settings
from xcit_dino.files import file_checksum
from xcit_dino.inputs import BYTES, InputSettings
from xcit_dino.models.weights import timm_hub
from xcit_dino.models.weights.load import input_settings, load_backbone
from xcit_dino.models.zoo import check_timm_name, create_model, list_models
from xcit_dino.train.distributed import dist
from xcit_dino.train.state import weights_file

PUBLISHED = InputSettings()


class TeacherOptions(Protocol):
    """The options that name a teacher."""

    @property
    def teacher_path(self) -> Path | None: ...

    @property
    def teacher_size(self) -> int: ...


class Teacher(nn.Module):
    """A frozen network in evaluation mode that takes the student's images.

    Args:
        network: gives logits, or features.
        ours: how the student's images are prepared.
        theirs: how the teacher's are; without a size they stay as large as they come.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, ours: InputSettings, theirs: InputSettings):
        super().__init__()
        self.network, self.size = network.eval().requires_grad_(False), theirs.size or 0
        self.interpolation = theirs.interpolation
        from_, to = (torch.tensor((each.mean, each.std)).view(2, 1, -1, 1, 1)
                     for each in (ours, theirs))  # fmt: skip
        factor, offset = between_windows(ours, theirs)
        self.register_buffer("scale", from_[1] * factor / to[1])
        self.register_buffer("shift", (from_[0] * factor + offset - to[0]) / to[1])

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, S, S] in the student's normalization -> float32 output of the network."""
        with torch.autocast(images.device.type, enabled=False):
            return self.network(self.prepare(images, self.size)).float()

    def prepare(self, images: Tensor, size: int) -> Tensor:
        """The student's images as the teacher's, ``size`` pixels wide (0: as they come)."""
        images = images.to(self.scale.dtype) * self.scale + self.shift
        if size and images.shape[-1] != size:
            sides = (size, size)
            images = F.interpolate(images, sides, mode=self.interpolation, antialias=True)
        return images


def between_windows(ours: InputSettings, theirs: InputSettings) -> tuple[Tensor, Tensor]:
    """Factor and offset [1, C or 1, 1, 1] that make of values scaled by one window those scaled by
    the other. A network of 8-bit images sees data of other depths in the data's window."""
    if ours.window == theirs.window or BYTES in (ours.window, theirs.window):
        return torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    (a, b), (c, d) = (
        (torch.tensor(bound, dtype=torch.float64).view(1, -1, 1, 1) for bound in each.window)
        for each in (ours, theirs)
    )
    return ((b - a) / (d - c)).float(), ((a - c) / (d - c)).float()


class Loaded(NamedTuple):
    """A teacher's network and what it expects."""

    network: nn.Module
    settings: InputSettings
    """Its own; the size is that of the options where they give one."""
    facts: dict[str, Any]
    """Model, checksum of the file and input settings."""


def load_teacher(
    model: str,
    options: TeacherOptions,
    num_classes: int,
    checkpoint: Path | None = None,
    ours: InputSettings = PUBLISHED,
) -> Loaded:
    """The network that ``--teacher_model`` and ``--teacher_path`` name.

    model: of timm (``timm/NAME``, or NAME alone), or a built-in one; num_classes: of its
    classifier, 0 for the backbone alone; checkpoint: of a run that goes on and holds the teacher's
    weights; ours: how the student's images are prepared.

    Raises:
        InputError: no such model, no weights, weights of another architecture, or for other classes
            or channels.
    """
    name, load, path = model.removeprefix("timm/"), checkpoint is None, options.teacher_path
    built_in = name in list_models()
    arch = name if built_in else f"timm/{name}"
    facts: dict[str, Any] = {"teacher": name}
    option, channels = f"--teacher_model {model}", ours.channels
    file, settings = None, None
    if not built_in:
        check_timm_name(name, option)
    if load and path is None and (known := timm_input_settings(arch)):
        check_teacher_channels(option, known.channels, channels)  # before anything is fetched
    if load and path is None:
        if built_in:
            raise InputError(f"--teacher_path is missing: timm has no weights for our {name}")
        network = _from_timm(name, num_classes, option)
    else:
        network = create_model(arch, num_classes=num_classes, in_chans=channels)
    if load and path is not None:
        file = weights_file(path, "--teacher_path")
        facts["teacher_weights"] = file_checksum(file)
        try:
            report = load_backbone(file, network, head="required" if num_classes else "auto")
        except InputError as error:  # the network is the teacher's
            raise InputError(str(error).replace("--arch", "--teacher_model")) from error
        if dist.is_main():
            print(f"teacher {report}", flush=True)
    if checkpoint is not None:
        settings = input_settings(checkpoint, "teacher")
        if path is not None and path.exists():
            file = weights_file(path, "--teacher_path")
    if (settings := settings or known_settings(arch, file)) is None:  # the file says nothing
        same = dataclasses.replace(ours, size=None, crop_ratio=None)
        settings = InputSettings() if channels == 3 else same
    check_teacher_channels(option, settings.channels, channels)
    if dist.is_main() and (line := settings.other_bands(ours)):
        warn(f"{option}: {line}")
    settings = dataclasses.replace(settings, size=options.teacher_size or settings.size)
    facts |= {"teacher_size": settings.size or 0, "teacher_input": settings.dump()}
    return Loaded(network, settings, facts)


def check_teacher_channels(option: str, takes: int, channels: int) -> None:
    """Raise InputError for a teacher of images with other channels."""
    if takes != channels:
        raise InputError(
            f"{option}: takes {takes} channels, and the images have {channels}; name a teacher of "
            f"{channels} channels"
        )


def _from_timm(name: str, num_classes: int, option: str) -> nn.Module:
    """A timm model with timm's weights, fetched where they are not on this machine."""
    import timm

    known = timm.get_pretrained_cfg(name)
    classes = known.num_classes if known else None
    if num_classes and classes != num_classes:
        raise InputError(
            f"{option}: timm's weights have {classes} classes, and the data "
            f"{num_classes}; name a teacher of these classes with --teacher_path"
        )

    network = create_model(f"timm/{name}", num_classes=num_classes)
    network.load_state_dict(timm_weights(name, option, num_classes=num_classes))
    return network


def timm_weights(name: str, option: str, num_classes: int | None = None) -> dict[str, Tensor]:
    """The tensors of timm's own weights; all ranks call this.

    name, option: see :func:`timm_hub.pretrained`; num_classes: None keeps the classifier.

    Raises:
        InputError: see :func:`timm_hub.pretrained`.
    """
    arguments = {} if num_classes is None else {"num_classes": num_classes}

    def fetch() -> dict[str, Tensor]:
        return dict(timm_hub.pretrained(name, option, **arguments).state_dict())

    if dist.world_size() == 1:
        return fetch()
    dist.from_main(lambda: fetch() is None)  # rank 0 fetches, and the others find it in the cache
    return fetch()
