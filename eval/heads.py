"""Many linear classifiers trained side by side on the same features: one matrix product for all of
them.

A *head* is a linear layer with its own learning rate, weight decay and choice of feature blocks.
Each exists twice: the *selection* twin never sees the held-out images and is judged on them, the
*final* twin sees every training image. The best selection twin names the final twin that is
reported, so the choice costs no second training and never looks at the validation set.

Shapes: B images, D features of a layer choice and a constant 1 (for the bias), G heads of it, C
classes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xcit_dino.errors import InputError
from xcit_dino.eval.features import LAYERS

MOMENTUM = 0.9  # DINO eval_linear.py
INIT_STD = 0.01  # DINO eval_linear.py: LinearClassifier
Blocks = dict[str, Tensor]


@dataclass(frozen=True)
class Choice:
    """One point of the grid."""

    layers: str
    lr: float
    """For 256 images."""
    weight_decay: float


def grid(
    layers: Sequence[str], lrs: Sequence[float], weight_decays: Sequence[float]
) -> list[Choice]:
    """All combinations, in the order in which the first of equally good ones is preferred."""
    return [
        Choice(*point) for point in itertools.product(layers, sorted(lrs), sorted(weight_decays))
    ]


def cosine(progress: float) -> float:
    """Factor of the learning rate after a share ``progress`` of the training, from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def hold_out(count: int, share: float, seed: int) -> Tensor:
    """bool (count,): a random share of the images, at least one."""
    if count < 2:
        raise InputError("the training split has fewer than 2 images: none can be held out")
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed + 1))
    held_out = torch.zeros(count, dtype=torch.bool)
    held_out[chosen[: min(count - 1, max(1, round(share * count)))]] = True
    return held_out


class HeadGroup:
    """The heads of one layer choice, selection twins in the first half of the columns, final ones
    in the second.

    The gradient of the mean cross-entropy of a linear softmax classifier is X' (softmax(XW) -
    onehot) / B; it is written out here, and the update is ``torch.optim.SGD``'s.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        dim: int,
        classes: int,
        batch_size: int,
        seed: int,
        device: torch.device,
    ):
        self.choices, self.classes = list(choices), classes
        self.blocks = LAYERS[choices[0].layers]
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(dim, classes, generator=generator) * INIT_STD  # all heads start equal
        first = torch.cat((first, torch.zeros(1, classes)))
        self.weight_DGC = first[:, None].repeat(1, 2 * len(choices), 1).to(device)
        self.momentum_DGC = torch.zeros_like(self.weight_DGC)
        scale = batch_size / 256  # linear scaling rule
        self.lr_G = torch.tensor([c.lr * scale for c in choices] * 2, device=device)[:, None]
        self.decay_G = torch.tensor([c.weight_decay for c in choices] * 2, device=device)[:, None]

    def inputs(self, blocks: Blocks) -> Tensor:
        """Blocks (B, d) side by side with a column of ones: (B, D)."""
        parts = [blocks[name] for name in self.blocks]
        return torch.cat((*parts, parts[0].new_ones(len(parts[0]), 1)), dim=1)

    def step(self, blocks: Blocks, labels: Tensor, used_BG: Tensor, factor: float) -> None:
        """One SGD step of all heads. used_BG: (B, G) share of each image in each head's mean
        loss."""
        x_BD = self.inputs(blocks)
        logits_BGC = (x_BD @ self.weight_DGC.flatten(1)).unflatten(1, self.weight_DGC.shape[1:])
        error_BGC = softmax_(logits_BGC)
        error_BGC[torch.arange(len(labels), device=labels.device), :, labels] -= 1
        error_BGC *= used_BG[..., None]
        gradient_DGC = (x_BD.t() @ error_BGC.flatten(1)).view_as(self.weight_DGC)
        if self.decay_G.any():
            gradient_DGC.addcmul_(self.weight_DGC, self.decay_G)
        self.momentum_DGC.mul_(MOMENTUM).add_(gradient_DGC)
        self.weight_DGC.addcmul_(self.momentum_DGC, self.lr_G, value=-factor)

    def judge(self, blocks: Blocks, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Selection twins on held-out images: (right answers, summed cross-entropy), each float64
        (G / 2,)."""
        half = len(self.choices)
        weight = self.weight_DGC[:, :half].flatten(1)
        logits_BGC = (self.inputs(blocks) @ weight).unflatten(1, (half, self.classes))
        right = (logits_BGC.argmax(-1) == labels[:, None]).sum(0)
        own = logits_BGC.gather(2, labels[:, None, None].expand(-1, half, 1)).squeeze(2)
        return right.double(), (logits_BGC.logsumexp(-1) - own).double().sum(0)

    def final(self, number: int) -> tuple[Tensor, Tensor]:
        """Weight (C, D - 1) and bias (C,) of a final twin."""
        weight_DC = self.weight_DGC[:, len(self.choices) + number]
        return weight_DC[:-1].t().contiguous(), weight_DC[-1].clone()


def softmax_(logits: Tensor) -> Tensor:
    """Softmax over the last dimension, in place. Spelled out because ``torch.softmax`` takes 15
    times as long on a CPU when that dimension is as short as ten classes."""
    logits -= logits.amax(-1, keepdim=True)
    return logits.exp_().div_(logits.sum(-1, keepdim=True))


class Heads:
    """The whole grid: a :class:`HeadGroup` for every layer choice."""

    def __init__(
        self,
        choices: Sequence[Choice],
        dims: dict[str, int],
        classes: int,
        batch_size: int,
        seed: int,
        device: torch.device,
    ):
        by_layers = itertools.groupby(choices, key=lambda choice: choice.layers)
        self.groups = [
            HeadGroup(
                list(group), sum(dims[b] for b in LAYERS[layers]), classes, batch_size, seed, device
            )
            for layers, group in by_layers
        ]

    def step(self, blocks: Blocks, labels: Tensor, held_out: Tensor, factor: float) -> None:
        """One step. blocks: float32 (B, d) each; labels: int64 (B,); held_out: bool (B,); factor:
        see cosine."""
        kept = (~held_out).float()
        selection = kept / kept.sum().clamp(min=1)
        everything = torch.full_like(kept, 1 / len(kept))
        for group in self.groups:
            half = len(group.choices)
            used = torch.stack((selection, everything), 1).repeat_interleave(half, dim=1)
            group.step(blocks, labels, used, factor)

    def judge(self, batches: Iterable[tuple[Blocks, Tensor]]) -> list[tuple[float, float]]:
        """(accuracy in percent, mean cross-entropy) of every choice on held-out batches, in grid
        order."""
        totals, count = None, 0
        for blocks, labels in batches:
            parts = [torch.stack(group.judge(blocks, labels)) for group in self.groups]
            totals = torch.cat(parts, 1) + (0 if totals is None else totals)
            count += len(labels)
        assert totals is not None
        right, loss = (totals / count).tolist()
        return [
            (100 * r, x if math.isfinite(x) else math.inf) for r, x in zip(right, loss, strict=True)
        ]

    def state(self) -> list[Tensor]:
        """The tensors that change, in place when written to."""
        return [t for group in self.groups for t in (group.weight_DGC, group.momentum_DGC)]

    def final(self, number: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of the final twin of choice ``number`` in grid order."""
        for group in self.groups:
            if number < len(group.choices):
                return group.final(number)
            number -= len(group.choices)
        raise IndexError(number)


def best(scores: Sequence[tuple[float, float]]) -> int:
    """The choice of highest accuracy, of equals the one of lowest cross-entropy, then the first."""
    return min(range(len(scores)), key=lambda i: (-scores[i][0], scores[i][1], i))
