"""Recipes compared at equal time:
python bench/recipes/search.py --data_path SHARDS --trials bench/recipes/cifar10.yaml

The trials file holds the options of a base recipe and, by name, what each trial changes. Every
trial runs with one thread on a core of its own; its epochs are chosen so that its schedule ends
within the time, from its own speed, measured first. Time is processor time (``bench/budget.py``).
Every finished trial adds a line to the results file: options, seed, commit, steps, seconds, and
what the teacher reached. What has a line is not run again, so the same command goes on after an
interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import yaml

from bench.budget import TRIED, epoch_seconds, start, wait

Options = dict[str, Any]
START_UP = 12  # seconds


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Recipes compared at equal time")
    parser.add_argument("--data_path", required=True, help="shards with train and val, labeled")
    parser.add_argument("--trials", type=Path, required=True, help="base and trials, YAML")
    parser.add_argument("--only", nargs="*", help="names of trials; by default all")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--minutes", type=float, default=6.0, help="of one core, for each trial")
    parser.add_argument("--linear_epochs", type=int, default=0, help="of a linear probe; 0: none")
    parser.add_argument("--cores", type=int, nargs="*", default=sorted(os.sched_getaffinity(0)))
    parser.add_argument("--results", type=Path, default=Path("runs/recipes/results.jsonl"))
    parser.add_argument("--runs_dir", type=Path, default=Path("runs/recipes"))
    return parser.parse_args()


def words(options: Options) -> list[str]:
    """As a command line."""
    line: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        line += [f"--{name}", *map(str, values)]
    return line


def at_scale(options: Options, scale: float) -> Options:
    """The options of a stage, as a training of its own."""
    names = {"global_crops_size", "local_crops_size"} & options.keys()
    sizes = {name: round(options[name] * scale) for name in names}
    return options | sizes | {"stage_scales": [1.0], "stage_shares": [1.0]}


def seconds_per_epoch(options: Options, folder: Path, core: int) -> float:
    """Processor seconds, the mean over the stages."""
    stages = zip(options.get("stage_scales", [1]), options.get("stage_shares", [1]), strict=True)
    seconds = 0.0
    for number, (scale, share) in enumerate(stages):
        run = folder.with_name(f"{folder.name}-speed{number}")
        shutil.rmtree(run, ignore_errors=True)
        line = ["pretrain", *words(at_scale(options, scale)), "--output_dir", str(run)]
        line += ["--epochs", "100", "--knn_every", "0", "--log_every", str(TRIED[0])]
        took = [
            wait(start([*line, "--max_steps", str(steps)], core, folder.with_suffix(".log")))
            for steps in TRIED
        ]
        seconds += share * epoch_seconds(run, took)
        shutil.rmtree(run)
    return seconds


def trial(
    name: str, options: Options, seed: int, core: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Train, and evaluate; returns the line of the results."""
    folder = args.runs_dir / f"{name}-{args.minutes:g}-{seed}"
    log = folder.with_suffix(".log")
    running = {"data_path": args.data_path, "seed": seed, "num_workers": 0, "device": "cpu"}
    options = options | running
    epoch = seconds_per_epoch(options, folder, core)
    epochs = max(1, int((60 * args.minutes - START_UP) / epoch))
    ends = {"epochs": epochs, "knn_every": epochs, "warmup_epochs": warmup(options, epochs)}
    shutil.rmtree(folder, ignore_errors=True)
    line = ["pretrain", *words(options | ends), "--output_dir", str(folder)]
    took = wait(start(line, core, log))
    logged = [json.loads(each) for each in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [each for each in logged if "loss" in each]
    found = {key: value for key, value in logged[-1].items() if key.startswith("knn_top")}
    if args.linear_epochs:
        line = ["linear", "--output_dir", str(folder), "--num_workers", "0"]
        wait(start([*line, "--epochs", str(args.linear_epochs)], core, log))
        results = json.loads((folder / "results.json").read_text())
        found["linear_top1"] = results["linear"]["metrics"]["top1"]
    last = {key: steps[-1][key] for key in ("loss", "effective_rank") if key in steps[-1]}
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
    return {
        "trial": name, "seed": seed, "minutes": args.minutes, "epochs": epochs,
        "steps": steps[-1]["step"], "seconds": round(took), **found, **last, "commit": commit,
    }  # fmt: skip


def warmup(options: Options, epochs: int) -> float:
    """A tenth of the training, one epoch at most, unless the trial says it."""
    return options.get("warmup_epochs", min(1.0, epochs / 10))


def main() -> None:
    args = arguments()
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    content = yaml.safe_load(args.trials.read_text())
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    known = {(r["trial"], r["minutes"], r["seed"]) for r in map(json.loads, lines)}
    cores: SimpleQueue[int] = SimpleQueue()
    for core in args.cores:
        cores.put(core)

    def one(name: str, seed: int) -> None:
        core = cores.get()
        try:
            options = content["base"] | (content["trials"][name] or {})
            result = trial(name, options, seed, core, args)
            with open(args.results, "a") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)
        finally:
            cores.put(core)

    wanted = args.only or list(content["trials"])
    with ThreadPoolExecutor(len(args.cores)) as pool:
        jobs = [
            pool.submit(one, name, seed)
            for seed in args.seeds
            for name in wanted
            if (name, args.minutes, seed) not in known
        ]
    for job in jobs:
        job.result()


if __name__ == "__main__":
    main()
