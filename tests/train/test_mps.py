"""--device mps, as far as that can be said without a Mac: every operation of the training steps
and of the evaluations has a kernel, and what depends on the device is chosen right. Nothing here
runs on a Mac's GPU."""

from __future__ import annotations

import pytest
import torch

from tests.mps_kernels import HasKernels, NoKernel
from tests.train.test_nowait import PRETRAINING, STEPS
from xcit_dino.data.batch import Batch
from xcit_dino.data.config import CropsConfig, LoaderConfig
from xcit_dino.data.loader import CropLoader
from xcit_dino.data.plan import Plan
from xcit_dino.data.shards.index import ShardIndex
from xcit_dino.errors import InputError
from xcit_dino.eval import linear_grid
from xcit_dino.eval.features import feature_blocks
from xcit_dino.models.zoo import create_model
from xcit_dino.ssl import distillation
from xcit_dino.train import optim
from xcit_dino.train.amp import resolve_precision, widest
from xcit_dino.train.distributed import dist

MAC = torch.device("mps")
CASES = [  # fp16 is refused; attention of timm's networks has a kernel of its own on every device
    name
    for name, (_, case) in STEPS.items()
    if "timm" not in name and PRETRAINING.get(case, (None,))[0] != torch.float16
]


@pytest.fixture
def without_float64(monkeypatch):
    """Sums as on a Mac."""
    for module in (distillation, linear_grid):
        monkeypatch.setattr(module, "widest", lambda device: torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_every_operation_of_a_step_has_a_kernel(case, without_float64):
    step, name = STEPS[case]
    metrics = step(name, torch.device("cpu"), HasKernels())
    assert metrics["loss"].isfinite()


def test_every_operation_of_the_evaluations_has_a_kernel(without_float64):
    torch.manual_seed(0)
    model = create_model("xcit_pico_6_p8").eval()
    choices = linear_grid.grid(("cls2+patch", "deep"), (0.1, 1.0), (0.0, 0.1))
    kinds = (torch.arange(6) % 3, torch.eye(6)[:, :3].to(torch.uint8), torch.randn(6, 3))
    images = torch.randn(6, 3, 32, 32)
    with HasKernels():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            blocks = feature_blocks(model, images, deep=True)
        dims = {name: block.shape[1] for name, block in blocks.items()}
        blocks = {name: block.float() for name, block in blocks.items()}
    for labels in kinds:
        heads = linear_grid.Heads(choices, dims, 3, 6, 0, torch.device("cpu"))
        before = heads.score([(blocks, labels)])
        with HasKernels():
            for _ in range(5):
                heads.step(blocks, labels, 1.0)
            after = heads.score([(blocks, labels)])
        assert after[0][1] < before[0][1]


def test_the_eye_sees_float64_and_missing_kernels():
    with HasKernels(), pytest.raises(NoKernel, match="float64"):
        torch.ones(2).double()
    with HasKernels(), pytest.raises(NoKernel, match="linalg_eig"):
        torch.linalg.eig(torch.eye(2))


def test_the_device_is_refused_where_there_is_none_or_for_several_processes(monkeypatch):
    with pytest.raises(InputError, match="--device mps: this torch sees no GPU of a Mac"):
        dist.init("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert dist.init("mps") == dist.World(0, 1, MAC)
    assert dist.init("auto").device.type != "mps", "never tried: only who names it gets it"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="takes one process, not 2"):
        dist.init("mps")


def test_precision():
    assert resolve_precision("auto", MAC) == torch.float32 == widest(MAC)
    assert resolve_precision("bf16", MAC) == torch.bfloat16
    with pytest.raises(InputError, match="on a Mac use bf16 or fp32"):
        resolve_precision("fp16", MAC)


def test_the_loader_gives_batches_on_the_device(shards, monkeypatch):
    moved = []
    monkeypatch.setattr(Batch, "to", lambda self, device: moved.append(device) or self)
    index, options = ShardIndex.load(shards / "train"), LoaderConfig(num_workers=0)
    plan = Plan.of(index, options, seed=0, batch_size=4)
    for step in CropLoader(index, plan, CropsConfig(), options, device=MAC):
        assert len(step) == 1
        break
    assert moved == [MAC]


@pytest.mark.parametrize(("norm", "steps"), [(1.0, 1), (torch.nan, 0)])
def test_a_step_with_a_nonfinite_gradient_is_skipped_by_the_host(norm, steps, monkeypatch):
    taken = []
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], fused=True)
    monkeypatch.setattr(optimizer, "step", lambda: taken.append(1))
    monkeypatch.setattr(torch.Tensor, "device", property(lambda self: MAC), raising=False)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optim.step_unless_nonfinite(optimizer, scaler, torch.tensor([norm]))
    assert len(taken) == steps
