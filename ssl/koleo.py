"""KoLeo: spread the features of different images apart (arXiv 1806.03198; DINOv2
``dinov2/loss/koleo_loss.py``)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8


def koleo_loss(features_VBD: Tensor, num_views: int) -> Tensor:
    """Features (V*B, D), views-major -> sum over the views of -log of the distance between an
    image's normalized features and those of its nearest neighbor among the other images of this
    micro-batch, averaged over images; in at least float32.
    """
    views = features_VBD.unflatten(0, (num_views, -1))
    with torch.autocast(features_VBD.device.type, enabled=False):
        wide = views.to(torch.promote_types(views.dtype, torch.float32))
        unit = F.normalize(wide, dim=-1, eps=EPS)
        with torch.no_grad():
            cosines = unit @ unit.transpose(1, 2)
            cosines.diagonal(dim1=1, dim2=2).fill_(-1)
            nearest = cosines.argmax(-1, keepdim=True).expand_as(unit)
        distance = F.pairwise_distance(unit, unit.gather(1, nearest), p=2, eps=EPS)
        return -torch.log(distance + EPS).mean(1).sum()
