"""Many linear classifiers trained simultaneously on the same features: one matrix product for all
of them.

A *head* is a linear layer with its own learning rate, weight decay and choice of feature blocks.

Shapes: B images, D features of a layer choice and a constant 1 (for the bias), G heads of it, C
classes. Classes come first and images last, so that a softmax over few classes runs along images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xcit_dino.data.packed import to_device
from xcit_dino.errors import InputError
from xcit_dino.eval.features import LAYERS, Features
from xcit_dino.train.amp import widest

MOMENTUM = 0.9  # DINO eval_linear.py
INIT_STD = 0.01  # DINO eval_linear.py: LinearClassifier
CHUNK = 4096  # batch size when heads are only applied
FEW, MOST_PARTS = 100, 10  # held-out images; with fewer, several parts of them take turns
Blocks = dict[str, Tensor]


@dataclass(frozen=True)
class Choice:
    """One point of the grid."""

    layers: str
    lr: float
    """For batch size 256."""
    weight_decay: float


def grid(
    layers: Sequence[str], lrs: Sequence[float], weight_decays: Sequence[float]
) -> list[Choice]:
    """All combinations; of equally good ones the first is preferred."""
    return [
        Choice(*point) for point in itertools.product(layers, sorted(lrs), sorted(weight_decays))
    ]


def hold_out(count: int, share: float, seed: int) -> Tensor:
    """bool (count,): a random fraction of the images, at least one."""
    if count < 2:
        raise InputError("the training split has fewer than 2 images: none can be held out")
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed + 1))
    held_out = torch.zeros(count, dtype=torch.bool)
    held_out[chosen[: min(count - 1, max(1, round(share * count)))]] = True
    return held_out


def hold_outs(labels: Tensor, share: float, seed: int) -> list[Tensor]:
    """bool (count,) each: images that are held out together, to choose a head by the others.

    One random ``share`` of the images. Where these are fewer than 100, or fewer than there are
    classes, as many such parts as there are, ten at most, take turns (cross-validation); each has
    the images of every class as evenly as can be. An image that is alone in its class is never held
    out; if all are, there is no part. labels: (count,), or (count, C) of several labels or values.
    """
    held_out, count = hold_out(len(labels), share, seed), len(labels)
    group = labels if labels.ndim == 1 else torch.zeros(count, dtype=torch.int64)
    _, group, sizes = group.unique(return_inverse=True, return_counts=True)
    if held_out.sum() >= max(FEW, len(sizes)):
        return [held_out]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + 1))
    order = order[group[order].argsort(stable=True)]  # class after class, at random within it
    part = torch.empty(count, dtype=torch.int64)
    part[order] = torch.arange(count) % min(MOST_PARTS, round(1 / share))
    if labels.ndim == 1:
        part[sizes[group] == 1] = -1
    return [part == number for number in range(int(part.max()) + 1) if (part == number).any()]


class HeadGroup:
    """The heads of one layer choice.

    The gradient of the mean cross-entropy of a linear softmax classifier is (softmax(W X') -
    onehot) X / B. It is computed explicitly; the part with the labels is the same for all heads, so
    it is computed once. With several labels an image the softmax becomes a sigmoid, and the loss
    the sum over the classes of the binary cross-entropy; with values there is neither, and the loss
    is half the squared error. The update is ``torch.optim.SGD``'s.
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
        self.blocks = LAYERS[choices[0].layers]
        generator = torch.Generator().manual_seed(seed)
        first = (
            torch.randn(classes, dim, generator=generator) * INIT_STD
        )  # all heads have the same initialization
        first = torch.cat((first, torch.zeros(classes, 1)), dim=1)
        self.weight_CGD = first[:, None].repeat(1, len(choices), 1).to(device)
        self.momentum_CGD = torch.zeros_like(self.weight_CGD)
        scale = batch_size / 256  # linear scaling rule
        self.lr_G = torch.tensor([c.lr * scale for c in choices], device=device)[:, None]
        self.decay_G = torch.tensor([c.weight_decay for c in choices], device=device)[:, None]
        self.decays = any(c.weight_decay for c in choices)

    def inputs(self, blocks: Blocks) -> Tensor:
        """Concatenate blocks (B, d) and a column of ones: (B, D)."""
        parts = [blocks[name] for name in self.blocks]
        return torch.cat((*parts, parts[0].new_ones(len(parts[0]), 1)), dim=1)

    def logits(self, x_BD: Tensor) -> Tensor:
        """Logits of every head, (C, G, B)."""
        return (self.weight_CGD.flatten(0, 1) @ x_BD.t()).unflatten(0, self.weight_CGD.shape[:2])

    def step(self, blocks: Blocks, labels: Tensor, factor: float) -> None:
        """One SGD step of all heads on a batch."""
        x_BD = self.inputs(blocks)
        logits_CGB = self.logits(x_BD)
        if labels.ndim == 2:
            values = labels.is_floating_point()
            predicted_CGB = logits_CGB if values else logits_CGB.sigmoid()
            wanted_CB = labels.t().to(x_BD)
        else:
            predicted_CGB = logits_CGB.softmax(0)
            wanted_CB = torch.zeros_like(predicted_CGB[:, 0]).scatter_(0, labels[None], 1)
        gradient_CGD = (predicted_CGB.flatten(0, 1) @ x_BD).view_as(self.weight_CGD)
        gradient_CGD.sub_((wanted_CB @ x_BD)[:, None]).div_(len(labels))
        if self.decays:
            gradient_CGD.addcmul_(self.weight_CGD, self.decay_G)
        self.momentum_CGD.mul_(MOMENTUM).add_(gradient_CGD)
        self.weight_CGD.addcmul_(self.momentum_CGD, self.lr_G, value=-factor)

    def score(self, blocks: Blocks, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(correct predictions, summed loss) on a batch, each float64 (G,), float32 on MPS; with
        several labels an image, images all of whose labels are right, and with values none."""
        logits_CGB = self.logits(self.inputs(blocks))
        wide = widest(logits_CGB.device)
        if labels.ndim == 2:
            wanted_CGB = labels.t()[:, None].to(logits_CGB).expand_as(logits_CGB)
            if labels.is_floating_point():
                loss = (logits_CGB - wanted_CGB).to(wide).square().sum((0, 2)) / 2
                return torch.zeros_like(loss), loss
            loss = F.binary_cross_entropy_with_logits(logits_CGB, wanted_CGB, reduction="none")
            right = ((logits_CGB > 0) == (wanted_CGB > 0)).all(0)
            return right.to(wide).sum(1), loss.to(wide).sum((0, 2))
        right_GB = logits_CGB.argmax(0) == labels
        own_GB = logits_CGB.gather(0, labels.expand(1, *right_GB.shape)).squeeze(0)
        return right_GB.to(wide).sum(1), (logits_CGB.logsumexp(0) - own_GB).to(wide).sum(1)

    def head(self, number: int) -> tuple[Tensor, Tensor]:
        """Weight (C, D - 1) and bias (C,) of one head."""
        weight_CD = self.weight_CGD[:, number]
        return weight_CD[:, :-1].contiguous(), weight_CD[:, -1].clone()


class Heads:
    """The whole grid: one :class:`HeadGroup` per layer choice."""

    def __init__(
        self,
        choices: Sequence[Choice],
        dims: dict[str, int],
        classes: int,
        batch_size: int,
        seed: int,
        device: torch.device,
    ):
        self.choices = choices
        by_layers = itertools.groupby(choices, key=lambda choice: choice.layers)
        self.groups = [
            HeadGroup(
                list(group), sum(dims[b] for b in LAYERS[layers]), classes, batch_size, seed, device
            )
            for layers, group in by_layers
        ]

    def step(self, blocks: Blocks, labels: Tensor, factor: float) -> None:
        """One step. blocks: float32 (B, d) each; labels: int64 (B,), or uint8 (B, C) with several
        an image; factor: of the learning rate, scheduled from 1 to 0."""
        for group in self.groups:
            group.step(blocks, labels, factor)

    def score(self, batches: Iterable[tuple[Blocks, Tensor]]) -> list[tuple[float, float]]:
        """(accuracy in percent, mean cross-entropy) of every choice, in grid order."""
        totals, count = None, 0
        for blocks, labels in batches:
            parts = [torch.stack(group.score(blocks, labels)) for group in self.groups]
            totals = torch.cat(parts, 1) + (0 if totals is None else totals)
            count += len(labels)
        assert totals is not None
        right, loss = (totals / count).tolist()
        return [
            (100 * r, x if math.isfinite(x) else math.inf) for r, x in zip(right, loss, strict=True)
        ]

    def state(self) -> list[Tensor]:
        """The tensors changed by training; may be written in place."""
        return [t for group in self.groups for t in (group.weight_CGD, group.momentum_CGD)]

    def head(self, number: int) -> tuple[Tensor, Tensor]:
        """Weight (C, D - 1) and bias (C,) of choice ``number`` in grid order."""
        for group in self.groups:
            if number < len(group.lr_G):
                return group.head(number)
            number -= len(group.lr_G)
        raise IndexError(number)


class Table:
    """Rows of some feature blocks and labels; kept on the GPU if they take less than half of its
    free memory."""

    def __init__(self, features: Features, names: Iterable[str], device: torch.device):
        self.device = device
        self.blocks = {name: torch.from_numpy(features.blocks[name]) for name in names}
        self.dims = {name: block.shape[1] for name, block in self.blocks.items()}
        self.labels = torch.from_numpy(features.labels)
        if device.type == "cuda":
            bytes_needed = sum(block.nbytes for block in self.blocks.values())
            if bytes_needed < torch.cuda.mem_get_info(device)[0] / 2:
                self.blocks = {name: block.to(device) for name, block in self.blocks.items()}

    def standardize(self) -> tuple[Tensor, Tensor]:
        """Bring values to mean 0 and standard deviation 1; returns these, 0 and 1 for labels."""
        if not self.labels.is_floating_point():
            return torch.zeros((), device=self.device), torch.ones(1, device=self.device)
        mean, std = self.labels.mean(0), self.labels.std(0, correction=0)
        std = torch.where(std > 0, std, 1.0)
        self.labels = ((self.labels - mean) / std).float()
        return mean.float().to(self.device), std.float().to(self.device)

    def rows(self, numbers: Tensor) -> tuple[Blocks, Tensor]:
        """Blocks and labels of some images, on the device; numbers: on the host. Copies are queued:
        a step does not wait for the one before it."""
        blocks = {
            name: to_device(block.index_select(0, to_device(numbers, block.device)), self.device)
            for name, block in self.blocks.items()
        }
        return blocks, to_device(self.labels[numbers], self.device)


@dataclass(frozen=True)
class Probe:
    """A trained grid: the selected head and its weights."""

    choices: list[Choice]
    scores: list[tuple[float, float]]
    """(accuracy in percent, cross-entropy) of each choice on the held-out images, trained without
    them."""
    chosen: int
    """The best choice by these scores."""
    weight: Tensor
    """(C, D - 1), trained on all training images."""
    bias: Tensor
    """(C,)"""

    @property
    def choice(self) -> Choice:
        return self.choices[self.chosen]


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Use the fastest float32 matrix products inside the block: TF32 on GPUs; on CPUs oneDNN's,
    which are float32 except on processors with AMX (bf16 factors), and nearly twice as fast as
    MKL's on AMD's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def best(scores: Sequence[tuple[float, float]], by_loss: bool = False) -> int:
    """The choice of highest accuracy; ties, or ``by_loss`` all: lowest cross-entropy, then the
    first."""
    return min(range(len(scores)), key=lambda i: (-scores[i][0] * (not by_loss), scores[i][1], i))
