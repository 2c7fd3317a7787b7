"""XCiT, the cross-covariance image transformer (El-Nouby et al., 2021, arXiv:2106.09681).

The parameters carry the official names (facebookresearch/xcit, ``xcit.py``), so official
checkpoints load unchanged; the computation is our own. Tokens stay a ``(B, H, W, D)`` grid from
the stem to the class attention: seen through ``permute(0, 3, 1, 2)`` that is a channels-last image,
so the 3x3 convolutions read and write it without a copy.

Shape suffixes: B images, H W rows and columns of patches, N = H W patches, D channels, h heads,
d = D / h channels per head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xcit_dino.errors import InputError
from xcit_dino.models.cross_covariance import cross_covariance_attention

LAYER_NORM_EPS = 1e-6
CLASS_ATTENTION_LAYERS = 2
PATCH_SIZES = (4, 8, 16)


def residual(x: Tensor, update: Tensor, gamma: Tensor, drop_rate: float = 0.0) -> Tensor:
    """``x + drop_path(gamma * update)`` in one pass over the tokens.

    x, update: (B, ..., D); gamma: (D,), layer scale; drop_rate: probability in [0, 1) that an
    image skips the update (stochastic depth); kept updates are scaled by 1 / (1 - drop_rate).
    """
    if drop_rate > 0:
        keep = 1 - drop_rate
        kept = gamma.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep)
        gamma = gamma * (kept / keep)
    return torch.addcmul(x, gamma, update)


class Mlp(nn.Module):
    """Two linear layers with a GELU in between; the hidden width is 4 * dim."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class FourierPosition(nn.Module):
    """Sine and cosine of the relative row and column, projected to D channels (no fixed size)."""

    bands = 16
    temperature = 10_000.0

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token_projection = nn.Conv2d(4 * self.bands, dim, kernel_size=1)

    def forward(self, height: int, width: int) -> Tensor:
        """(H, W, D). The projection is linear, so rows and columns are projected separately and
        added: H + W small vectors instead of a table of H x W."""
        weight_y, weight_x = self.token_projection.weight.flatten(1).chunk(2, dim=1)
        rows = F.linear(self._waves(height), weight_y, self.token_projection.bias)
        columns = F.linear(self._waves(width), weight_x)
        return rows[:, None] + columns

    def _waves(self, size: int) -> Tensor:
        """(size, 2 bands): sin, cos, ... of position / size * 2 pi, decreasing frequency."""
        device = self.token_projection.weight.device
        position = torch.arange(1, size + 1, device=device, dtype=torch.float32)
        octave = torch.arange(self.bands, device=device, dtype=torch.float32) / self.bands
        angle = (position / (size + 1e-6) * (2 * math.pi))[:, None] / self.temperature**octave
        waves = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)
        return waves.to(self.token_projection.weight.dtype)


class PatchEmbed(nn.Module):
    """log2(patch_size) strided 3x3 convolutions, each twice as wide as the previous one."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        convs = int(math.log2(patch_size))
        widths = [in_chans, *[dim >> (convs - 1 - i) for i in range(convs)]]
        layers: list[nn.Module] = []
        for wide_in, wide_out in zip(widths, widths[1:], strict=False):
            conv = nn.Conv2d(wide_in, wide_out, 3, stride=2, padding=1, bias=False)
            layers += [nn.Sequential(conv, nn.BatchNorm2d(wide_out)), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, rows, columns) -> (B, H, W, D), contiguous."""
        x = self.proj(images.contiguous(memory_format=torch.channels_last))
        return x.permute(0, 2, 3, 1).contiguous()  # no copy: already channels-last


class LocalPatchInteraction(nn.Module):
    """Two depthwise 3x3 convolutions that mix neighboring patches."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x_BHWD: Tensor) -> Tensor:
        x = x_BHWD.permute(0, 3, 1, 2)
        x = self.conv2(self.bn(F.gelu(self.conv1(x))))
        return x.permute(0, 2, 3, 1)


class CrossCovarianceAttention(nn.Module):
    """Attention between channels: softmax(temperature * cosine(Q, K)) is d x d (paper, eq. 1)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BHWD: Tensor) -> Tensor:
        qkv_BNE = self.qkv(x_BHWD).flatten(1, 2)
        return self.proj(cross_covariance_attention(qkv_BNE, self.temperature)).view(x_BHWD.shape)


