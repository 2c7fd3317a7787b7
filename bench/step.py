"""One training step, ours beside the official one: ``python bench/step.py``.

    python bench/step.py --device cuda --arch xcit_small_12_p16 --batch_size 64

The official step (``bench/reference.py``: eager, on timm's XCiT) and ours run in one process, in
turns, on the same weights and crops; medians. First both are checked to give the same loss and
gradients in float32. Rows: the whole step, then loss and head alone. The official code knows no
lower precision on CPUs, and fp16 on GPUs; ``--reference_precision`` changes that.

Memory: the most that a step holds beyond weights and optimiser state; on a CPU from the
allocator's own trace, on a GPU from ``max_memory_allocated``. Needs no data and no network.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that bench is found
from bench.flops import step_flops
from bench.reference import PlainHead, PlainLoss, PlainNet, parameter_groups, plain_step
from xcit_dino.data.batch import Batch
from xcit_dino.models.zoo import model_spec
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.pretrain import train_step
from xcit_dino.ssl.schedule import Hyperparameters
from xcit_dino.ssl.trainer import Trainer, set_up
from xcit_dino.train import dist
from xcit_dino.train.config import replace
from xcit_dino.train.precision import DTYPES, autocast

NOW = Hyperparameters(5e-4, 0.04, 0.996, 0.04, freeze_last_layer=False)
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}  # dense bf16, makers' data sheets
GLOBAL_CROPS = 2


@dataclass(frozen=True)
class Work:
    """Ours and the official one, ready to run: the step, and loss and head alone."""

    step: Callable[[], object]
    head: Callable[[], object]


class Views:
    """Stands in for the augmentation: both steps get crops that are ready."""

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.global_crops.flatten(0, 1), batch.local_crops.flatten(0, 1)


def our_trainer(args: argparse.Namespace, precision: str) -> Trainer:
    values = {
        "arch": args.arch, "drop_path_rate": 0.0, "out_dim": args.prototypes,
        "compile": args.compile, "grad_checkpointing": args.grad_checkpointing, "clip_grad": 3.0,
        "global_crops_size": args.global_size, "local_crops_size": args.local_size,
    }  # fmt: skip
    config = replace(PretrainConfig(), values)
    world = dist.World(0, 1, torch.device(args.device))
    trainer = set_up(config, world, DTYPES[precision], "", args.batch_size)
    trainer.augment = Views()  # type: ignore[assignment]
    return trainer


def plain_nets(trainer: Trainer, args: argparse.Namespace) -> list[PlainNet]:
    """timm's XCiT and the plain head with our student's and teacher's values."""
    nets = []
    for ours in (trainer.student, trainer.teacher):
        backbone = timm.create_model(f"{args.arch}_224", num_classes=0)
        state = timm.models.xcit.checkpoint_filter_fn(
            {"model": ours.backbone.state_dict()}, backbone
        )
        backbone.load_state_dict(state)
        head = PlainHead(
            model_spec(args.arch).embed_dim, args.prototypes, 2048, 256, norm_last=True
        )
        head.load_state_dict(ours.head.state_dict())
        nets.append(PlainNet(backbone, head).to(args.device).train())
    nets[1].requires_grad_(False)
    return nets


def crops(args: argparse.Namespace, batch_size: int) -> tuple[Tensor, Tensor]:
    """(2, B, 3, S, S) and (L, B, 3, s, s), as the augmentation gives them."""
    torch.manual_seed(0)
    large = torch.randn(GLOBAL_CROPS, batch_size, 3, args.global_size, args.global_size)
    small = torch.randn(args.local_crops, batch_size, 3, args.local_size, args.local_size)
    return large.to(args.device), small.to(args.device)


