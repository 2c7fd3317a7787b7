"""What features are worth for segmentation: python bench/trials/segment.py --data camvid.tar
--weights tf_efficientnet_lite0.pth

CamVid (367 training and 101 validation images of street scenes, 11 classes). A linear probe and
Semantic FPN on the frozen backbone, and Semantic FPN on the finetuned one, each from random
weights, from a network that is pretrained here on the same training images without their masks (by
the recipe that ``xcit-dino recipe`` makes for them), and from trained weights of timm. The same
command continues after an interruption; what is finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

XCIT = "xcit_pico_6_p8"
COMMON = {"crop_size": 192, "resize_size": 240, "batch_size_per_gpu": 8, "warmup_epochs": 1}
HEADS = {
    "linear": {"head": "linear", "epochs": 6},
    "fpn-frozen": {"head": "fpn", "finetune": "false", "lr": 1e-3, "epochs": 4},
    "fpn": {"head": "fpn", "finetune": "true", "lr": 1e-3, "epochs": 4},
}
RUNNING = {"num_workers": 0, "precision": "bf16", "log_every": 10}
TIMES = "bench.json"  # in each run's folder: seconds of all attempts


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Segmentation of CamVid from three backbones")
    parser.add_argument("--data", required=True, help="CamVid: images and masks, a folder or a tar")
    parser.add_argument("--masks", default="camvid/masks", help="folder of the masks in it")
    parser.add_argument("--arch", default="timm/tf_efficientnet_lite0", help="with trained weights")
    parser.add_argument("--weights", required=True, help="of --arch; mean and std are 0.5")
    parser.add_argument("--taps", nargs="*", default=["2", "3", "4"], help="for its linear probe")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/camvid"))
    parser.add_argument("--hours", type=float, default=0.25, help="of pretraining")
    parser.add_argument("--heads", nargs="*", default=list(HEADS), choices=list(HEADS))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    shards, pretrained = args.output_dir / "shards", args.output_dir / "pretrained"
    half = ["0.5"] * 3
    trained = {"arch": args.arch, "pretrained_weights": args.weights, "mean": half, "std": half}
    call("shards make", args.data, shards, masks=args.masks, mask_classes="camvid")
    recipe = args.output_dir / "recipe.yaml"
    if not recipe.is_file():
        call("recipe", shards, recipe, hours=args.hours)
    starts: dict[str, dict[str, Any]] = {"random": {"arch": XCIT}, "trained": trained}
    starts["pretrained"] = {"pretrained_weights": pretrained}
    for head in args.heads:
        for start, network in starts.items():
            if start == "pretrained":
                timed(pretrained, "pretrain", config=recipe, data_path=shards)
            options = COMMON | HEADS[head] | network
            if start == "trained" and head == "linear":
                options["taps"] = args.taps
            timed(args.output_dir / f"{head}-{start}", "segment", **options, data_path=shards)
    for head in args.heads:
        for start in starts:
            show(args.output_dir / f"{head}-{start}")
    print(f"pretraining: {minutes(pretrained)}")


def timed(folder: Path, command: str, **options: Any) -> None:
    """Run a training to its end and add up the seconds of all attempts."""
    known = seconds(folder)
    if known.get("done"):
        return
    began, used = time.monotonic(), cpu_seconds()
    try:
        call(command, output_dir=folder, **RUNNING, **options)
        known["done"] = 1
    finally:
        known["wall"] = known.get("wall", 0) + time.monotonic() - began
        known["cpu"] = known.get("cpu", 0) + cpu_seconds() - used
        if folder.is_dir():
            (folder / TIMES).write_text(json.dumps(known))


def call(command: str, *words: Any, **options: Any) -> None:
    """One command; a list is several words."""
    line = [sys.executable, "-m", "xcit_dino.cli", *command.split(), *map(str, words)]
    for name, value in options.items():
        line += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    subprocess.run(line, check=True)


def cpu_seconds() -> float:
    """Of all processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds(folder: Path) -> dict[str, float]:
    path = folder / TIMES
    return json.loads(path.read_text()) if path.is_file() else {}


def minutes(folder: Path) -> str:
    known = seconds(folder)
    return f"{known['wall'] / 60:.1f} min, {known['cpu'] / 60:.1f} min of CPU time"


def show(folder: Path) -> None:
    entry = json.loads((folder / "results.json").read_text())["segment"]
    metrics = "  ".join(f"{name} {value:.1f}" for name, value in entry["metrics"].items())
    print(f"{folder.name:18} {metrics}  {minutes(folder)}  {entry['commit']}")


if __name__ == "__main__":
    main()
