"""What a training step should take on a GPU that is not there: ``python bench/gpu/roofline.py``.

A prediction for measurements to meet, no measurement. All operations of the real step are counted
(``operations.py``): operations of products and convolutions, and bytes read and written, each
operand once. At the roof an operation takes the longer of its arithmetic at the chip's peak and its
traffic at the chip's bandwidth (makers' data sheets). Expected are ``EXPECTED`` shares of both, and
never less than ``SHORTEST``, the time of the smallest kernel: assumptions, which ``make gpu``
replaces by measured rates.

Compiled: inside a block, neighboring operations that are neither products nor convolutions count as
one kernel, which reads what comes from outside of it and writes what is used later.

    python bench/gpu/roofline.py --write     # updates the tables of docs/performance.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that bench is found
from bench.flops import step_flops
from bench.gpu.operations import Kernel, step_kernels

DOCS = Path(__file__).parents[2] / "docs" / "performance.md"
MARKS = "<!-- roofline -->\n", "<!-- /roofline -->"
ARCHS = ("xcit_nano_12_p16", "xcit_tiny_12_p16", "xcit_small_12_p16", "xcit_small_12_p8")
PARTS_OF = "xcit_small_12_p16"


@dataclass(frozen=True)
class Chip:
    """Data sheet: operations per second of dense products, bytes per second of memory."""

    name: str
    peak: dict[torch.dtype, float]
    bandwidth: float


H200 = Chip(
    "H200",
    {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12},
    4.8e12,
)
EXPECTED = {"products": 0.7, "memory": 0.8}  # shares of the data sheet's rates
SHORTEST = 3e-6  # seconds on the GPU of the smallest kernel
LAUNCH = 6e-6  # seconds on the host for each eager operation, and for each kernel of a graph


def moved(kernel: Kernel) -> int:
    """Bytes that a kernel reads and writes."""
    return sum(kernel.reads.values()) + sum(kernel.writes.values())


def fused(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The kernels after compiling the blocks: neighbors that can be joined are one."""
    last_read = {key: n for n, kernel in enumerate(kernels) for key in kernel.reads}
    result: list[Kernel] = []
    group: list[Kernel] = []
    for number, kernel in enumerate(kernels):
        joins = kernel.fusible and kernel.compiled
        same = group and (group[0].part, group[0].backward) == (kernel.part, kernel.backward)
        if group and not (joins and same):
            result.append(joined(group, last_read, number))
            group = []
        if joins:
            group.append(kernel)
        else:
            result.append(kernel)
    return [*result, joined(group, last_read, len(kernels))] if group else result


def joined(group: Sequence[Kernel], last_read: dict[int, int], end: int) -> Kernel:
    """One kernel instead of several; ``end``: number of the operation after them."""
    inside: set[int] = set()
    reads: dict[int, int] = {}
    writes: dict[int, int] = {}
    for kernel in group:
        for key, size in kernel.reads.items():
            if key not in inside:
                reads[key] = max(size, reads.get(key, 0))
        inside |= kernel.writes.keys()
        for key, size in kernel.writes.items():
            if last_read.get(key, end) >= end:
                writes[key] = max(size, writes.get(key, 0))
    return replace(group[0], name="+".join(k.name for k in group), reads=reads, writes=writes)


def at_roof(kernel: Kernel, chip: Chip) -> float:
    """Seconds at the data sheet's rates."""
    return max(kernel.flops / chip.peak[rate_of(kernel)], moved(kernel) / chip.bandwidth)


def expected(kernel: Kernel, chip: Chip) -> float:
    """Seconds at the expected rates."""
    arithmetic = kernel.flops / chip.peak[rate_of(kernel)] / EXPECTED["products"]
    traffic = moved(kernel) / chip.bandwidth / EXPECTED["memory"]
    return max(arithmetic, traffic, SHORTEST)


def rate_of(kernel: Kernel) -> torch.dtype:
    """The arithmetic of a kernel's products; without TF32, as torch has it for products."""
    return kernel.dtype if kernel.dtype.itemsize == 2 else torch.float32


