"""The three kinds of training at their smallest, by name, for tests that apply to all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests import victims
from xcit_dino.models.zoo import create_model
from xcit_dino.options import replace
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.pretrain import pretrain
from xcit_dino.supervised.config import DistillConfig, FinetuneConfig
from xcit_dino.supervised.distill import distill
from xcit_dino.supervised.finetune import finetune

CONFIGS = {"pretrain": PretrainConfig(), "finetune": FinetuneConfig(), "distill": DistillConfig()}
RUN = {"pretrain": pretrain, "finetune": finetune, "distill": distill}
SUPERVISED = {
    "arch": "xcit_pico_6_p8", "drop_path_rate": 0.1, "input_size": 16, "batch_size_per_gpu": 4,
    "epochs": 2, "warmup_epochs": 1, "lr": 0.01, "repeated_aug": 1, "model_ema_decay": 0.5,
    "eval_every": 1, "num_workers": 0, "log_every": 1, "device": "cpu", "precision": "fp32",
}  # fmt: skip
STEPS_PER_EPOCH = 5  # 20 images, 4 at a time


def config(name: str, shards: Path, folder: Path, **options: Any) -> Any:
    """Two epochs of five steps."""
    values: dict[str, Any] = dict(
        SUPERVISED if name != "pretrain" else victims.TINY | {"epochs": 2}
    )
    if name == "distill":
        values |= {"teacher_model": "xcit_pico_6_p16", "teacher_path": teacher(shards.parent)}
    return replace(CONFIGS[name], values | {"data_path": shards, "output_dir": folder} | options)


def teacher(folder: Path) -> Path:
    """Weights of a classifier of the demo's classes."""
    path = folder / "teacher.pth"
    if not path.is_file():
        torch.manual_seed(3)
        torch.save({"model": create_model("xcit_pico_6_p16", num_classes=12).state_dict()}, path)
    return path


def train(name: str, shards: Path, folder: Path, **options: Any) -> None:
    """Train, or go on training."""
    RUN[name](config(name, shards, folder, **options))


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}
