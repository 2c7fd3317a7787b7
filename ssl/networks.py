"""Student and teacher: a backbone and a projection head each."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xcit_dino.models.head import DINOHead
from xcit_dino.models.zoo import ModelConfig, create_model
from xcit_dino.ssl.config import HeadConfig


class MultiCropNet(nn.Module):
    """Backbone and head over crops of several sizes (dino ``utils.MultiCropWrapper``)."""

    backbone: nn.Module
    head: DINOHead

    def __init__(self, backbone: nn.Module, head: DINOHead):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """Groups of crops of one size, (V_i*B, C, H_i, W_i) -> bottleneck (sum V_i*B, Z).

        The backbone runs once a size, the head's MLP once for all. The prototypes are left to the
        loss, which takes a few of them at a time.
        """
        return self.head.bottleneck(torch.cat([self.backbone(group) for group in crops]))


def build(model: ModelConfig, head: HeadConfig, seed: int) -> tuple[MultiCropNet, MultiCropNet]:
    """Student and teacher with the same initial weights; the teacher takes no gradients.

    Drop-path is the student's alone, and the teacher stays in training mode: its batch-norms use
    its own global crops, as in ``main_dino.py``.
    """
    torch.manual_seed(seed)
    backbone = create_model(model.arch, num_classes=0, drop_path_rate=model.drop_path_rate)
    projection = DINOHead(
        backbone.embed_dim,  # type: ignore[arg-type]
        head.out_dim,
        nlayers=head.head_nlayers,
        hidden_dim=head.head_hidden_dim,
        bottleneck_dim=head.head_bottleneck_dim,
        norm_last_layer=head.norm_last_layer,
        use_bn=head.use_bn_in_head,
    )
    student = MultiCropNet(backbone, projection)
    teacher = MultiCropNet(create_model(model.arch, num_classes=0), copy.deepcopy(projection))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    return student, teacher