class XCABlock(nn.Module):
    """Cross-covariance attention, local patch interaction and MLP, each a scaled residual."""

    def __init__(self, dim: int, num_heads: int, eta: float, drop_path_rate: float) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = CrossCovarianceAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim)
        self.norm3 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.local_mp = LocalPatchInteraction(dim)
        self.gamma1 = nn.Parameter(torch.full((dim,), eta))
        self.gamma2 = nn.Parameter(torch.full((dim,), eta))
        self.gamma3 = nn.Parameter(torch.full((dim,), eta))

    def forward(self, x_BHWD: Tensor) -> Tensor:
        drop = self.drop_path_rate if self.training else 0.0
        x = residual(x_BHWD, self.attn(self.norm1(x_BHWD)), self.gamma1, drop)
        x = residual(x, self.local_mp(self.norm3(x)), self.gamma3, drop)
        return residual(x, self.mlp(self.norm2(x)), self.gamma2, drop)


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """``block(x)`` with activation checkpointing: only ``x`` is stored, the rest is recomputed in
    the backward pass, with the same drop-path and without updating batch-norm statistics twice."""
    out = checkpoint(
        block,
        x,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _without_statistics(block)),
    )
    assert isinstance(out, Tensor)
    return out


@contextmanager
def _without_statistics(block: nn.Module) -> Iterator[None]:
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked -= 1  # type: ignore[operator]
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


class ClassAttention(nn.Module):
    """Attention of the class token to itself and all patches (CaiT, arXiv:2103.17239)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens: (B, 1 + N, D), class token first. Returns its update (B, 1, D) and the
        attention (B, h, 1, 1 + N), whose rows sum to 1."""
        B, _, D = tokens.shape
        weight_q, weight_k, weight_v = self.qkv.weight.chunk(3)
        bias_q, bias_k, bias_v = self.qkv.bias.chunk(3)
        heads = (self.num_heads, D // self.num_heads)
        q_Bhd = F.linear(tokens[:, 0], weight_q, bias_q).unflatten(1, heads) * heads[1] ** -0.5
        # q . (W_k x + b) = (W_k^T q) . x + q . b, and the weights of the mean of W_v x sum to 1:
        # one product for each head with the tokens themselves, none that makes keys and values
        q_hBd, tokens = q_Bhd.transpose(0, 1), tokens.to(q_Bhd.dtype)
        asked_BhD = (q_hBd @ weight_k.unflatten(0, heads)).transpose(0, 1)
        constant_Bh1 = (q_hBd @ bias_k.view(*heads, 1)).transpose(0, 1)
        attention = (asked_BhD @ tokens.transpose(1, 2) + constant_Bh1).softmax(dim=-1)
        mean_BhD = attention.to(asked_BhD.dtype) @ tokens
        update_hBd = mean_BhD.transpose(0, 1) @ weight_v.unflatten(0, heads).transpose(1, 2)
        update = update_hBd.transpose(0, 1).flatten(1) + bias_v
        return self.proj(update.unsqueeze(1)), attention.unsqueeze(2)


class ClassAttentionBlock(nn.Module):
    """Class attention and MLP on the class token.

    The patches are treated as in the official code, because its weights depend on it: their own
    normalized values are added, and the result is doubled.
    """

    def __init__(self, dim: int, num_heads: int, eta: float, tokens_norm: bool) -> None:
        super().__init__()
        self.tokens_norm = tokens_norm
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = ClassAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim)
        self.gamma1 = nn.Parameter(torch.full((dim,), eta))
        self.gamma2 = nn.Parameter(torch.full((dim,), eta))

    def forward(self, tokens: Tensor, class_only: bool = False) -> tuple[Tensor, Tensor]:
        """tokens: (B, 1 + N, D) -> the same, or (B, 1, D) with class_only, and the attention
        (B, h, 1, 1 + N)."""
        normed = self.norm1(tokens)
        update, attention = self.attn(normed)
        cls = self.norm2(residual(tokens[:, :1], update, self.gamma1))
        cls = residual(cls, self.mlp(cls), self.gamma2)
        if class_only:
            return cls, attention
        patches = residual(tokens[:, 1:], normed[:, 1:], self.gamma1)
        patches = self.norm2(patches) if self.tokens_norm else patches
        return torch.cat((cls, 2 * patches), dim=1), attention


