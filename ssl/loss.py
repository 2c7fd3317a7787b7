"""The DINO loss (arXiv 2104.14294, algorithm 1 and equations 1-5; dino ``main_dino.py:DINOLoss``).

Shapes: V views (G global ones first), B images, Z bottleneck, K prototypes; views-major, so view v
of image b is row v*B + b.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xcit_dino.models.head import Prototypes
from xcit_dino.ssl.fused_loss import dino_cross_entropy
from xcit_dino.ssl.sinkhorn import sinkhorn_knopp
from xcit_dino.train.distributed.dist import all_reduce_mean


class DinoLoss(nn.Module):
    """Cross-entropy between the teacher's centered, sharpened prototypes and the student's.

    State: ``center`` (K,), the moving average of the teacher's outputs; with ``sinkhorn``, which
    takes its place (:mod:`xcit_dino.ssl.sinkhorn`), it stays 0.
    """

    center: Tensor
    batch_sum: Tensor

    def __init__(
        self,
        out_dim: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        sinkhorn: bool = False,
    ):
        super().__init__()
        self.sinkhorn = sinkhorn
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(out_dim))
        self.register_buffer("batch_sum", torch.zeros(out_dim), persistent=False)
        self.rows = 0

    @torch.no_grad()
    def targets(self, teacher_VBK: Tensor, temperature: float, num_global: int) -> Tensor:
        """Teacher's scores (G*B, K) -> probabilities (G, B, K); accumulated for the center."""
        if self.sinkhorn:
            return sinkhorn_knopp(teacher_VBK, temperature).unflatten(0, (num_global, -1))
        self.batch_sum += teacher_VBK.sum(0)
        self.rows += len(teacher_VBK)
        probabilities = (teacher_VBK - self.center).div_(temperature).softmax(dim=-1)
        return probabilities.unflatten(0, (num_global, -1))

    def forward(
        self,
        student_VBZ: Tensor,
        prototypes: Prototypes,
        targets_GBK: Tensor,
        *,
        local: bool = False,
        num_views: int | None = None,
    ) -> Tensor:
        """Mean cross-entropy over all pairs (teacher's global view g, student's other view v).

        student_VBZ: the student's bottleneck (V*B, Z); prototypes: the student's last layer; local,
        num_views: if these are not all views of an image, see :func:`dino_cross_entropy`.
        """
        return dino_cross_entropy(
            student_VBZ, prototypes.weight_v, prototypes.weight_g, targets_GBK, self.student_temp,
            local=local, num_views=num_views,
        )  # fmt: skip

    @torch.no_grad()
    def update_center(self) -> None:
        """Move the center towards the mean output of all micro-batches and ranks of this step."""
        if self.sinkhorn:
            return
        mean = all_reduce_mean(self.batch_sum / self.rows)
        self.center.lerp_(mean, 1.0 - self.center_momentum)
        self.batch_sum.zero_()
        self.rows = 0
