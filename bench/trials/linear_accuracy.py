"""Do our linear probe and DINO's reach the same accuracy? Crops and classifiers separately.

    python bench/trials/linear_accuracy.py RUN [--epochs 10] [--orders 16]

RUN is a pretraining run. The backbone is frozen, so the features of each epoch's random crops are
computed once, for three kinds of crops: torchvision's bilinear ones of ``eval_linear.py``,
torchvision's bicubic ones, and ours. On each, DINO's 13 classifiers with an ``nn.Linear`` and an
``SGD`` each, and our :class:`Heads`, are trained in the same order of the images from the same
initial weights; then in other orders, because at the best learning rates the order matters more
than the kind of crops.

It prints the best of 13 top-1 accuracies on the validation set and, separately for the highest
learning rates and the rest, the difference between the classifiers with all else equal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that bench is found
from bench.linear import BATCH, BICUBIC, LRS, classifiers, loader, num_classes
from xcit_dino.eval.config import EvalTargetConfig, LinearConfig
from xcit_dino.eval.context import Context
from xcit_dino.eval.linear_augmented import crop_loader, flip_half
from xcit_dino.eval.linear_grid import Choice, Heads
from xcit_dino.eval.target import pretrained, resolve
from xcit_dino.progress import progress
from xcit_dino.train.distributed import dist
from xcit_dino.train.schedules import cosine

CPU = torch.device("cpu")
CALM = 0.2  # learning rates above it differ from order to order by half a point and more
Images = Iterable[tuple[Tensor, Tensor]]
Percent = NDArray[np.float64]


@dataclass(frozen=True)
class Epochs:
    """Class tokens (N, D) and labels (N,) of each epoch of random crops, or of one pass."""

    features: list[Tensor]
    labels: list[Tensor]


def their_crops(context: Context, interpolation: transforms.InterpolationMode) -> Iterator[Images]:
    """torchvision's crops, one epoch at a time."""
    torch.manual_seed(0)
    while True:
        yield loader(context, "train", interpolation)


def our_crops(context: Context, config: LinearConfig) -> Iterator[Images]:
    """Crops of ``--protocol dino``, one epoch at a time."""
    crops = crop_loader(context.index("train"), context, config)
    batches = (
        (flip_half(context.normalize(b.global_crops[0]), b, config.seed), b.labels)
        for (b,) in crops
    )
    while True:
        yield islice(batches, crops.plan.steps_per_epoch)


@torch.inference_mode()
def embedded(model: nn.Module, epochs: Iterable[Images], name: str) -> Epochs:
    """The features of all images of all epochs."""
    result = Epochs([], [])
    for number, images in enumerate(epochs, 1):
        batches = [(model(x), y.long()) for x, y in images]
        result.features.append(torch.cat([x for x, _ in batches]))
        result.labels.append(torch.cat([y for _, y in batches]))
        print(f"{name}: {number} epochs of features", file=sys.stderr, flush=True)
    return result


def accuracies(train: Epochs, val: Epochs, classes: int, seed: int) -> tuple[Percent, Percent]:
    """Top-1 of DINO's 13 classifiers and of ours after learning from ``train`` in one order."""
    dim = train.features[0].shape[1]
    theirs = classifiers(dim, classes, LRS)
    ours = Heads([Choice("cls", lr, 0.0) for lr in LRS], {"cls": dim}, classes, BATCH, 0, CPU)
    first = theirs[0][0]
    ours.groups[0].weight_CGD.copy_(torch.cat((first.weight, first.bias[:, None]), 1)[:, None])

    generator = torch.Generator().manual_seed(seed)
    for epoch, (features, labels) in enumerate(zip(train.features, train.labels, strict=True)):
        factor = cosine(epoch, len(train.features), 1.0, 0.0)
        for lr, (_, optimizer) in zip(LRS, theirs, strict=True):
            optimizer.param_groups[0]["lr"] = lr * BATCH / 256 * factor
        for rows in torch.randperm(len(labels), generator=generator).split(BATCH):
            x, y = features[rows], labels[rows]
            for head, optimizer in theirs:
                optimizer.zero_grad()
                nn.functional.cross_entropy(head(x), y).backward()
                optimizer.step()
            with torch.no_grad():
                ours.step({"cls": x}, y, factor)

    (features,), (labels,) = val.features, val.labels
    with torch.no_grad():
        right = [float((head(features).argmax(1) == labels).double().mean()) for head, _ in theirs]
        scores = ours.score([({"cls": features}, labels)])
    return 100 * np.array(right), np.array([top1 for top1, _ in scores])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--orders", type=int, default=16, choices=range(2, 1000), metavar="N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    options = EvalTargetConfig(
        output_dir=args.run, device="cpu", batch_size_per_gpu=BATCH, num_workers=2
    )
    target, context = resolve(options, dist.World(0, 1, CPU))
    config = LinearConfig(target=options)
    model, classes = pretrained(target).model, num_classes(context)
    val = embedded(model, [loader(context, "val")], "center crops")
    kinds = {
        "torchvision, bilinear": their_crops(context, transforms.InterpolationMode.BILINEAR),
        "torchvision, bicubic": their_crops(context, BICUBIC),
        "ours": our_crops(context, config),
    }
    table = Table("crops", "DINO's classifiers", "ours", f"differ, lr <= {CALM:g}", "differ, all")
    for name, epochs in kinds.items():
        train = embedded(model, islice(epochs, args.epochs), name)
        runs = np.empty((args.orders, 2, len(LRS)))
        with progress(name, args.orders, "orders") as bar:
            for order in range(args.orders):
                runs[order] = accuracies(train, val, classes, order)
                bar.advance()
        best = runs.max(2)
        apart = np.abs(runs[:, 0] - runs[:, 1])
        calm = apart[:, np.array(LRS) <= CALM]
        means, spreads = best.mean(0), best.std(0, ddof=1)
        columns = [f"{x:.2f} ± {sd:.2f}" for x, sd in zip(means, spreads, strict=True)]
        table.add_row(name, *columns, f"{calm.max():.2f}", f"{apart.max():.2f}")
    print(f"{target.arch}, {args.epochs} epochs, {args.orders} orders; best of 13 learning rates,")
    print("top-1 in percent, mean and standard deviation; at most by how much they differ")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
