"""The DINO loss (arXiv 2104.14294, algorithm 1 and equations 1-5; dino ``main_dino.py:DINOLoss``).

Shapes: V views (G global ones first), B images, K prototypes; views-major, so view v of image b is
row v*B + b.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit_dino.train.dist import all_reduce_mean


def wide(x: Tensor) -> Tensor:
    """At least float32: bfloat16 logits are too coarse for a softmax over 65,536 prototypes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class DinoLoss(nn.Module):
    """Cross-entropy between the teacher's centred, sharpened prototypes and the student's.

    State: ``center`` (K,), the moving average of the teacher's outputs.
    """

    center: Tensor
    batch_sum: Tensor

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9):
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(out_dim))
        self.register_buffer("batch_sum", torch.zeros(out_dim), persistent=False)
        self.rows = 0

    @torch.no_grad()
    def targets(self, teacher_VBK: Tensor, temperature: float, num_global: int = 2) -> Tensor:
        """Teacher outputs (G*B, K) -> probabilities (G, B, K), float32; counted for the centre."""
        logits = wide(teacher_VBK)
        self.batch_sum += logits.sum(0)
        self.rows += len(logits)
        probabilities = F.softmax((logits - self.center) / temperature, dim=-1)
        return probabilities.unflatten(0, (num_global, -1))

    def forward(self, student_VBK: Tensor, targets_GBK: Tensor) -> Tensor:
        """Mean cross-entropy over all pairs (teacher's global view g, student's other view v).

        For one student view the pairs share its log-normaliser, and the teachers' probabilities add
        up:
        ``sum_g H(q_g, p_v) = n_v * logsumexp(z_v) - <sum_g q_g, z_v>``.
        """
        num_global, batch = targets_GBK.shape[:2]
        logits_VBK = (wide(student_VBK) / self.student_temp).unflatten(0, (-1, batch))
        normaliser_VB = torch.logsumexp(logits_VBK, dim=-1)
        total = targets_GBK.sum(0)
        loss = logits_VBK.new_zeros(())
        pairs = 0
        for v, (logits, normaliser) in enumerate(zip(logits_VBK, normaliser_VB, strict=True)):
            seen = v < num_global  # the teacher saw this very view: that pair is skipped
            target = total - targets_GBK[v] if seen else total
            teachers = num_global - seen
            loss = loss + (teachers * normaliser - (target * logits).sum(-1)).mean()
            pairs += teachers
        return loss / pairs

    @torch.no_grad()
    def update_center(self) -> None:
        """Move the centre to the mean output of all micro-batches and ranks since the last time."""
        mean = all_reduce_mean(self.batch_sum / self.rows)
        self.center.lerp_(mean, 1.0 - self.center_momentum)
        self.batch_sum.zero_()
        self.rows = 0
