"""Triton kernels that wait for a GPU to be measured on: their values in Triton's interpreter, and
that they compile for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton", reason="Triton is not installed here")


def printed(module: str, tmp_path: Path, **environment: str) -> str:
    """What ``python -m bench.MODULE`` prints, with a cache of its own."""
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", f"bench.gpu.{module}"]
    return subprocess.run(
        command, cwd=ROOT, env=env, check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize("module", ["triton_loss", "triton_lpi"])
def test_values_and_gradients_are_those_of_the_training(module, tmp_path):
    assert 0 <= float(printed(module, tmp_path, TRITON_INTERPRET="1")) < 1e-5


@pytest.mark.parametrize(("module", "number"), [("triton_loss", 2), ("triton_lpi", 6)])
def test_they_compile_for_sm_90_without_a_gpu(module, number, tmp_path):
    lines = printed(module, tmp_path).splitlines()
    assert len(lines) == number and all(line.endswith("bytes of PTX") for line in lines)
    assert len(list(tmp_path.rglob("*.cubin"))) == number