class XCiT(nn.Module):
    """The network; takes images of any size divisible by the patch size.

    patch_size: 4, 8 or 16 pixels; num_classes: 0 returns the class token's features; eta: initial
    layer scale; tokens_norm: class attention normalizes all tokens (all sizes except nano);
    drop_path_rate: in [0, 1), the same at every depth, 0 in the class attention (official).
    """

    def __init__(
        self,
        *,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 0,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 8,
        eta: float = 1.0,
        tokens_norm: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if patch_size not in PATCH_SIZES:
            raise InputError(f"patch_size {patch_size}: choose one of {PATCH_SIZES}")
        if not 0 <= drop_path_rate < 1:
            raise InputError(f"drop_path_rate {drop_path_rate}: must be at least 0 and below 1")
        self.patch_size, self.num_classes, self.embed_dim = patch_size, num_classes, embed_dim
        self.in_chans, self.num_heads = in_chans, num_heads
        self.grad_checkpointing = False  # recompute the blocks' activations in the backward pass
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embeder = FourierPosition(embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.blocks = nn.ModuleList(
            XCABlock(embed_dim, num_heads, eta, drop_path_rate) for _ in range(depth)
        )
        self.cls_attn_blocks = nn.ModuleList(
            ClassAttentionBlock(embed_dim, num_heads, eta, tokens_norm)
            for _ in range(CLASS_ATTENTION_LAYERS)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(_init_linear)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, rows, columns) -> logits (B, num_classes), or (B, D) without classes."""
        cls, _ = self._class_attention(self._patches(images), class_only=True)[-1]
        return self.head(self.norm(cls[:, 0]))

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens after the final norm, (B, 1 + N, D): class token, then patches row by row."""
        tokens, _ = self._class_attention(self._patches(images))[-1]
        return self.norm(tokens)

    def block_maps(self, images: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
        """Outputs of some blocks, counted from 0, as maps (B, D, H, W)."""
        maps: dict[int, Tensor] = {}
        if blocks:
            self._patches(images, maps, frozenset(blocks))
        return maps

    def get_intermediate(
        self, images: Tensor, n: int = 1, maps: dict[int, Tensor] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """(class token, mean of patch tokens), each (B, D) after the norm, of the last n class
        attention layers, the last one last. n: 1 or 2; maps: is filled with the outputs (B, D, H,
        W) of all cross-covariance blocks, in the same pass."""
        if not 1 <= n <= len(self.cls_attn_blocks):
            raise InputError(f"n {n}: XCiT has {len(self.cls_attn_blocks)} class attention layers")
        every = frozenset(range(len(self.blocks)))
        outputs = self._class_attention(self._patches(images, maps, every))[-n:]
        normed = [self.norm(tokens) for tokens, _ in outputs]
        return [(tokens[:, 0], tokens[:, 1:].mean(dim=1)) for tokens in normed]

    def get_attention(self, images: Tensor) -> Tensor:
        """Attention of the class token to each patch: (layers, B, h, H, W), in [0, 1]. A map
        and the token's attention to itself sum to 1."""
        patches = self._patches(images)
        maps = [attention[:, :, 0, 1:] for _, attention in self._class_attention(patches)]
        return torch.stack(maps).unflatten(-1, patches.shape[1:3])

    def group_matcher(self) -> dict[str, Any]:
        """Which layer a parameter belongs to, as timm's networks say it (``group_parameters``)."""
        return {
            "stem": r"^cls_token|pos_embeder|patch_embed",
            "blocks": r"^blocks\.(\d+)",
            "cls_attn_blocks": [(r"^cls_attn_blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more dimensions exempt from weight decay."""
        temperatures = {f"blocks.{i}.attn.temperature" for i in range(len(self.blocks))}
        return {"cls_token"} | temperatures

    def _patches(
        self, images: Tensor, maps: dict[int, Tensor] | None = None, wanted: Set[int] = frozenset()
    ) -> Tensor:
        """(B, in_chans, rows, columns) -> (B, H, W, D), after all cross-covariance blocks; the
        outputs of those wanted go into ``maps``, which ends with the last of them."""
        rows, columns = images.shape[-2:]
        if rows % self.patch_size or columns % self.patch_size:
            raise InputError(
                f"image size {rows}x{columns} is not divisible by patch_size {self.patch_size}; "
                f"resize or crop to multiples of {self.patch_size}"
            )
        x = self.patch_embed(images)
        x = x + self.pos_embeder(x.shape[1], x.shape[2])
        for number, block in enumerate(self.blocks):
            x = checkpointed(block, x) if self.grad_checkpointing and self.training else block(x)
            if maps is not None and number in wanted:
                maps[number] = x.permute(0, 3, 1, 2)
                if len(maps) == len(wanted):
                    break
        return x

    def _class_attention(
        self, patches_BHWD: Tensor, class_only: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """Tokens (B, 1 + N, D) and attention (B, h, 1, 1 + N) after each class attention layer;
        with class_only the last layer does not update the patches, which are unused."""
        cls_token = self.cls_token.expand(patches_BHWD.shape[0], -1, -1)
        tokens = torch.cat((cls_token, patches_BHWD.flatten(1, 2)), dim=1)
        outputs = []
        for i, block in enumerate(self.cls_attn_blocks, start=1):
            tokens, attention = block(tokens, class_only and i == len(self.cls_attn_blocks))
            outputs.append((tokens, attention))
        return outputs


def _init_linear(module: nn.Module) -> None:
    """Official initialization: truncated normal, std 0.02; the rest keeps torch's defaults."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
