"""The devices on which a test of this folder runs."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.devices import CUDA


@pytest.fixture(params=["cpu", CUDA])
def device(request, monkeypatch) -> torch.device:
    """Each device, in plain float32: no TF32 in convolutions, which torch allows by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")
