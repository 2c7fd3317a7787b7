"""What a training step works with, and how it is put together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xcit_dino.data.augment import Augment
from xcit_dino.data.batch import Batch
from xcit_dino.models.probe import check_sizes
from xcit_dino.models.zoo import TIMM_PREFIX
from xcit_dino.ssl import networks
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.loss import DinoLoss
from xcit_dino.train import compiler, optim
from xcit_dino.train.distributed import dist, fsdp, sync_batchnorm
from xcit_dino.train.state import TrainState
from xcit_dino.train.trainer import Trainer, data_parallel, to_be_sharded


@dataclass
class DinoTrainer(Trainer):
    """What a step of DINO works with."""

    config: PretrainConfig
    student: networks.MultiCropNet
    teacher: networks.MultiCropNet
    loss: DinoLoss
    augment: Augment

    def views(self, batch: Batch) -> list[Tensor]:
        """Augmented crops: the global ones, (G*B, 3, S, S), and the local ones if there are any."""
        return [group for group in self.augment(batch) if len(group)]

    def eval_backbone(self) -> nn.Module:
        """The teacher's backbone for evaluations, whole on every rank; all ranks call this."""
        return self.whole(self.teacher.backbone)


def set_up(
    config: PretrainConfig, world: dist.World, dtype: torch.dtype, data: str, global_batch: int
) -> DinoTrainer:
    """Student, teacher, loss, optimiser and augmentation on this process's device, at step 0.

    dtype: of the forward pass; data: checksum of the index; global_batch: images a step.

    Raises:
        InputError: an option that the backbone does not have, or crops of a size that it does not
            take.
    """
    device = world.device
    student, teacher = networks.build(config.model, config.head, config.run.seed)
    if config.model.arch.startswith(TIMM_PREFIX):
        crops = config.crops
        sizes = {"global_crops_size": crops.global_crops_size}
        if crops.local_crops_number:
            sizes["local_crops_size"] = crops.local_crops_size
        check_sizes(student.backbone, config.model.arch, sizes, features=True)
    if world.size > 1:
        sync_batchnorm.convert(student)
        sync_batchnorm.convert(teacher)
    student.to(device).train()
    teacher.to(device).train()
    loss = DinoLoss(config.head.out_dim, config.dino.student_temp, config.dino.center_momentum)
    if config.speed.grad_checkpointing:
        compiler.checkpoint_blocks(student.backbone)
    for net in (student, teacher):
        compiler.compile_blocks(net.backbone, config.speed.compile, device)
    if to_be_sharded(config.run, world):
        fsdp.shard(student, student.backbone, device)  # its loss reads the prototypes
        fsdp.shard(teacher, teacher.backbone, device, parts=(teacher.backbone, teacher.head))
    state = TrainState(
        {"student": student, "teacher": teacher, "loss": loss.to(device)},
        optim.adamw(student),
        torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        data=data,
        global_batch=global_batch,
    )
    fsdp.take_whole_moments(state.optimizer)
    augment = Augment(config.augment, seed=config.run.seed, dtype=dtype)
    parallel = data_parallel(student, world)
    return DinoTrainer(config, world, dtype, state, parallel, student, teacher, loss, augment)
