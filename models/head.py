"""DINO's projection head (Caron et al., 2021, arXiv:2104.14294; official ``DINOHead``).

Weight normalization is explicit, with parameters ``weight_g`` and ``weight_v``, the names in
official checkpoints, so those load unchanged and the loss can access the prototypes.

Shape suffixes: B crops, D backbone channels, Z bottleneck, K prototypes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prototypes(nn.Module):
    """A linear layer without bias, with rows ``weight_g * weight_v / |weight_v|``."""

    def __init__(self, dim: int, out_dim: int, norm_last_layer: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not norm_last_layer)
        self.weight_v = nn.Parameter(nn.Linear(dim, out_dim, bias=False).weight.detach())

    def forward(self, z_BZ: Tensor) -> Tensor:
        """(B, K) in at least float32, even under autocast: a teacher temperature of 0.04 multiplies
        every error by 25. The norms scale the scores, not a copy of the weights."""
        with torch.autocast(z_BZ.device.type, enabled=False):
            scores_BK = F.linear(z_BZ.to(self.weight_v.dtype), self.weight_v)
            norm_K1 = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
            return scores_BK * (self.weight_g / norm_K1).flatten()


class DINOHead(nn.Module):
    """MLP to a normalized bottleneck, then cosine similarity with K prototypes.

    in_dim: D; out_dim: K; use_bn: batch norm after each hidden linear layer; norm_last_layer:
    prototypes keep norm 1; nlayers: linear layers of the MLP, at least 1; hidden_dim and
    bottleneck_dim: their widths.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 65_536,
        *,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__()
        assert nlayers >= 1, nlayers
        widths = [in_dim, *[hidden_dim] * (nlayers - 1)]
        layers: list[nn.Module] = []
        for wide_in, wide_out in zip(widths, widths[1:], strict=False):
            layers.append(nn.Linear(wide_in, wide_out))
            if use_bn:
                layers.append(nn.BatchNorm1d(wide_out))
            layers.append(nn.GELU())
        layers.append(nn.Linear(widths[-1], bottleneck_dim))
        # A single layer has no index in the official names.
        self.mlp = nn.Sequential(*layers) if nlayers > 1 else layers[0]
        self.mlp.apply(_init_linear)
        self.last_layer = Prototypes(bottleneck_dim, out_dim, norm_last_layer)

    def bottleneck(self, x_BD: Tensor) -> Tensor:
        """(B, Z), rows of norm 1, in at least float32: under autocast the MLP returns bfloat16,
        whose three significant digits would leave the norms that inexact."""
        z_BZ = self.mlp(x_BD)
        return F.normalize(z_BZ.to(torch.promote_types(z_BZ.dtype, torch.float32)), dim=-1)

    def forward(self, x_BD: Tensor) -> Tensor:
        """(B, K) scores. Training uses only the bottleneck: ``ssl/fused_loss.py`` never stores
        the scores of all crops."""
        return self.last_layer(self.bottleneck(x_BD))


def _init_linear(module: nn.Module) -> None:
    """Official initialization: truncated normal, std 0.02; zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
