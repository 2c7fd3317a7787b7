"""What a grid of learning rates costs in our linear probe and in DINO's.

    python bench/linear.py RUN [--epochs 100] [--repeats 3] [--seconds 30]

RUN is a pretraining run. First the time of the command ``xcit-dino linear`` with cached features,
with one learning rate and with 13, alternately. Then that of DINO's ``eval_linear.py`` written
plainly: augmented images through the frozen backbone in every epoch, for one learning rate; it is
measured for some seconds and extrapolated to all its epochs and to 13 runs.

Seconds are wall clock and CPU time; on a busy machine the latter approximates the wall clock of an
idle one. The accuracy of the heads is compared in ``bench/trials/linear_accuracy.py``.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.eval.config import EvalTargetConfig, LinearConfig
from xcit_dino.eval.context import Context
from xcit_dino.eval.target import EvalTarget, pretrained, resolve
from xcit_dino.train.distributed import dist

LRS = LinearConfig().lrs
BATCH = 128  # eval_linear.py
BICUBIC = transforms.InterpolationMode.BICUBIC
Classifiers = list[tuple[nn.Linear, torch.optim.SGD]]
Seconds = NDArray[np.float64]
Steps = Generator[int, None, None]


class Images(Dataset):
    """Images and labels of a split, read one by one (``torchvision.datasets.ImageFolder``)."""

    def __init__(self, index: ShardIndex, transform: Callable[[Image.Image], Any]):
        self.index, self.transform = index, transform

    def __len__(self) -> int:
        return self.index.num_samples

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        shard, offset, size = self.index.locate(number)
        with open(self.index.path(shard), "rb") as file:
            content = os.pread(file.fileno(), size, offset)
        image = Image.open(io.BytesIO(content)).convert("RGB")
        return self.transform(image), int(self.index.labels[number])


def loader(
    context: Context,
    split: str,
    interpolation: transforms.InterpolationMode = transforms.InterpolationMode.BILINEAR,
) -> DataLoader:
    """The official transforms, at the size of the run. interpolation: of the random crops,
    torchvision's default as in the official code."""
    augment = [
        transforms.RandomResizedCrop(context.crop, interpolation=interpolation),
        transforms.RandomHorizontalFlip(),
    ]
    center = [transforms.Resize(context.resize, BICUBIC), transforms.CenterCrop(context.crop)]
    common = [transforms.ToTensor(), transforms.Normalize(context.inputs.mean, context.inputs.std)]
    transform = transforms.Compose((augment if split == "train" else center) + common)
    return DataLoader(
        Images(context.index(split), transform), BATCH, shuffle=split == "train", num_workers=2
    )


def official_epoch(model: nn.Module, images: DataLoader, heads: Classifiers) -> Steps:
    """One epoch of ``eval_linear.py:train``; yields the number of images after each step."""
    for batch, targets in images:
        with torch.no_grad():
            features = model(batch)
        for head, optimizer in heads:
            loss = nn.CrossEntropyLoss()(head(features), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield len(batch)


def classifiers(dim: int, num_classes: int, lrs: tuple[float, ...]) -> Classifiers:
    """Linear classifiers with an optimizer each, all starting from the same weights."""
    heads = []
    for lr in lrs:
        torch.manual_seed(0)
        head = nn.Linear(dim, num_classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        heads.append((head, torch.optim.SGD(head.parameters(), lr * BATCH / 256, momentum=0.9)))
    return heads


def now() -> Seconds:
    """Wall clock, and CPU time of this process and of child processes that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return np.array([time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in used)])


def official_seconds(context: Context, model: nn.Module, seconds: float) -> tuple[int, Seconds]:
    """(images, seconds) of a part of an epoch of one official run; the clock leaves the workers'
    start out."""
    heads = classifiers(model.embed_dim, num_classes(context), LRS[:1])  # type: ignore[arg-type]
    images, busy, clock = 0, now()[1], None
    steps = official_epoch(model, loader(context, "train"), heads)
    for count in steps:
        if clock is None:
            clock = time.perf_counter()
            continue
        images += count
        if time.perf_counter() - clock > seconds:
            break
    assert clock is not None
    clock = time.perf_counter() - clock
    steps.close()  # ends the workers, so that their time is known
    return images, np.array([clock, now()[1] - busy])


def num_classes(context: Context) -> int:
    return int(context.index("train").labels.max()) + 1


def command(folder: Path, target: EvalTarget, context: Context, *options: str) -> Seconds:
    """Seconds of the command ``xcit-dino linear``, including start-up."""
    words = [
        "--output_dir", folder, "--arch", target.arch, "--data_path", context.data_path,
        "--pretrained_weights", target.weights, "--crop_size", context.crop,
        "--resize_size", context.resize, "--num_workers", 2, *options,
    ]  # fmt: skip
    began = now()
    subprocess.run(
        [sys.executable, "-m", "xcit_dino.cli", "linear", *map(str, words)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seconds = now() - began
    (folder / "results.json").unlink()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0)
    args = parser.parse_args()
    world = dist.World(0, 1, torch.device("cpu"))
    target, context = resolve(EvalTargetConfig(output_dir=args.run, device="cpu"), world)
    model = pretrained(target).model
    folder = Path(tempfile.mkdtemp())
    times(args, target, context, model, folder)
    shutil.rmtree(folder)


def times(
    args: argparse.Namespace, target: EvalTarget, context: Context, model: nn.Module, folder: Path
) -> None:
    """Measure and print seconds."""
    epochs = ("--epochs", str(args.epochs))
    dino_grid = ("--layers", "cls", "--weight_decays", "0")
    first, again = (
        command(folder, target, context, "--epochs", "1", "--lrs", "0.1", *dino_grid)
        for _ in range(2)
    )
    features = first - again
    grids = {
        "1 learning rate": ("--lrs", "0.1", *dino_grid),
        "13 learning rates": dino_grid,
        "1 learning rate x 3 layers": ("--lrs", "0.1"),
        "13 learning rates x 3 layers": (),
    }
    seconds: dict[str, list[Seconds]] = {name: [] for name in grids}
    for _ in range(args.repeats):
        for name, options in grids.items():
            seconds[name].append(command(folder, target, context, *epochs, *options))
    median = {name: np.median(values, axis=0) for name, values in seconds.items()}
    images, part = official_seconds(context, model, args.seconds)
    whole = part / images * context.index("train").num_samples * args.epochs
    one, grid, one3, grid3 = median.values()

    print(f"{target.arch}, {args.epochs} epochs, {torch.get_num_threads()} threads")
    print(f"{'seconds':<64}{'clock':>10}{'processor':>12}")
    rows = {"features of both splits, once": features}
    rows |= {f"xcit-dino linear, features cached: {name}": x for name, x in median.items()}
    rows |= {f"official run, 1 learning rate (from {images} images)": whole}
    for name, (clock, busy) in rows.items():
        print(f"{name:<64}{clock:10.1f}{busy:12.1f}")
    ratios = {
        "13 learning rates / 1, features cached": grid / one,
        "the same with 3 layers": grid3 / one3,
        "13 learning rates / 1, features included": (features + grid) / (features + one),
        "the same with 3 layers, features included": (features + grid3) / (features + one3),
        "13 official runs / 13 learning rates": len(LRS) * whole / (features + grid),
    }
    for name, (clock, busy) in ratios.items():
        print(f"{name:<64}{clock:10.2f}{busy:12.2f}")


if __name__ == "__main__":
    main()
