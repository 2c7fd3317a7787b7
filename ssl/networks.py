"""Student and teacher: each a backbone and a projection head."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xcit_dino.models.head import DINOHead, Prototypes
from xcit_dino.models.tokens import Tokens, tokens_of, widths_of
from xcit_dino.models.zoo import ModelConfig, create_model
from xcit_dino.ssl.config import HeadConfig
from xcit_dino.ssl.distillation import Projector


class Outputs(NamedTuple):
    """A student's outputs for groups of crops, each of one size."""

    features: list[Tensor]
    """(V_i*B, D) of the backbone, one per group."""
    bottleneck: Tensor | None
    """(sum V_i*B, Z) of the head; None without a head."""
    predicted: list[Tokens] | None
    """The projector's outputs, one per group; None without a projector."""


class MultiCropNet(nn.Module):
    """Backbone and head over crops of several sizes (dino ``utils.MultiCropWrapper``)."""

    backbone: nn.Module
    head: DINOHead | None
    projector: Projector | None

    def __init__(
        self, backbone: nn.Module, head: DINOHead | None, projector: Projector | None = None
    ):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.projector = projector

    @property
    def prototypes(self) -> Prototypes:
        """The head's last layer."""
        assert self.head is not None
        return self.head.last_layer

    def forward(self, crops: Sequence[Tensor], *, freeze_backbone: bool = False) -> Outputs:
        """Run on groups of crops, each of one size, (V_i*B, C, H_i, W_i).

        The backbone runs once per size, the head's MLP once for all. The prototypes are applied in
        the loss, a few of them at a time.

        freeze_backbone: keep none of its activations; it gets no gradients.
        """
        patches = self.projector is not None and self.projector.patch is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze_backbone):
            tokens = [tokens_of(self.backbone, group, patches) for group in crops]
        features = [each.pooled for each in tokens]
        return Outputs(
            features,
            None if self.head is None else self.head.bottleneck(torch.cat(features)),
            None if self.projector is None else [self.projector(each) for each in tokens],
        )


def build(
    model: ModelConfig,
    head: HeadConfig | None,
    seed: int,
    teacher_widths: tuple[int, int] | None = None,
    size: int = 224,
    channels: int = 3,
) -> tuple[MultiCropNet, MultiCropNet]:
    """Student and teacher with the same initial weights; the teacher has no gradients.

    Only the student has drop-path, and the teacher stays in training mode: its batch-norms use
    the statistics of its own global crops, as in ``main_dino.py``.

    head: None for none; teacher_widths: of a frozen teacher's tokens, for which the student gets a
    projector; size: of the global crops in pixels;
    channels: of the images.
    """
    torch.manual_seed(seed)
    backbone = create_model(
        model.arch, num_classes=0, drop_path_rate=model.drop_path_rate, in_chans=channels
    )
    projection = None if head is None else _head(backbone, head)
    student = MultiCropNet(backbone, projection)
    frozen = create_model(model.arch, num_classes=0, in_chans=channels)
    teacher = MultiCropNet(frozen, copy.deepcopy(projection))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    if teacher_widths is not None:
        widths = widths_of(teacher.backbone, size, patches=teacher_widths[1] > 0)
        student.projector = Projector(widths, teacher_widths)
    return student, teacher


def _head(backbone: nn.Module, head: HeadConfig) -> DINOHead:
    return DINOHead(
        backbone.embed_dim,  # type: ignore[arg-type]
        head.out_dim,
        nlayers=head.head_nlayers,
        hidden_dim=head.head_hidden_dim,
        bottleneck_dim=head.head_bottleneck_dim,
        norm_last_layer=head.norm_last_layer,
        use_bn=head.use_bn_in_head,
    )