def our_work(args: argparse.Namespace, precision: str, batch_size: int) -> Work:
    trainer = our_trainer(args, precision)
    large, small = (x.to(trainer.dtype) for x in crops(args, batch_size))
    nothing = np.zeros(0, np.int64)
    batch = Batch(0, 0, 0, nothing, nothing, torch.zeros(0), large, small)
    student, teacher, loss_fn = trainer.student, trainer.teacher, trainer.loss
    features = head_input(args, batch_size)

    def head() -> None:
        with autocast(trainer.world.device, trainer.dtype):
            with torch.no_grad():
                targets = loss_fn.targets(
                    teacher.head(features[: GLOBAL_CROPS * batch_size]), NOW.teacher_temp
                )
            loss = loss_fn(student.head.bottleneck(features), student.head.last_layer, targets)
        loss.backward()
        student.head.zero_grad()
        loss_fn.update_center()

    return Work(lambda: train_step(trainer, [batch], NOW), head)


def plain_work(args: argparse.Namespace, precision: str, batch_size: int) -> Work:
    student, teacher = plain_nets(our_trainer(args, "fp32"), args)
    views = [view for group in crops(args, batch_size) for view in group]
    loss_fn = PlainLoss(args.prototypes, len(views), 0.1, 0.9).to(args.device)
    optimizer = torch.optim.AdamW(parameter_groups(student))
    low = autocast(torch.device(args.device), DTYPES[precision])
    scaler = torch.amp.GradScaler(args.device) if precision == "fp16" else None
    features = head_input(args, batch_size)

    def step() -> float:
        return plain_step(
            student, teacher, loss_fn, optimizer, views, lr=NOW.lr, weight_decay=NOW.weight_decay,
            momentum=NOW.momentum_teacher, teacher_temp=NOW.teacher_temp, clip=3.0,
            freeze_last_layer=False, autocast=low, scaler=scaler,
        )  # fmt: skip

    def head() -> None:
        with low:
            with torch.no_grad():
                teacher_output = teacher.head(features[: GLOBAL_CROPS * batch_size])
            loss = loss_fn(student.head(features), teacher_output, NOW.teacher_temp)
        loss.item()
        loss.backward()
        student.head.zero_grad()

    return Work(step, head)


def head_input(args: argparse.Namespace, batch_size: int) -> Tensor:
    """What the backbone gives: a row a crop; gradients go on into it."""
    torch.manual_seed(1)
    rows = (GLOBAL_CROPS + args.local_crops) * batch_size
    width = model_spec(args.arch).embed_dim
    return torch.randn(rows, width, device=args.device, requires_grad=True)


def check_equality(args: argparse.Namespace) -> str:
    """Loss and gradients of both in float32, on two images.

    Raises:
        SystemExit: they differ.
    """
    trainer = our_trainer(args, "fp32")
    student, teacher = plain_nets(trainer, args)
    groups = crops(args, 2)
    views = [view for group in groups for view in group]
    with torch.no_grad():
        targets = trainer.loss.targets(
            trainer.teacher.head(trainer.teacher.backbone(groups[0].flatten(0, 1))), 0.04
        )
        teacher_output = teacher(views[:GLOBAL_CROPS])
    z = trainer.student([group.flatten(0, 1) for group in groups])
    ours = trainer.loss(z, trainer.student.head.last_layer, targets)
    plain_loss = PlainLoss(args.prototypes, len(views), 0.1, 0.9).to(args.device)
    plain = plain_loss(student(views), teacher_output, 0.04)
    ours.backward()
    plain.backward()
    official = gradients(student)
    worst = max(
        difference(gradient, official[name])
        for name, gradient in gradients(trainer.student).items()
        if name in official  # timm splits some layers into three
    )
    loss_gap = abs(ours.item() - plain.item()) / plain.item()
    if not (loss_gap < 1e-5 and worst < 2e-3):
        raise SystemExit(f"the steps differ: loss {loss_gap:.1e}, gradients {worst:.1e}")
    return f"float32: losses differ by {loss_gap:.0e}, gradients by {worst:.0e} of their norm"


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-6)).item()


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds by the clock; of processor time on one thread, which other programs disturb less."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    if device == "cuda":
        clock = time.perf_counter
        torch.cuda.synchronize()
    began = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """The most memory that ``work`` holds at once beyond what there was before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        work()
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()  # type: ignore[attr-defined]
        peak = max(peak, held)
    return peak


def largest_batch(make: Callable[[int], Work]) -> int:
    """Images a step that fit this GPU, to a sixteenth."""

    def fits(size: int) -> bool:
        try:
            work = make(size)
            work.step()
            work.step()  # this one has the optimiser's state beside it
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()

    size = 8
    while fits(2 * size):
        size *= 2
    for step in (size // 2, size // 4, size // 8, size // 16):
        size += step if step and fits(size + step) else 0
    return size


def peak_tflops(args: argparse.Namespace, precision: str) -> tuple[float, str]:
    """What a step's arithmetic is held against: a data sheet, else a large matrix product here."""
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    for known, tflops in PEAK_TFLOPS.items():
        if known in name and precision != "fp32":
            return tflops, f"{known}'s data sheet"
    x = torch.randn(2048, 2048, device=args.device, dtype=DTYPES[precision])
    seconds = statistics.median(timed(lambda: x @ x, args.device) for _ in range(9))
    return 2 * 2048**3 / seconds / 1e12, "a 2048 x 2048 matrix product here"


