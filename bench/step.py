"""One training step, ours and the official one side by side: ``python bench/step.py``.

    python bench/step.py --device cuda --arch xcit_small_12_p16 --batch_size 64 --largest

The official step (``bench/reference.py``: eager, on timm's XCiT) and ours run alternately in one
process, on the same weights and crops; medians. First both are checked to give the same loss and
gradients in float32. Parts: the whole step, then loss and head alone, each in a fresh process,
because the cost of fresh memory depends on what a process did before. The official code uses fp32
on CPUs and fp16 on GPUs; ``--reference_precision`` changes that.

Memory: the peak of a step beyond weights and optimizer state; on a CPU from the allocator's trace,
on a GPU from ``max_memory_allocated``. Needs no data and no internet access.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that bench is found
from bench.contestants import check_equality, our_work, plain_work
from bench.flops import step_flops
from bench.measure import alternately, largest_batch, peak_bytes, peak_tflops
from xcit_dino.train.amp import DTYPES

PARTS = {"step": "step", "loss_head": "loss and head"}
Row = tuple[str, ...]


def fresh(function: Callable[..., Any], args: argparse.Namespace, *rest: str) -> Any:
    """Run ``function(args, *rest)`` in a separate process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (args.threads,)) as pool:
        return pool.submit(function, args, *rest).result()


def part_rows(
    args: argparse.Namespace, part: str, precision: str, reference_precision: str
) -> list[Row]:
    """The table's rows of a part: rate, memory and, of the whole step, utilization."""
    pair = [
        getattr(plain_work(args, reference_precision, args.batch_size), part),
        getattr(our_work(args, precision, args.batch_size), part),
    ]
    seconds = alternately(pair, args.repeats, args.device)
    ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    rates = [args.batch_size / statistics.median(times) for times in seconds]
    memory = [peak_bytes(work, args.device) / 1e6 for work in pair]
    rows = [
        (f"{PARTS[part]}, images/s", *(f"{rate:.2f}" for rate in rates), f"{ratio:.2f} x"),
        (f"{PARTS[part]}, MB", *(f"{m:.0f}" for m in memory), f"{memory[1] / memory[0]:.0%}"),
    ]
    if part == "step":
        peak, source = peak_tflops(args.device, precision)
        used = [rate * step_flops(args) / peak / 1e12 for rate in rates]
        utilized = [f"{share:.1%}" for share in used]
        rows.append((f"utilization of {peak:.3g} TFLOP/s, {source}", *utilized, ""))
    return rows


def largest_row(args: argparse.Namespace, precision: str, reference_precision: str) -> Row:
    """The largest batches of both that fit this GPU."""
    official = largest_batch(lambda size: plain_work(args, reference_precision, size).step)
    ours = largest_batch(lambda size: our_work(args, precision, size).step)
    return "largest batch", str(official), str(ours), f"{ours / official:.2f} x"


def settings(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, from the command line unless given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="xcit_nano_12_p16")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--precision", default="bf16", choices=DTYPES)
    parser.add_argument("--reference_precision", nargs="+", choices=DTYPES, help="one table each")
    parser.add_argument("--prototypes", type=int, default=65_536)
    parser.add_argument("--local_crops", type=int, default=10)
    parser.add_argument("--global_size", type=int, default=224)
    parser.add_argument("--local_size", type=int, default=96)
    parser.add_argument("--compile", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--grad_checkpointing", action="store_true")
    parser.add_argument("--group_backward", action="store_true")
    parser.add_argument("--largest", action="store_true", help="search the largest batch (GPU)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="on a busy CPU take 1: processor time counts")
    args = parser.parse_args(argv)
    args.threads = args.threads or torch.get_num_threads()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    return args


def main() -> None:
    from rich.console import Console  # bench/gpu/run.py does without
    from rich.table import Table

    args = settings()
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} cores"
    print(f"torch {torch.__version__}, {args.threads} threads, ", end="")
    print(f"load {os.getloadavg()[0]:.1f}, {where}", flush=True)
    print(fresh(check_equality, args), flush=True)
    for official in args.reference_precision or ["fp16" if args.device == "cuda" else "fp32"]:
        title = f"{args.arch}, batch {args.batch_size}, official {official}, ours {args.precision}"
        table = Table("", "official", "ours", "ours / official", title=title)
        for part in args.part:
            for row in fresh(part_rows, args, part, args.precision, official):
                table.add_row(*row)
        if args.device == "cuda" and args.largest:
            table.add_row(*fresh(largest_row, args, args.precision, official))
        Console(width=120).print(table)
    print(f"utilization: {step_flops(args) / 1e9:.1f} GFLOP an image (bench/flops.py)")


if __name__ == "__main__":
    main()
