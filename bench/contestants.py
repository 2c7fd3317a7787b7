"""Our step and the official one, ready to run on the same weights and crops, and their equality."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import timm
import torch
from torch import Tensor, nn

from bench.reference import PlainHead, PlainLoss, PlainNet, parameter_groups, plain_step
from xcit_dino.data.batch import Batch
from xcit_dino.models.zoo import model_spec
from xcit_dino.options import replace
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.pretrain import train_step
from xcit_dino.ssl.schedule import DinoHyperparameters
from xcit_dino.ssl.trainer import DinoTrainer, set_up
from xcit_dino.train.amp import DTYPES, autocast
from xcit_dino.train.distributed import dist

NOW = DinoHyperparameters(5e-4, 0.04, 0.996, 0.04, freeze_last_layer=False)
GLOBAL_CROPS = 2


@dataclass(frozen=True)
class Work:
    """Our step or the official one, ready to run: the whole step, or only loss and head."""

    step: Callable[[], object]
    loss_head: Callable[[], object]
    trainer: DinoTrainer | None = None
    """Of ours."""


class Views:
    """Replaces the augmentation: both steps get finished crops."""

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.global_crops.flatten(0, 1), batch.local_crops.flatten(0, 1)


def our_trainer(args: argparse.Namespace, precision: str) -> DinoTrainer:
    values = {
        "arch": args.arch, "drop_path_rate": 0.0, "out_dim": args.prototypes,
        "compile": args.compile, "grad_checkpointing": args.grad_checkpointing, "clip_grad": 3.0,
        "global_crops_size": args.global_size, "local_crops_size": args.local_size,
        "group_backward": args.group_backward,
    }  # fmt: skip
    config = replace(PretrainConfig(), values)
    world = dist.World(0, 1, torch.device(args.device))
    trainer = set_up(config, world, DTYPES[precision], "", args.batch_size)
    trainer.augment = Views()  # type: ignore[assignment]
    return trainer


def plain_nets(trainer: DinoTrainer, args: argparse.Namespace) -> list[PlainNet]:
    """timm's XCiT and the plain head with our student's and teacher's values."""
    nets = []
    for ours in (trainer.student, trainer.teacher):
        backbone = timm.create_model(f"{args.arch}_224", num_classes=0)
        state = timm.models.xcit.checkpoint_filter_fn(
            {"model": ours.backbone.state_dict()}, backbone
        )
        backbone.load_state_dict(state)
        assert ours.head is not None
        head = PlainHead(
            model_spec(args.arch).embed_dim, args.prototypes, 2048, 256, norm_last=True
        )
        head.load_state_dict(ours.head.state_dict())
        nets.append(PlainNet(backbone, head).to(args.device).train())
    nets[1].requires_grad_(False)
    return nets


def crops(args: argparse.Namespace, batch_size: int) -> tuple[Tensor, Tensor]:
    """(2, B, 3, S, S) and (L, B, 3, s, s), as the augmentation gives them."""
    torch.manual_seed(0)
    large = torch.randn(GLOBAL_CROPS, batch_size, 3, args.global_size, args.global_size)
    small = torch.randn(args.local_crops, batch_size, 3, args.local_size, args.local_size)
    return large.to(args.device), small.to(args.device)


def our_work(args: argparse.Namespace, precision: str, batch_size: int) -> Work:
    trainer = our_trainer(args, precision)
    large, small = (x.to(trainer.dtype) for x in crops(args, batch_size))
    nothing = np.zeros(0, np.int64)
    batch = Batch(0, 0, 0, nothing, nothing, torch.zeros(0), large, small)
    student, teacher, loss_fn = trainer.student.head, trainer.teacher.head, trainer.loss
    assert student and teacher and loss_fn
    features = head_input(args, batch_size)

    def step() -> None:
        torch.backends.cudnn.benchmark = False
        train_step(trainer, [batch], NOW)

    def loss_head() -> None:
        with autocast(trainer.world.device, trainer.dtype):
            with torch.no_grad():
                targets = loss_fn.targets(
                    teacher(features[: GLOBAL_CROPS * batch_size]),
                    NOW.teacher_temp,
                    GLOBAL_CROPS,
                )
            loss = loss_fn(student.bottleneck(features), student.last_layer, targets)
        loss.backward()
        student.zero_grad()
        loss_fn.update_center()

    return Work(step, loss_head, trainer)


