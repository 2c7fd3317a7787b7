"""The cost of more processes: ``python bench/world.py`` (gloo, on CPUs).

The same step, with the same images per process, on 1, 2 and 4 processes of one thread each: seconds
per step, and the data that a step sends. Collectives are counted where the step calls torch. With
more processes than cores, read the volume, not the time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that bench is found
from bench.contestants import NOW, Views, crops
from xcit_dino.data.batch import Batch
from xcit_dino.options import replace
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.pretrain import train_step
from xcit_dino.ssl.trainer import set_up
from xcit_dino.train.distributed import dist


def counted(sent: Counter[str]) -> None:
    """Count what this process gives to all-reduces called by our own code."""
    whole = torch.distributed.all_reduce

    def all_reduce(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
        sent["calls"] += 1
        sent["bytes"] += tensor.numel() * tensor.element_size()
        return whole(tensor, *args, **kwargs)  # type: ignore[arg-type]

    torch.distributed.all_reduce = all_reduce


def worker(rank: int, size: int, port: int, args: argparse.Namespace, results: mp.Queue) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = dist.init("cpu")
    values = {"arch": args.arch, "out_dim": args.prototypes, "drop_path_rate": 0.0}
    config = replace(PretrainConfig(), values)
    trainer = set_up(config, world, torch.float32, "", args.batch_size * size)
    trainer.augment = Views()  # type: ignore[assignment]
    sent: Counter[str] = Counter()
    counted(sent)
    nothing = torch.zeros(0, dtype=torch.int64).numpy()
    batch = Batch(0, 0, 0, nothing, nothing, torch.zeros(0), *crops(args, args.batch_size))
    seconds = []
    for _ in range(args.repeats + 1):
        sent.clear()
        began = time.perf_counter()
        train_step(trainer, [batch], NOW)
        seconds.append(time.perf_counter() - began)
    gradients = sum(p.numel() * 4 for p in trainer.student.parameters() if p.requires_grad)
    if rank == 0:
        gradients = gradients if size > 1 else 0
        results.put((statistics.median(seconds[1:]), sent["calls"], sent["bytes"], gradients))
    dist.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="xcit_nano_12_p16")
    parser.add_argument("--batch_size", type=int, default=4, help="images per process")
    parser.add_argument("--prototypes", type=int, default=4096)
    parser.add_argument("--local_crops", type=int, default=2)
    parser.add_argument("--global_size", type=int, default=96)
    parser.add_argument("--local_size", type=int, default=48)
    parser.add_argument("--worlds", type=int, nargs="+", default=(1, 2, 4))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    args.device = "cpu"
    table = Table(
        "processes", "s a step", "all-reduces beside gradients", "MB of them", "gradients, MB"
    )
    for size in args.worlds:
        results = mp.get_context("spawn").SimpleQueue()
        port = 20_000 + os.getpid() % 20_000 + size
        mp.spawn(worker, (size, port, args, results), nprocs=size)
        seconds, calls, other, gradients = results.get()
        table.add_row(
            str(size), f"{seconds:.3f}", str(calls), f"{other / 1e6:.3f}", f"{gradients / 1e6:.1f}"
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
