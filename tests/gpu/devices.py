"""What tests for a GPU share: each device, a trainer and batches that are the same on all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.train.test_nowait import TINY, pretraining_batch
from xcit_dino.data.batch import Batch
from xcit_dino.options import replace
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.schedule import DinoHyperparameters
from xcit_dino.ssl.trainer import DinoTrainer, set_up
from xcit_dino.train.distributed import dist

NOW = DinoHyperparameters(1e-3, 0.2, 0.9, 0.05, freeze_last_layer=False)
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])


def trainer_on(device: torch.device, dtype: torch.dtype = torch.float32, **options) -> DinoTrainer:
    """Without drop-path, whose numbers differ from device to device; fp16 does not overflow."""
    config = replace(PretrainConfig(), TINY | {"drop_path_rate": 0.0} | options)
    trainer = set_up(config, dist.World(0, 1, device), dtype, "", 4)
    scaler = trainer.state.scaler
    if scaler.is_enabled():
        scaler.load_state_dict(scaler.state_dict() | {"scale": 8.0})
    return trainer


def batch_on(device: torch.device, trainer: DinoTrainer, micro: int = 0) -> Batch:
    """The same pixels on every device."""
    torch.manual_seed(micro)
    return pretraining_batch(trainer, micro, torch.device("cpu")).to(device)


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """CUDA's own eye: an operation for which the host would wait is an error."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