def step_seconds(kernels: Iterable[Kernel], chip: Chip = H200) -> tuple[float, float]:
    """Expected seconds on the GPU, and on the host for the launches."""
    times = [expected(kernel, chip) for kernel in kernels]
    return sum(times), LAUNCH * len(times)


def parts_table(kernels: Sequence[Kernel], batch_size: int, chip: Chip = H200) -> list[str]:
    """Part by part, the blocks compiled; Markdown."""
    compiled = fused(kernels)
    total = sum(expected(k, chip) for k in compiled)
    lines = [
        "| part of the step | GFLOP | GB, eager | GB, compiled | kernels | at the roof, ms "
        "| expected, ms | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = dict.fromkeys(kernel.part for kernel in kernels)
    rows = {name: [k for k in compiled if k.part == name] for name in names}
    order = sorted(rows, key=lambda name: -sum(expected(k, chip) for k in rows[name]))
    for name, mine in [*((name, rows[name]) for name in order), ("**all**", compiled)]:
        eager = [k for k in kernels if k.part == name or mine is compiled]
        seconds = sum(expected(k, chip) for k in mine)
        lines.append(
            f"| {name} | {sum(k.flops for k in mine) / 1e9:,.0f} "
            f"| {sum(map(moved, eager)) / 1e9:.1f} | {sum(map(moved, mine)) / 1e9:.1f} "
            f"| {len(mine):,} | {1e3 * sum(at_roof(k, chip) for k in mine):.2f} "
            f"| {1e3 * seconds:.2f} | {seconds / total:.0%} |"
        )
    return lines


def archs_row(arch: str, kernels: Sequence[Kernel], args: argparse.Namespace) -> str:
    """The whole step of a network, eager and compiled; Markdown."""
    peak, cells = H200.peak[torch.bfloat16], []
    for variant in (kernels, fused(kernels)):
        device, host = step_seconds(variant)
        rate = args.batch_size / max(device, host)
        used = rate * step_flops(args) / peak
        cells.append(
            f"{1e3 * device:.1f} | {1e3 * host:.1f} | {rate:,.0f} | {used:.0%}",
        )
    return f"| {arch} | {' | '.join(cells)} |"


def tables(args: argparse.Namespace, archs: Sequence[str]) -> list[str]:
    """Both tables, Markdown."""
    sizes = f"{args.batch_size} images, 2 x {args.global_size} + {args.local_crops} x "
    sizes += f"{args.local_size} crops, {args.prototypes:,} prototypes, bf16"
    summary = [
        f"Whole steps ({sizes}), GPU and host, images/s by the slower one:",
        "",
        "| network | eager: GPU, ms | host, ms | images/s | utilization "
        "| compiled: GPU, ms | host, ms | images/s | utilization |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    parts: list[str] = []
    for arch in archs:
        mine = argparse.Namespace(**vars(args) | {"arch": arch})
        kernels = step_kernels(mine)
        summary.append(archs_row(arch, kernels, mine))
        if arch == args.parts_of:
            parts = [f"{arch}, part by part, its blocks compiled:", ""]
            parts += parts_table(kernels, args.batch_size)
    return [*summary, "", *parts]


def written(text: str, lines: Sequence[str]) -> str:
    """The page with these tables instead of its own."""
    before, rest = text.split(MARKS[0])
    return before + MARKS[0] + "\n".join(lines) + "\n" + MARKS[1] + rest.split(MARKS[1])[1]


def settings(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), help="networks of the table")
    parser.add_argument("--parts_of", default=PARTS_OF, help="the one that is taken apart")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--prototypes", type=int, default=65_536)
    parser.add_argument("--local_crops", type=int, default=10)
    parser.add_argument("--global_size", type=int, default=224)
    parser.add_argument("--local_size", type=int, default=96)
    parser.add_argument("--write", action="store_true", help="update docs/performance.md")
    return parser.parse_args(argv)


def main() -> None:
    args = settings()
    lines = tables(args, args.arch)
    print("\n".join(lines))
    if args.write:
        DOCS.write_text(written(DOCS.read_text(), lines))


if __name__ == "__main__":
    main()
