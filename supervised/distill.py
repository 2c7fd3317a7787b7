"""``xcit-dino distill``: a student learns from labels and from a frozen teacher (DeiT, arXiv
2012.12877; XCiT ``losses.py``).

XCiT has no distillation token: the class output learns from both. The teacher sees the student's
augmented, mixed images, in its own normalisation and resolution, in fp32.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit_dino.errors import InputError
from xcit_dino.eval.context import settings_of
from xcit_dino.files import file_checksum
from xcit_dino.inputs import InputSettings
from xcit_dino.models.probe import check_sizes
from xcit_dino.models.weights import timm_hub
from xcit_dino.models.weights.load import input_settings, load_backbone
from xcit_dino.models.zoo import check_timm_name, create_model, list_models
from xcit_dino.options import options, replace
from xcit_dino.supervised.config import DistillConfig, TeacherConfig
from xcit_dino.supervised.data import open_data
from xcit_dino.supervised.train import soft_cross_entropy, train
from xcit_dino.supervised.trainer import Method, build_model, with_input_settings
from xcit_dino.train import loop
from xcit_dino.train.distributed import dist
from xcit_dino.train.run.folder import check_output
from xcit_dino.train.state import Checkpoints, weights_file


def main(config: DistillConfig) -> None:
    """The command; a launcher's job calls :func:`distill` and keeps the signals."""
    loop.command(distill, config)


def distill(config: DistillConfig) -> None:
    """Train and write ``distill`` and ``distill/ema`` to ``results.json``; the checkpoints hold
    ``Student`` and ``Teacher``. See :func:`xcit_dino.supervised.train.train`."""
    world = dist.init(config.run.device)
    dist.from_main(lambda: check_output(config.run))
    data = open_data(config)
    config = with_input_settings(config)
    run = config.run
    student, facts = build_model(
        config.model, config.start, data.num_classes, run.output_dir, run.seed
    )
    ours = InputSettings.of_run(dict(options(config))) or InputSettings()
    checkpoint = Checkpoints(run.output_dir).newest()
    teacher, about = build_teacher(config.teacher, data.num_classes, ours, checkpoint)
    size = teacher.size or config.regularization.input_size
    name = config.teacher.teacher_model
    check_sizes(teacher.network, name, {"teacher_size": size}, features=False)
    # into the run's options, so that a run whose teacher has moved away does not go on with another
    config = replace(config, {"teacher_size": teacher.size})
    teacher.to(world.device)
    loss = DistillationLoss(teacher, config.teacher)
    method = Method("distill", "Student", loss, facts | about, {"Teacher": teacher.network})
    train(config, method, student, data, world)


class DistillationLoss:
    """``(1 - alpha) * cross-entropy with the labels + alpha * distance to the teacher``.

    With student s, teacher t, temperature T, over B images and C classes: *hard* is the
    cross-entropy with t's first choice; *soft* is ``T^2 KL(t / T, s / T)``, summed over the batch
    and divided by B * C (XCiT ``losses.py`` divides by numel); *symmetric* is
    ``T^2 (KL(t / T, s / T) + KL(s / T, t / T)) / 2``, divided by B (PASSL
    ``DistillationWrapper.py``, which has T = 1).
    """

    def __init__(self, teacher: Teacher, config: TeacherConfig):
        self.teacher, self.kind = teacher, config.distillation_type
        self.alpha, self.tau = config.distillation_alpha, config.distillation_tau

    def __call__(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """images [B, 3, S, S], logits [B, C], soft labels [B, C]."""
        base = soft_cross_entropy(images, logits, targets)
        distance = self.distance(logits.float(), self.teacher(images))
        return (1 - self.alpha) * base + self.alpha * distance

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Between two sets of logits, float32 [B, C]."""
        if self.kind == "hard":
            return F.cross_entropy(student, teacher.argmax(1))
        log_s, log_t = ((logits / self.tau).log_softmax(1) for logits in (student, teacher))
        to_student = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
        if self.kind == "soft":
            return to_student * self.tau**2 / student.numel()
        to_teacher = F.kl_div(log_t, log_s, reduction="sum", log_target=True)
        return (to_student + to_teacher) / 2 * self.tau**2 / len(student)


class Teacher(nn.Module):
    """A frozen network in evaluation mode that takes the student's images.

    Args:
        network: gives logits.
        ours: how the student's images are prepared.
        theirs: how the teacher's are; without a size they stay as large as they come.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, ours: InputSettings, theirs: InputSettings):
        super().__init__()
        self.network, self.size = network.eval().requires_grad_(False), theirs.size or 0
        self.interpolation = theirs.interpolation
        from_, to = (torch.tensor((each.mean, each.std)).view(2, 1, 3, 1, 1)
                     for each in (ours, theirs))  # fmt: skip
        self.register_buffer("scale", from_[1] / to[1])
        self.register_buffer("shift", (from_[0] - to[0]) / to[1])

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] in the student's normalisation -> float32 logits [B, C]."""
        with torch.autocast(images.device.type, enabled=False):
            images = images.float() * self.scale + self.shift
            if self.size and images.shape[-1] != self.size:
                size = (self.size, self.size)
                images = F.interpolate(images, size, mode=self.interpolation, antialias=True)
            return self.network(images).float()


def build_teacher(
    config: TeacherConfig, num_classes: int, ours: InputSettings, checkpoint: Path | None = None
) -> tuple[Teacher, dict[str, Any]]:
    """The teacher, and what it is.

    ours: how the student's images are prepared; checkpoint: of the run that goes on, which then has
    the teacher's weights.

    Raises:
        InputError: no such model, no weights, or other classes.
    """
    name, load = config.teacher_model.removeprefix("timm/"), checkpoint is None
    built_in = name in list_models()
    arch = name if built_in else f"timm/{name}"
    facts = {
        "teacher": name,
        "distillation": config.distillation_type,
        "alpha": config.distillation_alpha,
        "tau": config.distillation_tau,
    }
    if load and config.teacher_path is None:
        if built_in:
            raise InputError(f"--teacher_path is missing: timm has no weights for our {name}")
        network = _from_timm(name, num_classes)
    else:
        network = create_model(arch, num_classes=num_classes)
    path, settings = None, None
    if load and config.teacher_path is not None:
        path = weights_file(config.teacher_path, "--teacher_path")
        report = load_backbone(path, network, head="required")
        facts["teacher_weights"] = file_checksum(path)
        if dist.is_main():
            print(f"teacher {report}", flush=True)
    if checkpoint is not None:
        settings = input_settings(checkpoint, "teacher")
        if config.teacher_path is not None and config.teacher_path.exists():
            path = weights_file(config.teacher_path, "--teacher_path")
    settings = settings or settings_of(arch, path)
    settings = dataclasses.replace(settings, size=config.teacher_size or settings.size)
    facts |= {"teacher_size": settings.size or 0, "teacher_input": settings.dump()}
    return Teacher(network, ours, settings), facts


def _from_timm(name: str, num_classes: int) -> nn.Module:
    """A timm model with timm's weights, fetched where they are not on this machine."""
    import timm

    option = f"--teacher_model {name}"
    check_timm_name(name, option)
    known = timm.get_pretrained_cfg(name)
    classes = known.num_classes if known else None
    if classes != num_classes:
        raise InputError(
            f"{option}: timm's weights tell {classes} classes apart, and the data have "
            f"{num_classes}; name a teacher of these classes with --teacher_path"
        )
    return timm_hub.pretrained(name, option)