@contextmanager
def titled_table(title: str, *columns: str) -> Iterator[Table]:
    table = Table(*columns, title=title)
    yield table
    Console(width=120).print(table)


def compare(args: argparse.Namespace, precision: str, reference_precision: str) -> None:
    """The table of one pair of precisions."""
    official = plain_work(args, reference_precision, args.batch_size)
    ours = our_work(args, precision, args.batch_size)
    pairs = {"step": (official.step, ours.step), "loss and head": (official.head, ours.head)}
    title = (
        f"{args.arch}, batch {args.batch_size}, official {reference_precision}, ours {precision}"
    )
    peak, source = peak_tflops(args, precision)
    with titled_table(title, "", "official", "ours", "ours / official") as table:
        for name, pair in pairs.items():
            seconds: tuple[list[float], list[float]] = ([], [])
            for work in pair:
                timed(work, args.device)  # warm: compiles, fills caches and optimiser state
            for _ in range(args.repeats):
                for work, times in zip(pair, seconds, strict=True):
                    times.append(timed(work, args.device))
            ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
            rates = [args.batch_size / statistics.median(times) for times in seconds]
            memory = [peak_bytes(work, args.device) / 1e6 for work in pair]
            table.add_row(f"{name}, images/s", *(f"{r:.2f}" for r in rates), f"{ratio:.2f} x")
            table.add_row(
                f"{name}, MB", *(f"{m:.0f}" for m in memory), f"{memory[1] / memory[0]:.0%}"
            )
            if name == "step":
                flops = step_flops(args) * args.batch_size
                mfu = [flops / statistics.median(times) / peak / 1e12 for times in seconds]
                table.add_row(f"utilisation of {peak:.2g} TFLOP/s", *(f"{m:.1%}" for m in mfu), "")
        if args.device == "cuda" and args.largest:
            del official, ours, pairs
            sizes = [
                largest_batch(lambda size: plain_work(args, reference_precision, size)),
                largest_batch(lambda size: our_work(args, precision, size)),
            ]
            table.add_row("largest batch", *map(str, sizes), f"{sizes[1] / sizes[0]:.2f} x")
    print(f"utilisation: {step_flops(args) / 1e9:.1f} GFLOP an image (bench/flops.py); {source}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="xcit_nano_12_p16")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="bf16", choices=DTYPES)
    parser.add_argument("--reference_precision", nargs="+", choices=DTYPES, help="one table each")
    parser.add_argument("--prototypes", type=int, default=65_536)
    parser.add_argument("--local_crops", type=int, default=10)
    parser.add_argument("--global_size", type=int, default=224)
    parser.add_argument("--local_size", type=int, default=96)
    parser.add_argument("--compile", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--grad_checkpointing", action="store_true")
    parser.add_argument("--largest", action="store_true", help="search the largest batch (GPU)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="on a busy CPU take 1: processor time counts")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    default = ["fp16"] if args.device == "cuda" else ["fp32"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, ", end="")
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(check_equality(args))
    for reference_precision in args.reference_precision or default:
        compare(args, args.precision, reference_precision)


if __name__ == "__main__":
    main()
