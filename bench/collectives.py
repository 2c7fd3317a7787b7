"""How many collectives does one step take? ``python bench/collectives.py``

Two gloo processes run the real ``pretrain``; torch's profiler counts every collective between the
start of one step and that of the next, those of DistributedDataParallel included. Then the same
with what the official code does: batch-norm with an all-gather forward and an all-reduce backward
(``torch.nn.SyncBatchNorm`` itself only runs on GPUs), and buffers broadcast at each forward pass.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from xcit_dino.data.pack.demo import make
from xcit_dino.data.shards.config import DemoConfig
from xcit_dino.options import replace
from xcit_dino.ssl import pretrain
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.train import trainer as parallel
from xcit_dino.train.distributed import dist as processes
from xcit_dino.train.distributed import sync_batchnorm

RANKS, PROFILED = 2, 3  # processes; the step that is counted (the first ones set things up)
TINY = {
    "batch_size_per_gpu": 4, "epochs": 1, "warmup_epochs": 0, "global_crops_size": 32,
    "local_crops_size": 16, "out_dim": 256, "num_workers": 0, "device": "cpu", "precision": "fp32",
    "log_every": 100, "max_steps": PROFILED + 2, "knn_every": 0,
}  # fmt: skip


class OfficialSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """The communication of torch's ``SyncBatchNorm``: one all-gather, one all-reduce back."""

    def _check_input_dim(self, input: Tensor) -> None: ...

    def forward(self, input: Tensor) -> Tensor:
        return _Talk.apply(super().forward(input), self.num_features)


class _Talk(torch.autograd.Function):
    """The identity, with a batch-norm's collectives."""

    @staticmethod
    def forward(ctx, x: Tensor, channels: int) -> Tensor:
        ctx.channels = channels
        mean_std_count = torch.zeros(2 * channels + 1)
        dist.all_gather([torch.empty_like(mean_std_count) for _ in range(RANKS)], mean_std_count)
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        dist.all_reduce(torch.zeros(2 * ctx.channels))
        return grad, None


def convert(model: nn.Module) -> nn.Module:
    """Make every batch-norm of a model communicate like the official one."""
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = OfficialSyncBatchNorm
    return model


class OfficialParallel(DistributedDataParallel):
    """With the defaults that the official code leaves as they are."""

    def __init__(self, module: nn.Module, **ours: bool):
        super().__init__(module)


def broadcast_buffers(module: nn.Module, _: Any) -> None:
    """DistributedDataParallel's broadcast before a forward pass; official teachers have it too."""
    group = dist.group.WORLD
    dist._broadcast_coalesced(group, list(module.buffers()), 250 << 20, 0)  # type: ignore[attr-defined]


def worker(rank: int, port: int, config: PretrainConfig, official: bool, place: Path) -> None:
    """One rank; rank 0 writes what it counted."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    step, recorder = (
        pretrain.train_step,
        profile(activities=[ProfilerActivity.CPU], acc_events=True),
    )
    facts: dict[str, Any] = {}

    def counted(trainer: Any, *rest: Any) -> dict[str, Tensor]:
        if trainer.state.step == 0 and official:
            trainer.teacher.backbone.register_forward_pre_hook(broadcast_buffers)
        if trainer.state.step == PROFILED:
            kinds = sync_batchnorm.SyncBatchNorm, OfficialSyncBatchNorm
            layers = [m for m in trainer.student.modules() if isinstance(m, kinds)]
            facts.update(layers=len(layers), channels=sum(m.num_features for m in layers))
            recorder.start()
        elif trainer.state.step == PROFILED + 1:
            recorder.stop()
        return step(trainer, *rest)

    pretrain.train_step = counted
    if official:
        sync_batchnorm.convert = convert
        parallel.DistributedDataParallel = OfficialParallel
    pretrain.pretrain(config)
    processes.shutdown()
    if rank == 0:
        counts = Counter[str]()
        for event in recorder.key_averages():
            if event.key.startswith("c10d::"):
                counts[event.key.removeprefix("c10d::").strip("_")] += event.count
        place.write_text(json.dumps(facts | {"counts": counts}))


def count(arch: str, crops: int, official: bool, folder: Path) -> dict[str, Any]:
    """Collectives of one step by kind, and the network's batch-norms."""
    place = folder / f"run-{official}"
    given = {"arch": arch, "local_crops_number": crops, "output_dir": place}
    config = replace(PretrainConfig(), TINY | given | {"data_path": folder / "shards"})
    store = dist.TCPStore("127.0.0.1", 0, RANKS, is_master=True, wait_for_workers=False)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    mp.spawn(worker, (store.port, config, official, place / "counts.json"), nprocs=RANKS)
    return json.loads((place / "counts.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="xcit_pico_6_p8")
    parser.add_argument("--local_crops_number", type=int, default=8)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(DemoConfig(dst=folder / "shards", train=64, val=10, size=32))
        found = {
            kind: count(asked.arch, asked.local_crops_number, kind == "official", folder)
            for kind in ("official", "ours")
        }
    facts = found["ours"]
    table = Table(
        title=f"{asked.arch}: {facts['layers']} batch-norms, {facts['channels']} channels"
    )
    kinds = sorted({kind for one in found.values() for kind in one["counts"]})
    for column in ("collectives a step", *kinds, "all"):
        table.add_column(column)
    for name, one in found.items():
        numbers = [one["counts"].get(kind, 0) for kind in kinds]
        table.add_row(name, *map(str, numbers), str(sum(numbers)))
    Console().print(table)


if __name__ == "__main__":
    main()
