"""The objects that a pretraining step uses, and how they are built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from xcit_dino.data.augment import Augment
from xcit_dino.data.batch import Batch
from xcit_dino.inputs import InputSettings
from xcit_dino.models.probe import check_bf16, check_sizes, unused_parameters
from xcit_dino.models.tokens import Tokens
from xcit_dino.models.zoo import TIMM_PREFIX
from xcit_dino.options import options
from xcit_dino.ssl import networks
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.distillation import FrozenTeacher, distillation_loss, frozen_teacher
from xcit_dino.ssl.koleo import koleo_loss
from xcit_dino.ssl.loss import DinoLoss
from xcit_dino.train import compiler, optim
from xcit_dino.train.distributed import dist, fsdp, sync_batchnorm
from xcit_dino.train.state import TrainState
from xcit_dino.train.trainer import Trainer, data_parallel, to_be_sharded


@dataclass
class DinoTrainer(Trainer):
    """The objects that a step of DINO uses."""

    config: PretrainConfig
    student: networks.MultiCropNet
    teacher: networks.MultiCropNet
    loss: DinoLoss | None
    """None if the student learns only from a frozen teacher."""
    augment: Augment
    frozen: FrozenTeacher | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """About the frozen teacher."""

    def views(self, batch: Batch) -> list[Tensor]:
        """Augmented crops: the global ones, (G*B, C, S, S), and the local ones if there are any."""
        return [group for group in self.augment(batch) if len(group)]

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the loss terms, by name."""
        both = self.config.objective.objective == "dino+distill"
        return {
            "dino_loss": 1.0,
            "distill_loss": self.config.objective.distill_weight if both else 1.0,
            "koleo_loss": self.config.dino.koleo_weight,
        }

    def frozen_targets(self, groups: list[Tensor]) -> list[Tokens]:
        """The frozen teacher's tokens for groups of crops, each of one size; empty without one."""
        return [] if self.frozen is None else [self.frozen.targets(group) for group in groups]

    def terms(
        self,
        outputs: networks.Outputs,
        targets: Tensor | None,
        tokens: list[Tokens],
        *,
        rows: int,
        local: bool,
    ) -> dict[str, Tensor]:
        """The terms of the loss, by name.

        targets: of DINO's teacher; tokens: of the frozen one; rows: V*B of all views; local:
        whether these are only the local views, see :class:`DinoLoss`.
        """
        terms = {}
        if self.loss is not None:
            assert targets is not None and outputs.bottleneck is not None
            views = rows // targets.shape[1]
            terms["dino_loss"] = self.loss(
                outputs.bottleneck, self.student.prototypes, targets, local=local, num_views=views
            )
        if self.frozen is not None:
            assert outputs.predicted is not None
            terms["distill_loss"] = distillation_loss(
                outputs.predicted, tokens, self.config.objective.distill_patch_weight, rows
            )
        if self.config.dino.koleo_weight and not local:
            crops = self.config.crops
            images = rows // crops.num_crops
            own = outputs.features[0][: crops.global_crops_number * images]
            terms["koleo_loss"] = koleo_loss(own, crops.global_crops_number)
        return terms

    def freeze_batchnorm(self, frozen: bool) -> None:
        """Set whether the backbones' batch-norms use their stored statistics in this step."""
        for net in (self.student, self.teacher):
            for module in net.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.train(net.training and not frozen)

    def update_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student. In distillation it is not run, so it copies the
        student's batch-norm statistics too."""
        for name, part in self.teacher.named_children():
            optim.update_ema(part, self.student.get_submodule(name), momentum)
        if self.loss is None:
            buffers = self.student.backbone.buffers(), self.teacher.backbone.buffers()
            for ours, theirs in zip(*buffers, strict=True):
                theirs.copy_(ours)

    def eval_backbone(self) -> nn.Module:
        """The teacher's backbone for evaluations, unsharded on every rank; all ranks call this."""
        return self.whole(self.teacher.backbone)


def set_up(
    config: PretrainConfig, world: dist.World, dtype: torch.dtype, data: str, global_batch: int
) -> DinoTrainer:
    """Student, teacher, loss, optimizer and augmentation on this process's device, at step 0.

    dtype: of the forward pass; data: checksum of the index; global_batch: images per step.

    Raises:
        InputError: an option that the backbone does not have, or crops of a size that it does not
            accept.
    """
    device, objective, loss, frozen, facts = world.device, config.objective, None, None, {}
    if objective.distills:
        ours = InputSettings.from_run(dict(options(config))) or InputSettings()
        stages = [crops for _, crops in config.stages]
        frozen, facts = frozen_teacher(objective, config.crops, stages, ours, dtype)
    if objective.dino:
        loss = DinoLoss(
            config.head.out_dim, config.dino.student_temp, config.dino.center_momentum,
            sinkhorn=config.dino.centering == "sinkhorn_knopp",
        )  # fmt: skip
    student, teacher = networks.build(
        config.model, config.head if objective.dino else None, config.run.seed,
        frozen and frozen.widths, config.crops.global_crops_size, config.augment.channels,
    )  # fmt: skip
    unused: list[str] = []
    if config.model.arch.startswith(TIMM_PREFIX):
        sizes: dict[str, int] = {}
        for _, crops in config.stages:
            sizes = {"global_crops_size": crops.global_crops_size}
            if crops.local_crops_number:
                sizes["local_crops_size"] = crops.local_crops_size
            check_sizes(student.backbone, config.model.arch, sizes, features=True)
            check_bf16(student.backbone, config.model.arch, sizes, device, dtype)
        found = unused_parameters(student.backbone, config.model.arch, min(sizes.values()))
        unused = [] if objective.distills else found  # whose patch tokens may depend on them
    if world.size > 1:
        sync_batchnorm.convert(student)
        sync_batchnorm.convert(teacher)
    student.to(device).train()
    teacher.to(device).train()
    if config.speed.grad_checkpointing:
        compiler.checkpoint_blocks(student.backbone)
    for net in (student, teacher):
        compiler.compile_blocks(net.backbone, config.speed.compile, device)
    if to_be_sharded(config.run, world):
        fsdp.shard(student, student.backbone, device, dtype)  # its loss reads the prototypes
        fsdp.shard(teacher, teacher.backbone, device, dtype, parts=list(teacher.children()))
    modules: dict[str, nn.Module] = {"student": student, "teacher": teacher}
    if loss is not None:
        modules["loss"] = loss.to(device)
    state = TrainState(
        modules,
        optim.adamw(student, config.optim.layer_decay),
        torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        data=data,
        global_batch=global_batch,
        frozen=facts.get("teacher_checksum", ""),
    )
    fsdp.take_whole_moments(state.optimizer)
    augment = Augment(config.augment, seed=config.run.seed, dtype=dtype)
    parallel = data_parallel(student, world, [f"backbone.{name}" for name in unused])
    return DinoTrainer(
        config, world, dtype, state, parallel, student, teacher, loss, augment,
        frozen and frozen.to(device), facts,
    )  # fmt: skip
