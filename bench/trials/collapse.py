"""Are the collapse alarms of ssl/diagnostics.py raised when they should be, and only then?

    python bench/trials/collapse.py --seeds 20            # healthy runs: every alarm is false
    python bench/trials/collapse.py --seeds 3 --unhealthy # made to collapse: each must raise one
    python bench/trials/collapse.py --koleo_weight 0.05   # the same with KoLeo, as in the recipes

Small real training runs (``xcit-dino pretrain`` without the command line) on the built-in images.
For each kind of run it prints how many raised an alarm, when, and the range of each diagnostic from
step 50 on.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from xcit_dino.data.pack.demo import make
from xcit_dino.data.shards.config import DemoConfig
from xcit_dino.options import replace
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.pretrain import pretrain
from xcit_dino.train.run.metrics import read_metrics

IMAGES = 960
BASE: dict[str, Any] = {
    "arch": "xcit_pico_6_p8", "drop_path_rate": 0.0, "out_dim": 256, "head_hidden_dim": 128,
    "head_bottleneck_dim": 64, "use_bn_in_head": True, "global_crops_size": 32,
    "global_crops_scale": (0.5, 1.0), "local_crops_number": 0, "batch_size_per_gpu": 16,
    "warmup_epochs": 0.5, "lr": 0.008, "weight_decay_end": 0.1, "momentum_teacher": 0.99,
    "freeze_last_layer": 0.2, "blur_prob": (0.0, 0.0, 0.0), "solarize_prob": (0.0, 0.0, 0.0),
    "num_workers": 0, "log_every": 10, "device": "cpu", "precision": "fp32",
    "checkpoint_minutes": 0.0, "min_lr": 1e-5,
}  # fmt: skip
HEALTHY: dict[str, dict[str, Any]] = {
    "healthy": {},
    "healthy, small crops too": {"local_crops_number": 2, "local_crops_size": 16},
    "healthy, 4,096 prototypes": {"out_dim": 4096},
    "healthy, head without batch-norm": {"use_bn_in_head": False},
}
UNHEALTHY: dict[str, dict[str, Any]] = {
    "no centering": {"center_momentum": 1.0},
    "no sharpening": {"teacher_temp": 1.0, "warmup_teacher_temp": 1.0},
    "momentum 0": {"momentum_teacher": 0.0},
    "no centering, momentum 0": {"center_momentum": 1.0, "momentum_teacher": 0.0},
}
DIAGNOSTICS = (
    "teacher_entropy kl information mean_entropy modes prototypes_used feature_std effective_rank"
    " center_norm"
).split()


def train(folder: Path, shards: Path, steps: int, seed: int, changes: dict[str, Any]) -> list[Any]:
    """The metrics of one run, including the number of modes as the alarms compute it."""
    epochs = -(-steps * BASE["batch_size_per_gpu"] // IMAGES)
    options = {"data_path": shards, "output_dir": folder, "epochs": epochs, "seed": seed}
    pretrain(replace(PretrainConfig(), BASE | options | {"max_steps": steps} | changes))
    ceiling = math.log((BASE | changes)["out_dim"])
    lines = read_metrics(folder)
    return [
        x | {"modes": math.exp(x["mean_entropy"] * ceiling)} if "mean_entropy" in x else x
        for x in lines
    ]


def summary(name: str, runs: list[list[Any]]) -> None:
    """Print the results of the runs of one kind."""
    raised: Counter[str] = Counter()
    first: list[int] = []
    for lines in runs:
        alarms = {
            k: x["step"] for x in reversed(lines) for k in x if x.get(k) == 1.0 and "alarm" in k
        }
        raised.update(alarm.removeprefix("alarm_") for alarm in alarms)
        first += [min(alarms.values())] if alarms else []
    when = f", first at step {min(first)} to {max(first)}" if first else ""
    kinds = f" ({', '.join(f'{kind} {n}' for kind, n in raised.items())})" if raised else ""
    print(f"{name}: {len(first)} of {len(runs)} with an alarm{kinds}{when}")
    for key in DIAGNOSTICS:
        values = [x[key] for lines in runs for x in lines if key in x and x["step"] >= 50]
        print(f"    {key:16} {min(values):8.3f} to {max(values):8.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--unhealthy", action="store_true", help="runs made to collapse")
    parser.add_argument("--only", help="one kind of run")
    parser.add_argument("--koleo_weight", type=float, default=0.0, help="of all runs")
    arguments = parser.parse_args()
    kinds = UNHEALTHY if arguments.unhealthy else HEALTHY
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(DemoConfig(folder / "shards", train=IMAGES, val=12))
        for name, changes in kinds.items():
            if arguments.only not in (None, name):
                continue
            each = {"koleo_weight": arguments.koleo_weight} | changes
            runs = [
                train(folder / f"{name}-{seed}", folder / "shards", arguments.steps, seed, each)
                for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds)
            ]
            summary(name, runs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
