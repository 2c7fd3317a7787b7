"""Parts of run.py about the step. Each imports what it needs itself: without a package only
that part is skipped."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial, partialmethod
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch

from bench.gpu.notes import ROOT, Notes, Setting

BATCH, FIRST = 64, "xcit_small_12_p16"


def machine(setting: Setting, notes: Notes) -> None:
    """Rates that a prediction (bench/gpu/roofline.py) is to be read with."""
    from bench.measure import timed

    device, cuda = setting.device, setting.device == "cuda"
    side, count = (64, 1 << 12) if setting.tiny else (8192, 1 << 29)
    notes.table("Machine", "")
    name = torch.cuda.get_device_name() if cuda else "CPU"
    notes.row("device", f"{name}, {os.cpu_count()} cores beside it")
    notes.row("torch", f"{torch.__version__}, Python {sys.version.split()[0]}")

    def median(work: Callable[[], object], number: int = 1) -> float:
        def several() -> None:
            for _ in range(number):
                work()

        several()
        return statistics.median(timed(several, device) for _ in range(5)) / number

    for label, dtype in (("bf16", torch.bfloat16), ("float32, no TF32", torch.float32)):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in "ab")
        rate = 2 * side**3 / median(lambda a=a, b=b: a @ b, 5) / 1e12
        notes.row(f"product {side} x {side}, {label}", f"{rate:.3g} TFLOP/s")
    x, y = (torch.empty(count, dtype=torch.uint8, device=device) for _ in "xy")
    rate = 2 * count / median(lambda: y.copy_(x), 5) / 1e9
    notes.row("copy on the device, read and written", f"{rate:,.0f} GB/s")
    host = torch.empty(min(count, 1 << 28), dtype=torch.uint8, pin_memory=cuda)
    rate = len(host) / median(lambda: x[: len(host)].copy_(host, non_blocking=True), 3) / 1e9
    notes.row("copy from page-locked memory", f"{rate:.1f} GB/s")
    small = torch.zeros(8, device=device)
    seconds = median(lambda: small.add_(1), 1000)
    notes.row("smallest kernel, launched one after the other", f"{1e6 * seconds:.1f} us")


def tests(setting: Setting, notes: Notes) -> None:
    """The tests for a GPU, one row each."""
    import pytest

    class Rows:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                what = report.nodeid.rsplit("::", 1)[-1]
                if report.when != "teardown" or report.outcome != "passed":
                    notes.row(what, report.outcome, f"{report.duration:.1f}")

    notes.table("Tests", "outcome", "s")
    chosen = ["-m", "gpu"]
    if setting.tiny:
        chosen = ["-k", "overflow and cpu"]
    words = [str(ROOT / "tests" / "gpu"), *chosen, "-q", "-p", "no:cacheprovider"]
    if find_spec("pytest_timeout"):
        words += ["--timeout", "100"]
    for kind in ("pytest.PytestConfigWarning", "pytest.PytestAssertRewriteWarning"):
        words += ["-W", f"ignore::{kind}"]  # no plugin for an option; imported before pytest
    words += ["-W", "ignore::DeprecationWarning"]  # of forks beside threads, in Python 3.12
    os.chdir(ROOT)
    code = pytest.main(words, plugins=[Rows()])
    if code not in (0, 5):
        raise RuntimeError(f"pytest ended with {int(code)}; see tests.log")


def step_p16(setting: Setting, notes: Notes) -> None:
    _step(setting, notes, FIRST)


def step_p8(setting: Setting, notes: Notes) -> None:
    _step(setting, notes, "xcit_small_12_p8")


def _step(setting: Setting, notes: Notes, arch: str) -> None:
    """Ours beside the official step: rate, memory, utilization; then loss and head."""
    from bench import step
    from bench.contestants import check_equality

    args = step_settings(setting, arch, repeats=10)
    official = "fp16" if setting.device == "cuda" else "fp32"
    title = f"{args.arch}, {protocol(args)}, official {official}, ours bf16"
    notes.table(title, "official", "ours", "ours / official")
    for part in step.PARTS:
        for row in step.part_rows(args, part, "bf16", official):
            notes.row(*row)
            if row[0] == "step, images/s":
                notes.number("images_per_second", float(row[2]))
    if arch == FIRST:
        notes.row("loss and gradients", "", "", check_equality(args))


def step_settings(setting: Setting, arch: str, repeats: int) -> argparse.Namespace:
    """Options of bench/step.py."""
    from bench import step

    words = ["--arch", arch, "--batch_size", str(BATCH), "--repeats", str(repeats)]
    if setting.tiny:
        words = "--arch xcit_nano_12_p16 --batch_size 2 --repeats 1 --prototypes 64".split()
        words += "--local_crops 2 --global_size 32 --local_size 16".split()
    return step.settings([*words, "--device", setting.device])


def protocol(args: argparse.Namespace) -> str:
    """The sizes of a step, in words."""
    crops = f"2 x {args.global_size} + {args.local_crops} x {args.local_size} crops"
    return f"{args.batch_size} images, {crops}, {args.prototypes:,} prototypes"


def profile(setting: Setting, notes: Notes) -> None:
    """Kernels by time, copies, and gaps between kernels, of three steps; the trace as a file."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from bench.contestants import our_work

    steps, cuda = 3, setting.device == "cuda"
    args = step_settings(setting, FIRST, repeats=1)
    work = our_work(args, "bf16", args.batch_size).step
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    for _ in range(1 if setting.tiny else 3):
        work()
    synchronize(setting)
    with profiler(activities=activities, acc_events=True) as trace:
        for _ in range(steps):
            work()
        synchronize(setting)
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    kernels = [event for event in trace.events() or () if event.device_type == kind]
    total: dict[str, list[float]] = {}
    for event in kernels:
        spent = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
        total.setdefault(event.name, []).append(spent / 1e3 / steps)
    span, busy = covered([(e.time_range.start, e.time_range.end) for e in kernels])
    notes.table("A step, by kernels", "number", "ms", "share")
    everything = sum(map(sum, total.values()))
    copies = [ms for name, each in total.items() if "memcpy" in name.lower() for ms in each]
    for what, number, ms, share in (
        ("from the first kernel to the last", len(kernels), span / 1e3 / steps, 1.0),
        ("gaps, in which none runs", 0, (span - busy) / 1e3 / steps, 1 - busy / span),
        ("copies between host and device", len(copies), sum(copies), sum(copies) / everything),
    ):
        notes.row(what, number // steps or "", f"{ms:.2f}", f"{share:.1%}")
    for name, each in sorted(total.items(), key=lambda pair: -sum(pair[1]))[:20]:
        share = f"{sum(each) / everything:.1%}"
        notes.row(f"`{name[:90]}`", len(each) // steps, f"{sum(each):.2f}", share)
    trace.export_chrome_trace(str(setting.out / "profile_trace.json.gz"))


def covered(intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(from the first start to the last end, how much of that some interval covers)."""
    busy, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return end - min(start for start, _ in intervals), busy


def synchronize(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.synchronize()


def launches(setting: Setting, notes: Notes) -> None:
    """Networks so small that the host's launches take longer than their kernels."""
    from bench.measure import alternately

    archs = ("xcit_nano_12_p16", "xcit_tiny_12_p16")[: 1 if setting.tiny else 2]
    title = protocol(step_settings(setting, archs[0], repeats=1))
    ways = ("eager", "compiled", "each block a CUDA graph", "one CUDA graph")
    notes.table(f"{title}, bf16, images/s", *ways, "center of the graphs of blocks against eager")
    for arch in archs:
        args = step_settings(setting, arch, repeats=10)

        def rate(step: Callable[[], object], args: argparse.Namespace = args) -> str:
            (times,) = alternately([step], args.repeats, setting.device)
            return f"{args.batch_size / statistics.median(times):,.1f}"

        eager = small_work(args, "off")
        row = [rate(eager.step)]
        try:
            graphs = small_work(args, "auto", mode="reduce-overhead")
            blocks = rate(partial(marked, graphs.step))  # as many steps as eager
            centers = [work.trainer.loss.center for work in (graphs, eager)]
            apart = f"{(centers[0] - centers[1]).norm() / centers[1].norm():.0e}"
        except Exception as error:  # the other ways are worth their rows
            blocks, apart = f"failed: {type(error).__name__}", ""
        compiled = small_work(args, "auto")
        row += [rate(compiled.step), blocks]
        notes.row(args.arch, *row, rate(captured(setting, compiled)), apart)


def small_work(args: argparse.Namespace, choice: str, mode: str | None = None) -> Any:
    """Our step with ``--compile CHOICE``; mode: of the compiler."""
    from bench.contestants import our_work

    torch._dynamo.reset()
    compiling = partialmethod(torch.nn.Module.compile, mode=mode)
    with mock.patch.object(torch.nn.Module, "compile", compiling):
        options = argparse.Namespace(**vars(args) | {"compile": choice})
        return our_work(options, "bf16", args.batch_size)


def marked(step: Callable[[], object]) -> None:
    """A step whose graphs may overwrite the results of the last one's."""
    torch.compiler.cudagraph_mark_step_begin()
    step()


def captured(setting: Setting, work: Any) -> Callable[[], object]:
    """A step as one CUDA graph, with the compiled kernels of ``work``, which has run before; on a
    CPU the step as it is. For measurements only: learning rate and crops are those of the capture.
    """
    from xcit_dino.ssl import pretrain

    for group in work.trainer.state.optimizer.param_groups:
        group["capturable"] = True
    with mock.patch.object(pretrain, "seed_drop_path", lambda *_: None):  # there is none
        if setting.device != "cuda":
            work.step()
            return work.step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work.step()
    return graph.replay


def largest(setting: Setting, notes: Notes) -> None:
    """The largest batches of both steps."""
    from bench import step
    from bench.contestants import our_work

    args = step_settings(setting, FIRST, repeats=1)
    notes.table(f"{args.arch}, {protocol(args)}", "official, fp16", "ours, bf16", "ours / official")
    if setting.device == "cuda":
        notes.row(*step.largest_row(args, "bf16", "fp16"))
    else:
        our_work(args, "bf16", args.batch_size).step()
        notes.row("largest batch", "no limit on a CPU", "", "")


def kernels(setting: Setting, notes: Notes) -> None:
    """The Triton kernels of the loss and of local patch interaction beside what the training uses:
    whether they are worth a place in it."""
    from xcit_dino.models.xcit import LocalPatchInteraction
    from xcit_dino.ssl.fused_loss import dino_cross_entropy

    device, cuda = torch.device(setting.device), setting.device == "cuda"
    batch, views, prototypes, width = (3, 5, 300, 16) if setting.tiny else (BATCH, 12, 65_536, 256)
    torch.manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(views * batch, width, device=device), dim=1)
    v, g = torch.randn(prototypes, width, device=device), torch.ones(prototypes, 1, device=device)
    targets = (4 * torch.randn(2, batch, prototypes, device=device)).softmax(-1)
    inputs = [x.requires_grad_() for x in (z, v, g)]
    layer = LocalPatchInteraction(32 if setting.tiny else 384).to(device).train()
    tokens = torch.randn(2 * batch, 14, 14, layer.bn.num_features, device=device)
    tokens = tokens.to(torch.bfloat16).requires_grad_()
    losses: dict[str, Callable[..., torch.Tensor]] = {"ssl/fused_loss.py": dino_cross_entropy}
    layers: dict[str, Callable[..., torch.Tensor]] = {"models/xcit.py": layer}
    if cuda:
        from bench.gpu import triton_loss, triton_lpi

        notes.table("Triton kernels beside the training's code", "largest relative difference")
        notes.row("loss, bf16", f"{triton_loss.difference('cuda', torch.bfloat16):.1e}")
        notes.row("local patch interaction, float32", f"{triton_lpi.difference('cuda'):.1e}")
        losses["bench/gpu/triton_loss.py"] = triton_loss.cross_entropy
        layers["bench/gpu/triton_lpi.py"] = partial(triton_lpi.interaction, layer)
    title = f"Forward and backward: loss of {views} x {batch} rows, {prototypes:,} prototypes"
    times = forward_backward_ms(setting, losses, lambda f: f(*inputs, targets, 0.1))
    notes.table(title, "ms")
    for name, ms in times.items():
        notes.row(name, f"{ms:.3f}")
    times = forward_backward_ms(setting, layers, lambda f: f(tokens).float().sum())
    notes.table(f"Local patch interaction of {list(tokens.shape)} tokens", "ms")
    for name, ms in times.items():
        notes.row(name, f"{ms:.3f}")


def forward_backward_ms(
    setting: Setting,
    functions: dict[str, Callable[..., torch.Tensor]],
    loss_of: Callable[[Callable[..., torch.Tensor]], torch.Tensor],
) -> dict[str, float]:
    """Milliseconds of a forward and backward pass under autocast, by turns, medians."""
    from bench.measure import alternately
    from xcit_dino.train.amp import autocast

    def work(function: Callable[..., torch.Tensor]) -> None:
        with autocast(torch.device(setting.device), torch.bfloat16):
            loss = loss_of(function)
        loss.backward()

    works = [partial(work, function) for function in functions.values()]
    seconds = alternately(works, 1 if setting.tiny else 20, setting.device)
    return {name: 1e3 * statistics.median(s) for name, s in zip(functions, seconds, strict=True)}
