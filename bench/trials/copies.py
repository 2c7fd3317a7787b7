"""Copies of photographs, searched for: python bench/trials/copies.py --photos DIR --weights FILE

Of half of the photographs copies are made: cropped, recompressed, blurred, printed over, and all of
it at once (strong), laid out as Copydays is; the other half are distractors. `xcit-dino retrieve
--baselines true` compares the network with random weights and raw pixels.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

TEXT = "SALE  50 %  OFF  "


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Copy detection on photographs")
    parser.add_argument(
        "--photos", type=Path, required=True, help="folder of photographs, searched deeply"
    )
    parser.add_argument("--arch", default="timm/tf_efficientnet_lite0")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/copies"))
    parser.add_argument("options", nargs="*", help="of the command, after --: -- --features cls")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    bank, others = args.output_dir / "copydays", args.output_dir / "others"
    write(args.photos, bank, others, np.random.default_rng(args.seed))
    command = [sys.executable, "-m", "xcit_dino.cli", "retrieve", "--baselines", "true"]
    command += ["--output_dir", args.output_dir, "--bank", bank, "--distractors", others]
    command += ["--arch", args.arch, "--pretrained_weights", args.weights, *args.options]
    subprocess.run(command, check=True)


def write(photos: Path, bank: Path, others: Path, rng: np.random.Generator) -> None:
    """Write originals, copies and distractors."""
    files = sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    rng.shuffle(files)  # type: ignore[arg-type]
    for folder in (bank, others):
        shutil.rmtree(folder, ignore_errors=True)
    for number, path in enumerate(files):
        photo = Image.open(path).convert("RGB")
        name = f"{number:04d}00.jpg"
        if number >= len(files) // 2:
            save(photo, others / name)
            continue
        save(photo, bank / "original" / name)
        crop, dim, print_ = cropped(photo, rng), blurred(photo), printed_over(photo, rng)
        save(crop, bank / "cropped" / name)
        save(photo, bank / "recompressed" / name, 5)
        save(dim, bank / "blurred" / name)
        save(print_, bank / "printed" / name)
        save(blurred(printed_over(cropped(photo, rng), rng)), bank / "strong" / name, 10)


def save(photo: Image.Image, path: Path, quality: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    photo.save(path, "JPEG", quality=quality)


def cropped(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random rectangle of half of the area."""
    width, height = (round(side * 0.5**0.5) for side in photo.size)
    left, top = (int(rng.integers(0, 1 + side - part)) for side, part in
                 zip(photo.size, (width, height), strict=True))  # fmt: skip
    return photo.crop((left, top, left + width, top + height))


def blurred(photo: Image.Image) -> Image.Image:
    """By a Gaussian of a sixtieth of the shorter side."""
    return photo.filter(ImageFilter.GaussianBlur(min(photo.size) / 60))


def printed_over(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Large letters across a third of its height, and a bar in one color below."""
    done = photo.copy()
    draw, (width, height) = ImageDraw.Draw(done), photo.size
    top = int(rng.integers(0, height // 2))
    color = tuple(rng.integers(0, 256, 3).tolist())
    draw.text((0, top), TEXT * 2, fill=color, font_size=height / 4)
    draw.rectangle((0, round(height * 0.85), width, height), fill=color)
    return done


if __name__ == "__main__":
    main()
