"""A student distilled without labels against DINO from random weights, at equal time:
python bench/trials/distill_vs_dino.py --data_path SHARDS --teacher_path FILE

The same student is trained twice, side by side, each run pinned to a core of its own. Time is the
processor time of a run and its loader: on a quiet machine that is the wall-clock time of one core,
and what else runs on the machine does not shorten it. The speed of both is measured first, so that
each schedule ends within the time. Then follow the k-NN accuracy of every epoch's checkpoint (as
during pretraining, but not counted in the time), and k-NN and linear probe of the last one with
the evaluation commands.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.budget import TRIED, epoch_seconds, start, wait

METHODS = ("distill", "dino")
SHARE = 0.97  # of the time that the schedule is made for; the start-up takes the rest


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Distillation without labels against DINO")
    parser.add_argument("--data_path", required=True, help="shards with train and val, labeled")
    parser.add_argument("--arch", default="xcit_pico_6_p8", help="the student")
    parser.add_argument("--config", default="configs/distill_ssl/xcit_pico_6_p8.yaml")
    parser.add_argument("--teacher_model", default="timm/tf_efficientnet_lite0")
    parser.add_argument("--teacher_path", required=True)
    parser.add_argument("--teacher_size", default="64")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--linear_epochs", default="30")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/distill_vs_dino"))
    return parser.parse_args()


def pretraining(args: argparse.Namespace, method: str) -> list[str]:
    """The command line of a method, without its length."""
    words = ["pretrain", "--data_path", args.data_path, "--seed", args.seed]
    words += ["--precision", args.precision, "--num_workers", "1", "--knn_every", "0"]
    words += ["--saveckp_freq", "1", "--checkpoint_minutes", "0", "--log_every", "20"]
    if method == "dino":
        return [*words, "--arch", args.arch]
    words += ["--config", args.config, "--arch", args.arch, "--teacher_model", args.teacher_model]
    return [*words, "--teacher_path", args.teacher_path, "--teacher_size", args.teacher_size]


def side_by_side(commands: dict[str, list[str]], log: Path) -> dict[str, float]:
    """Run a command of each method on a core of its own; returns the processor seconds of each."""
    cores = sorted(os.sched_getaffinity(0))
    running = {
        method: start(words, cores[number % len(cores)], Path(f"{log}-{method}.log"))
        for number, (method, words) in enumerate(commands.items())
    }
    with ThreadPoolExecutor() as pool:
        return dict(zip(running, pool.map(wait, running.values()), strict=True))


def curve(run: Path, args: argparse.Namespace) -> dict[int, float]:
    """Step -> on-line k-NN of its checkpoint, top-1 in percent."""
    import torch

    from xcit_dino.eval.online import online_knn
    from xcit_dino.models.weights.load import load_backbone
    from xcit_dino.models.zoo import create_model
    from xcit_dino.options import read_yaml
    from xcit_dino.train.distributed import dist

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    evaluate = online_knn(args.data_path, read_yaml(run / "config.yaml"), dist.init("cpu"))
    assert evaluate is not None, "the shards need labels and a validation split"
    found = {}
    for path in sorted((run / "checkpoints").glob("checkpoint-*.pth")):
        backbone = create_model(args.arch, num_classes=0)
        load_backbone(path, backbone, "teacher")
        found[int(path.stem.split("-")[1])] = evaluate(backbone, 0)["knn_top1"]
    return found


def main() -> None:
    args = arguments()
    folder: Path = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    tried = [
        side_by_side(
            {method: [*pretraining(args, method), "--output_dir", str(folder / f"speed-{method}"),
                      "--max_steps", str(steps)] for method in METHODS},
            folder / "speed",
        )
        for steps in TRIED
    ]  # fmt: skip
    commands = {}
    for method in METHODS:
        took = [each[method] for each in tried]
        epoch = epoch_seconds(folder / f"speed-{method}", took)
        epochs = max(1, int(60 * SHARE * args.minutes / epoch))
        words = ["--epochs", str(epochs), "--warmup_epochs", str(min(1, epochs / 10))]
        commands[method] = [
            *pretraining(args, method), *words, "--output_dir", str(folder / method)
        ]  # fmt: skip
        print(f"{method}: {epochs} epochs in {args.minutes:g} minutes", flush=True)
    took = side_by_side(commands, folder / "train")
    runs = {method: folder / method for method in METHODS}
    side_by_side(
        {m: ["knn", "--output_dir", str(run), "--num_workers", "1"] for m, run in runs.items()},
        folder / "knn",
    )
    options = ["--num_workers", "1", "--epochs", args.linear_epochs]
    side_by_side(
        {m: ["linear", "--output_dir", str(run), *options] for m, run in runs.items()},
        folder / "linear",
    )
    for method, run in runs.items():
        results = json.loads((run / "results.json").read_text())
        knn, linear = (results[name]["metrics"] for name in ("knn", "linear"))
        by_step = curve(run, args)
        print(
            f"{method}: {took[method] / 60:.1f} min of a core, {max(by_step):,} steps, "
            f"k-NN {knn['top1_k20']:.2f}, linear {linear['top1']:.2f}"
        )
        print("  k-NN by step:", {k: round(v, 2) for k, v in by_step.items()}, flush=True)


if __name__ == "__main__":
    main()