def plain_work(args: argparse.Namespace, precision: str, batch_size: int) -> Work:
    student, teacher = plain_nets(our_trainer(args, "fp32"), args)
    views = [view for group in crops(args, batch_size) for view in group]
    loss_fn = PlainLoss(args.prototypes, len(views), 0.1, 0.9).to(args.device)
    optimizer = torch.optim.AdamW(parameter_groups(student))
    low = autocast(torch.device(args.device), DTYPES[precision])
    scaler = torch.amp.GradScaler(args.device) if precision == "fp16" else None
    features = head_input(args, batch_size)

    def step() -> None:
        torch.backends.cudnn.benchmark = True  # as main_dino.py has it
        plain_step(
            student, teacher, loss_fn, optimizer, views, lr=NOW.lr, weight_decay=NOW.weight_decay,
            momentum=NOW.momentum_teacher, teacher_temp=NOW.teacher_temp, clip=3.0,
            freeze_last_layer=False, autocast=low, scaler=scaler,
        )  # fmt: skip

    def loss_head() -> None:
        with low:
            with torch.no_grad():
                teacher_output = teacher.head(features[: GLOBAL_CROPS * batch_size])
            loss = loss_fn(student.head(features), teacher_output, NOW.teacher_temp)
        loss.item()
        loss.backward()
        student.head.zero_grad()

    return Work(step, loss_head)


def head_input(args: argparse.Namespace, batch_size: int) -> Tensor:
    """What the backbone gives: a row a crop; gradients go on into it."""
    torch.manual_seed(1)
    rows = (GLOBAL_CROPS + args.local_crops) * batch_size
    width = model_spec(args.arch).embed_dim
    return torch.randn(rows, width, device=args.device, requires_grad=True)


def check_equality(args: argparse.Namespace) -> str:
    """Loss and gradients of both in float32, on two images.

    Raises:
        SystemExit: they differ.
    """
    torch.backends.cudnn.allow_tf32 = False  # ten bits would hide what differs
    trainer = our_trainer(args, "fp32")
    student, teacher = plain_nets(trainer, args)
    teacher_head, loss = trainer.teacher.head, trainer.loss
    assert teacher_head and loss
    groups = crops(args, 2)
    views = [view for group in groups for view in group]
    with torch.no_grad():
        targets = loss.targets(
            teacher_head(trainer.teacher.backbone(groups[0].flatten(0, 1))),
            0.04,
            GLOBAL_CROPS,
        )
        teacher_output = teacher(views[:GLOBAL_CROPS])
    z = trainer.student([group.flatten(0, 1) for group in groups]).bottleneck
    ours = loss(z, trainer.student.prototypes, targets)
    plain_loss = PlainLoss(args.prototypes, len(views), 0.1, 0.9).to(args.device)
    plain = plain_loss(student(views), teacher_output, 0.04)
    ours.backward()
    plain.backward()
    official = gradients(student)
    worst = max(
        difference(gradient, official[name])
        for name, gradient in gradients(trainer.student).items()
        if name in official  # timm splits some layers into three
    )
    loss_gap = abs(ours.item() - plain.item()) / plain.item()
    if not (loss_gap < 1e-5 and worst < 2e-3):
        raise SystemExit(f"the steps differ: loss {loss_gap:.1e}, gradients {worst:.1e}")
    return f"float32: losses differ by {loss_gap:.0e}, gradients by {worst:.0e} of their norm"


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-6)).item()
