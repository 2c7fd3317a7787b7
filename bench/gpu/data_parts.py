"""Parts of run.py about data, features and accuracy. Each imports what it needs itself:
without a package only that part is skipped."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from bench.gpu.notes import ROOT, Notes, Setting
from bench.gpu.step_parts import FIRST, step_settings, synchronize


def data(setting: Setting, notes: Notes) -> None:
    """Crops on the device by numbers of workers and by nvJPEG, against the step of the same run;
    then a real training: how long it waits."""
    from bench.contestants import NOW
    from xcit_dino.data.config import LoaderConfig
    from xcit_dino.data.loader import CropLoader
    from xcit_dino.data.plan import Plan
    from xcit_dino.data.shards.index import ShardIndex
    from xcit_dino.options import replace
    from xcit_dino.ssl.config import PretrainConfig
    from xcit_dino.ssl.pretrain import train_step
    from xcit_dino.ssl.trainer import set_up
    from xcit_dino.train.distributed import dist

    index = ShardIndex.load(Path(images(setting)) / "train")
    args, device = step_settings(setting, FIRST, 1), torch.device(setting.device)
    sizes = {"global_crops_size": args.global_size, "local_crops_size": args.local_size}
    values = {"arch": args.arch, "out_dim": args.prototypes, "local_crops_number": args.local_crops}
    config = replace(PretrainConfig(), values | sizes)
    most, needed = len(os.sched_getaffinity(0)), step_rate(setting)

    def loader(workers: int, decoder: str, **more: Any) -> CropLoader:
        options = LoaderConfig(num_workers=workers, decoder=decoder)  # type: ignore[arg-type]
        plan = Plan.of(index, options, seed=0, batch_size=args.batch_size)
        return CropLoader(index, plan, config.crops, options, device=device, **more)

    kilobytes = index.sizes.mean() / 1e3
    notes.table(
        f"Crops on the device, images of {kilobytes:.0f} kB", "images/s", "of the step's rate"
    )
    seconds = 0.2 if setting.tiny else 6.0
    choices = [(n, "host") for n in (8, 16) if n <= most] or [(1, "host")]
    if setting.device == "cuda":
        choices.append((min(8, most), "cuda"))
    rates = {}
    for workers, decoder in choices:
        with closing(iter(loader(workers, decoder))) as steps:
            rate = rates[workers, decoder] = rate_of(steps, setting, args.batch_size, seconds)
        what = "workers, nvJPEG" if decoder == "cuda" else "workers"
        notes.row(f"{workers} {what}", f"{rate:,.0f}", f"{rate / needed:.2f} x" if needed else "")

    workers, decoder = max(rates, key=lambda choice: rates[choice])
    trainer = set_up(config, dist.World(0, 1, device), torch.bfloat16, "", args.batch_size)
    source = loader(workers, decoder, recipes=trainer.augment.recipes)
    with closing(iter(source)) as steps:
        for _ in range(1 if setting.tiny else 5):
            train_step(trainer, next(steps), NOW)
        synchronize(setting)
        waited, trained = source.wait_seconds, (train_step(trainer, b, NOW) for b in steps)
        began = time.perf_counter()
        rate = rate_of(trained, setting, args.batch_size, seconds, warm=0)
        waits = (source.wait_seconds - waited) / (time.perf_counter() - began)
    how = f"{workers} workers, {'nvJPEG' if decoder == 'cuda' else 'decoding on the host'}"
    notes.row(f"training on them ({how})", f"{rate:,.0f}", f"waits {waits:.1%} of the time")


def rate_of(
    steps: Iterator[object], setting: Setting, batch_size: int, seconds: float, warm: int = 3
) -> float:
    """Images per second of an iterator of batches."""
    for _ in range(warm):
        next(steps)
    synchronize(setting)
    began = time.perf_counter()
    number = 0
    while not number or time.perf_counter() - began < seconds:
        next(steps)
        number += 1
    synchronize(setting)
    return number * batch_size / (time.perf_counter() - began)


def step_rate(setting: Setting) -> float:
    """Images per second of the step alone, where that part has run."""
    file = setting.out / "step_p16.json"
    found = json.loads(file.read_text())["numbers"] if file.exists() else {}
    return found.get("images_per_second", 0.0)


def images(setting: Setting) -> str:
    """Shards of labeled images: those given, else built-in ones of the size of photographs."""
    if setting.data:
        return setting.data
    from xcit_dino.data.pack.demo import make
    from xcit_dino.data.shards.config import DemoConfig
    from xcit_dino.data.shards.index import INDEX

    folder = setting.out / "images"
    if not (folder / "val" / INDEX).exists():
        count, size = ((24, 12), 48) if setting.tiny else ((256, 64), 320)
        make(DemoConfig(folder, *count, size=size))
    return str(folder)


def knn(setting: Setting, notes: Notes) -> None:
    """The official loop for each k against one exact search for all."""
    from bench import knn as bench

    words = ["--device", setting.device]
    if setting.tiny:
        words += "--bank 400 --queries 100 --dim 16 --classes 10 --repeats 1".split()
    else:
        words += "--bank 1281167 --queries 10000 --dim 384 --classes 1000 --repeats 1".split()
    args = bench.settings(words)
    result = bench.compared(args)
    title = f"Bank {args.bank:,} x {args.dim}, {args.queries:,} queries, k = 10, 20, 100, 200"
    notes.table(title, "s", "top-1 / top-5 in percent")
    for name in result.accuracies:
        notes.row(name, f"{result.medians(name)[0]:.2f}", result.line(name))


def features(setting: Setting, notes: Notes) -> None:
    """Extraction from shards to disk, against the network alone."""
    from bench.measure import alternately
    from xcit_dino.data.shards.index import ShardIndex
    from xcit_dino.eval.config import EvalTargetConfig
    from xcit_dino.eval.context import make_context
    from xcit_dino.eval.features import cached_features, feature_blocks
    from xcit_dino.eval.target import Network
    from xcit_dino.models.zoo import create_model
    from xcit_dino.train.amp import autocast
    from xcit_dino.train.distributed import dist

    device, folder = torch.device(setting.device), images(setting)
    args = step_settings(setting, FIRST, repeats=5)
    batch = 2 if setting.tiny else 128
    model = create_model(args.arch).eval().to(device)
    size = args.global_size
    blank = torch.randn(batch, 3, size, size, device=device)

    def alone() -> None:
        with torch.inference_mode(), autocast(device, torch.bfloat16):
            feature_blocks(model, blank)

    (times,) = alternately([alone], args.repeats, setting.device)
    workers = len(os.sched_getaffinity(0))
    options = EvalTargetConfig(
        output_dir=setting.out / "features", num_workers=0 if setting.tiny else workers,
        precision="bf16", crop_size=size, batch_size_per_gpu=batch,
    )  # fmt: skip
    index = ShardIndex.load(Path(folder) / "train")
    context = make_context(options, None, {}, folder, dist.World(0, 1, device))
    began = time.perf_counter()
    cached_features(Network("random", model, {"time": time.time()}), index, "train", context)
    seconds = time.perf_counter() - began
    notes.table(f"{args.arch}, {size} pixels, bf16", "images/s")
    notes.row("the network alone", f"{batch / statistics.median(times):,.0f}")
    notes.row(f"from shards to disk, {workers} workers", f"{index.num_samples / seconds:,.0f}")


def curve(setting: Setting, notes: Notes) -> None:
    """Pretraining until the time is over; k-NN after every epoch."""
    from datetime import datetime

    from xcit_dino.train.run.metrics import read_lines

    run = setting.out / "curve"
    words = [sys.executable, "-m", "xcit_dino.cli", "pretrain", "--output_dir", str(run)]
    words += ["--data_path", setting.data or small_images(setting), "--knn_every", "1"]
    words += [
        "--device",
        setting.device,
        "--config",
        str(ROOT / "configs/pretrain/xcit_pico_6_p4.yaml"),
    ]
    if setting.tiny:
        words += "--epochs 1 --warmup_epochs 0 --batch_size_per_gpu 8 --num_workers 0".split()
        words += "--precision fp32 --log_every 1 --out_dim 32".split()
    else:
        words += "--epochs 40 --batch_size_per_gpu 256 --precision bf16 --compile off".split()
        words += ["--num_workers", str(min(10, len(os.sched_getaffinity(0))))]
    process = subprocess.Popen(words, cwd=ROOT)
    try:
        process.wait(max(1.0, setting.seconds - 15))
    except subprocess.TimeoutExpired:
        process.terminate()  # it saves, and says where it stopped
        process.wait(10)
    tries, lines = read_lines(run / "tries.jsonl"), read_lines(run / "metrics.jsonl")
    began = datetime.fromisoformat(tries[0]["time"])
    what = setting.data or "built-in images of 32 pixels"
    notes.table(f"xcit_pico_6_p4 on {what}", "step", "k-NN top-1", "images/s")
    rate = 0.0
    for line in lines:
        rate = line.get("images_per_s", rate)
        if "knn_top1" in line:
            passed = datetime.fromisoformat(line["time"]) - began
            when, top1 = f"after {passed.total_seconds():.0f} s", f"{line['knn_top1']:.1f}"
            notes.row(when, line["step"], top1, f"{rate:,.0f}")
    if not any("knn_top1" in line for line in lines):
        raise RuntimeError("no epoch was finished; see curve.log")


def small_images(setting: Setting) -> str:
    """The built-in images of 32 pixels."""
    from xcit_dino.data.pack.demo import make
    from xcit_dino.data.shards.config import DemoConfig

    folder = setting.out / "small_images"
    make(DemoConfig(folder, *((48, 24) if setting.tiny else (20_000, 2_000))))
    return str(folder)
