"""Label propagation on videos made from photographs: python bench/trials/propagate.py --photos DIR
--arch timm/tf_efficientnet_lite0 --weights FILE

Two objects, cut from two photographs, move, turn and grow before a third one that drifts; a mask is
exact, as it is drawn with the same transform. The frames are written as DAVIS 2017 lays them out,
and `xcit-dino propagate --baselines true` compares the network with random weights, raw pixels and
the first mask repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZE = (854, 480)  # of a frame, as in DAVIS
Pixels = NDArray[np.uint8]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Label propagation on videos made of photographs")
    parser.add_argument(
        "--photos", type=Path, required=True, help="folder of photographs, searched deeply"
    )
    parser.add_argument("--arch", default="timm/tf_efficientnet_lite0")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--frames", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/propagate"))
    parser.add_argument("options", nargs="*", help="of the command, after --: -- --tap 3")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    photos = sorted(p for p in args.photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    davis = args.output_dir / "davis"
    rng = np.random.default_rng(args.seed)
    names = [f"video{number}" for number in range(args.videos)]
    for name in names:
        chosen = [Image.open(photos[n]).convert("RGB") for n in rng.choice(len(photos), 3, False)]
        write_video(davis, name, chosen, args.frames, rng)
    listed = davis / "ImageSets/2017/val.txt"
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text("\n".join(names) + "\n")
    command = [sys.executable, "-m", "xcit_dino.cli", "propagate", "--videos", str(davis)]
    command += ["--arch", args.arch, "--pretrained_weights", args.weights, "--baselines", "true"]
    command += ["--output_dir", str(args.output_dir), *args.options]
    subprocess.run(command, check=True)
    results = json.loads((args.output_dir / "results.json").read_text())
    for name in ("propagate", "propagate/random", "propagate/pixels", "propagate/copy"):
        entry = results[name]
        shown = "  ".join(f"{k} {v:6.2f}" for k, v in entry["metrics"].items())
        print(f"{name:18} {shown}  {entry['wall_seconds']} s  {entry['commit']}")


def write_video(
    root: Path, name: str, photos: list[Image.Image], frames: int, rng: np.random.Generator
) -> None:
    """Write frames and masks of two objects before a background, from three photographs."""
    folders = [root / kind / "480p" / name for kind in ("JPEGImages", "Annotations")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    background = photos[0].resize((SIZE[0] + 120, SIZE[1] + 80), Image.Resampling.BICUBIC)
    objects = [cut_out(photo, rng) for photo in photos[1:]]
    paths = [path_of(rng) for _ in objects]
    for number in range(frames):
        time = number / max(frames - 1, 1)
        left, top = round(120 * time), round(80 * (1 - time))
        frame = background.crop((left, top, left + SIZE[0], top + SIZE[1]))
        mask = Image.new("L", SIZE)
        for label, ((pixels, shape), path) in enumerate(zip(objects, paths, strict=True), start=1):
            corner, angle, scale = path(time)
            side = round(pixels.width * scale)
            turned = [
                each.resize((side, side), Image.Resampling.BICUBIC).rotate(
                    angle, Image.Resampling.BICUBIC, expand=True
                )
                for each in (pixels, shape)
            ]
            inside = Image.fromarray(np.where(np.asarray(turned[1]) > 127, 255, 0).astype(np.uint8))
            frame.paste(turned[0], corner, inside)
            mask.paste(label, corner, inside)
        frame.save(folders[0] / f"{number:05d}.jpg", quality=92)
        mask.save(folders[1] / f"{number:05d}.png")


def cut_out(photo: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A square of a photograph and a shape in it, a star with rounded arms, white on black."""
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    pixels = photo.crop((left, top, left + side, top + side)).resize((220, 220))
    shape = Image.new("L", (220, 220))
    arms, phase = int(rng.integers(3, 7)), rng.uniform(0, 2 * math.pi)
    angles = np.linspace(0, 2 * math.pi, 120, endpoint=False)
    radii = 80 + 26 * np.cos(arms * angles + phase)
    points = [
        (110 + r * math.cos(a), 110 + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)
    ]
    ImageDraw.Draw(shape).polygon(points, fill=255)
    return pixels, shape


def path_of(
    rng: np.random.Generator,
) -> Callable[[float], tuple[tuple[int, int], float, float]]:
    """Time in [0, 1] -> upper left corner, angle in degrees, scale of an object."""
    begin, end = (rng.uniform((0, 0), (SIZE[0] - 240, SIZE[1] - 240)) for _ in range(2))
    turn, growth = rng.uniform(-60, 60), rng.uniform(0.8, 1.3)

    def at(time: float) -> tuple[tuple[int, int], float, float]:
        x, y = begin + time * (end - begin)
        return (round(x), round(y)), turn * time, 1 + time * (growth - 1)

    return at


if __name__ == "__main__":
    main()
