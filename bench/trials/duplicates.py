"""Planted near-duplicates, searched for: python bench/trials/duplicates.py --data CIFAR

CIFAR is a folder with CIFAR-10's train/CLASS/*.jpg and test/CLASS/*.jpg. Copies of 100 training
images, 20 each recompressed, cropped, blurred, brightened and shifted, are added to test; then
`xcit-dino duplicates` searches all images. Recall: copies paired with their original. Precision:
pairs of a copy with its original, or with what is itself a near-duplicate of that, among all pairs
with a copy. CIFAR-10 has near-duplicates of its own, which are counted apart.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter

from xcit_dino.models.zoo import create_model

Copy = Callable[[Image.Image], Image.Image]
Key = tuple[str, str]
"""Split and path of an image."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Planted near-duplicates among CIFAR-10")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--arch", default="xcit_pico_6_p8")
    parser.add_argument("--weights", type=Path, help="default: random ones")
    parser.add_argument("--train_shards", type=Path, help="of train, where it is packed already")
    parser.add_argument("--copies", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/duplicates"))
    parser.add_argument("options", nargs="*", help="of the command, after --: -- --crop_size 64")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    val, shards = args.output_dir / "val", args.output_dir / "shards"
    planted = plant(args.data, val, args.copies, np.random.default_rng(args.seed))
    cli = [sys.executable, "-m", "xcit_dino.cli"]
    shards.mkdir(parents=True, exist_ok=True)
    sources = {"val": val}
    if args.train_shards and not (shards / "train").exists():
        (shards / "train").symlink_to(args.train_shards.resolve())
    elif not args.train_shards:
        sources["train"] = args.data / "train"
    for split, source in sources.items():
        words = ["shards", "make", source, shards, "--split", split, "--verify", "false"]
        subprocess.run([*cli, *words], check=True)
    weights = args.weights or args.output_dir / "random.pth"
    if not args.weights:
        torch.manual_seed(args.seed)
        torch.save(create_model(args.arch, num_classes=0).state_dict(), weights)
    command = [*cli, "duplicates", "--output_dir", args.output_dir, "--data_path", shards]
    command += ["--arch", args.arch, "--pretrained_weights", weights, *args.options]
    subprocess.run(command, check=True)
    report(args.output_dir, planted)


def plant(data: Path, val: Path, count: int, rng: np.random.Generator) -> dict[Key, Key]:
    """Write the validation images and the copies; returns the original of each copy."""
    shutil.rmtree(val, ignore_errors=True)
    shutil.copytree(data / "test", val)
    originals = sorted((data / "train").rglob("*.jpg"))
    kinds = list(COPIES)
    planted = {}
    for number, chosen in enumerate(rng.choice(len(originals), count, replace=False)):
        original, kind = originals[chosen], kinds[number % len(kinds)]
        label, name = original.parent.name, f"{kind}-{number:03d}.jpg"
        COPIES[kind](Image.open(original)).save(val / label / name, quality=95)
        planted["val", f"{label}/{name}"] = ("train", f"{label}/{original.name}")
    return planted


def recompressed(image: Image.Image) -> Image.Image:
    """At JPEG quality 30."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=30)
    return Image.open(buffer)


def cropped(image: Image.Image) -> Image.Image:
    """28 of 32 pixels, enlarged again."""
    return image.crop((1, 3, 29, 31)).resize(image.size, Image.Resampling.BICUBIC)


def blurred(image: Image.Image) -> Image.Image:
    """By a Gaussian of 0.8 pixels."""
    return image.filter(ImageFilter.GaussianBlur(0.8))


def brightened(image: Image.Image) -> Image.Image:
    """Brighter by 30 %, with 30 % less contrast."""
    return ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(1.3)).enhance(0.7)


def shifted(image: Image.Image) -> Image.Image:
    """By 2 and 1 pixels, the edges repeated."""
    pixels = np.pad(np.asarray(image), ((2, 0), (1, 0), (0, 0)), mode="edge")
    return Image.fromarray(pixels[: image.height, : image.width])


COPIES: dict[str, Copy] = {
    "recompressed": recompressed, "cropped": cropped, "blurred": blurred,
    "brightened": brightened, "shifted": shifted,
}  # fmt: skip


def report(folder: Path, planted: dict[Key, Key]) -> None:
    """Print recall by kind of copy, precision, CIFAR-10's own pairs and the time."""
    pairs = set[frozenset[Key]]()
    with (folder / "duplicates/pairs.csv").open() as file:
        for row in csv.DictReader(file):
            first, second = (row["split"], row["path"]), (row["split_2"], row["path_2"])
            pairs.add(frozenset((first, second)))
    found = [copy for copy, original in planted.items() if frozenset((copy, original)) in pairs]
    with_copy = [pair for pair in pairs if pair & planted.keys()]
    right = [pair for pair in with_copy if is_right(pair, planted, pairs)]
    entry = json.loads((folder / "results.json").read_text())["duplicates"]
    kinds = Counter(path.split("/")[1].split("-")[0] for _, path in found)
    print(f"recall {len(found)} of {len(planted)} ({dict(sorted(kinds.items()))})")
    print(f"precision {len(right)} of {len(with_copy)} pairs with a copy")
    print(f"pairs of CIFAR-10's own images: {len(pairs) - len(with_copy)}")
    print(f"given the features: {entry['wall_seconds']} s; {entry['metrics']}")
    for part, spent in entry["seconds"].items():
        print(f"  {part}: {spent['wall']} s by the clock, {spent['busy']} s busy")


def is_right(pair: frozenset[Key], planted: dict[Key, Key], pairs: set[frozenset[Key]]) -> bool:
    """Whether both are of one original, or the other one is a near-duplicate of the original."""
    copy = next(iter(pair & planted.keys()))
    (other,) = pair - {copy}
    original = planted[copy]
    return original in (other, planted.get(other)) or frozenset((other, original)) in pairs


if __name__ == "__main__":
    main()
