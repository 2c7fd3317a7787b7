"""Measurements for the benchmarks: time, memory and the peak arithmetic rate of the machine."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from xcit_dino.train.amp import DTYPES

PEAK_TFLOPS = {  # dense bf16 and fp16, makers' data sheets; the first whose words a name has
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "A100": 312,
}  # fmt: skip


def timed(work: Callable[[], object], device: str) -> float:
    """Wall-clock seconds; with one thread CPU time, which other programs disturb less."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    if device == "cuda":
        clock = time.perf_counter
        torch.cuda.synchronize()
    began = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def alternately(
    works: Sequence[Callable[[], object]], repeats: int, device: str
) -> list[list[float]]:
    """Seconds of each, run alternately, after a warm-up run of each to compile and fill caches."""
    for work in works:
        for _ in range(3 if device == "cuda" else 1):
            timed(work, device)
    turns = [[timed(work, device) for work in works] for _ in range(repeats)]
    return [list(times) for times in zip(*turns, strict=True)]


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """Peak memory of ``work`` beyond what was allocated before."""
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


def largest_batch(make: Callable[[int], Callable[[], object]]) -> int:
    """Images a step that fit this GPU, to a sixteenth; ``make(size)`` gives the step."""

    def fits(size: int) -> bool:
        try:
            step = make(size)
            step()
            step()  # this one has the optimizer's state beside it
            return True
        except torch.OutOfMemoryError:
            return False

    def alone(size: int) -> bool:
        gc.collect()  # what the try before held, some of it in cycles
        torch.cuda.empty_cache()
        torch.compiler.reset()  # graphs of other sizes count towards a limit
        return fits(size)

    size = 8
    while alone(2 * size):
        size *= 2
    for more in (size // 2, size // 4, size // 8, size // 16):
        size += more if more and alone(size + more) else 0
    return size


def peak_tflops(device: str, precision: str) -> tuple[float, str]:
    """What a step's arithmetic is held against, and where that comes from: a data sheet, else a
    large matrix product here."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    if precision != "fp32":
        for words, tflops in PEAK_TFLOPS.items():
            if all(word in name for word in words.split()):
                return tflops, f"data sheet of {words}"
    x = torch.randn(2048, 2048, device=device, dtype=DTYPES[precision])
    seconds = statistics.median(timed(lambda: x @ x, device) for _ in range(9))
    return 2 * 2048**3 / seconds / 1e12, "a 2048 x 2048 product"
