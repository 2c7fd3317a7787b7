"""``xcit-dino distill``: a student learns from labels and from a frozen teacher (DeiT, arXiv
2012.12877; XCiT ``losses.py``).

XCiT has no distillation token: the class output learns from both. The teacher sees the student's
augmented, mixed images, in its own normalization and resolution, in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from xcit_dino.eval.teacher import Teacher, load_teacher
from xcit_dino.inputs import InputSettings
from xcit_dino.models.probe import check_sizes
from xcit_dino.options import options, replace
from xcit_dino.supervised.config import DistillConfig, TeacherConfig
from xcit_dino.supervised.data import open_data
from xcit_dino.supervised.train import soft_cross_entropy, train
from xcit_dino.supervised.trainer import Method, build_model, with_input_settings
from xcit_dino.train import loop
from xcit_dino.train.distributed import dist
from xcit_dino.train.run.folder import check_output
from xcit_dino.train.state import Checkpoints


def main(config: DistillConfig) -> None:
    """The command; a launcher's job calls :func:`distill` and handles signals itself."""
    loop.command(distill, config)


def distill(config: DistillConfig) -> None:
    """Train and write ``distill`` and ``distill/ema`` to ``results.json``; the checkpoints hold
    ``Student`` and ``Teacher``. See :func:`xcit_dino.supervised.train.train`."""
    world = dist.init(config.run.device)
    dist.from_main(lambda: check_output(config.run))
    data = open_data(config)
    config = with_input_settings(config, data.form)
    run = config.run
    student, facts = build_model(
        config.model, config.start, data.num_classes, run.output_dir, run.seed,
        config.regularization.channels,
    )  # fmt: skip
    ours = InputSettings.from_run(dict(options(config))) or InputSettings()
    checkpoint = Checkpoints(run.output_dir).newest()
    teacher, about = build_teacher(config.teacher, data.num_classes, ours, checkpoint)
    size = teacher.size or config.regularization.input_size
    name = config.teacher.teacher_model
    check_sizes(
        teacher.network, name, {"teacher_size": size}, features=False,
        model_option="--teacher_model",
    )  # fmt: skip
    # into the run's options, so that a run whose teacher was moved does not resume with another one
    config = replace(config, {"teacher_size": teacher.size})
    teacher.to(world.device)
    loss = DistillationLoss(teacher, config.teacher)
    method = Method("distill", "Student", loss, facts | about, {"Teacher": teacher.network})
    train(config, method, student, data, world)


class DistillationLoss:
    """``(1 - alpha) * cross-entropy with the labels + alpha * distance to the teacher``.

    With student s, teacher t, temperature T, over B images and C classes: *hard* is the
    cross-entropy with t's top class; *soft* is ``T^2 KL(t / T, s / T)``, summed over the batch
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
        """KL divergence between two sets of logits, float32 [B, C]."""
        if self.kind == "hard":
            return F.cross_entropy(student, teacher.argmax(1))
        log_s, log_t = ((logits / self.tau).log_softmax(1) for logits in (student, teacher))
        to_student = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
        if self.kind == "soft":
            return to_student * self.tau**2 / student.numel()
        to_teacher = F.kl_div(log_t, log_s, reduction="sum", log_target=True)
        return (to_student + to_teacher) / 2 * self.tau**2 / len(student)


def build_teacher(
    config: TeacherConfig, num_classes: int, ours: InputSettings, checkpoint: Path | None = None
) -> tuple[Teacher, dict[str, Any]]:
    """The teacher, and facts about it; see :func:`load_teacher`.

    ours: how the student's images are prepared.
    """
    network, settings, facts = load_teacher(
        config.teacher_model, config, num_classes, checkpoint, ours
    )
    how = {
        "distillation": config.distillation_type,
        "alpha": config.distillation_alpha,
        "tau": config.distillation_tau,
    }
    return Teacher(network, ours, settings), facts | how
