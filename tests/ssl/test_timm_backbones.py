"""timm's networks in pretraining: what a run needs of one, resuming, two processes against one."""

import os

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils import _pytree as pytree

from tests import victims
from xcit_dino.data.batch import Batch
from xcit_dino.data.pack.demo import make
from xcit_dino.data.shards.config import DemoConfig
from xcit_dino.errors import InputError
from xcit_dino.models import zoo
from xcit_dino.models.probe import check_bf16, unused_parameters
from xcit_dino.models.zoo import create_model
from xcit_dino.options import replace
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.pretrain import pretrain, train_step
from xcit_dino.ssl.schedule import DinoHyperparameters
from xcit_dino.ssl.start import initialize, with_input_settings
from xcit_dino.ssl.trainer import set_up
from xcit_dino.train.distributed import dist, fsdp
from xcit_dino.train.state import load_checkpoint, newest_checkpoint

SMALL = {
    "global_crops_size": 64, "local_crops_size": 32, "local_crops_number": 2, "out_dim": 33,
    "head_hidden_dim": 16, "head_bottleneck_dim": 8, "drop_path_rate": 0.0, "warmup_epochs": 0,
    "batch_size_per_gpu": 4, "num_workers": 0, "device": "cpu", "precision": "fp32",
}  # fmt: skip
NOW = DinoHyperparameters(1e-2, 0.2, 0.9, 0.05, freeze_last_layer=False)
KINDS = {  # BatchNormAct2d and squeeze-excitation; learned positions; shards
    "timm/test_efficientnet": {},
    "timm/test_vit": {},
    "xcit_pico_6_p8": {"fsdp": True},
}


class Unused(nn.Module):
    """Features that do not depend on all parameters, as some networks without classifier have."""

    def __init__(self, drop_path_rate=0.0):
        super().__init__()
        self.embed_dim = 4
        self.conv, self.norm = nn.Conv2d(3, 4, 8, 8), nn.LayerNorm(4)

    def forward(self, images):
        return self.conv(images).mean((2, 3))


def trainer_of(world, arch, start, **options):
    values = SMALL | {"arch": arch, "init_from": start} | options
    config = with_input_settings(replace(PretrainConfig(), values))
    trainer = set_up(config, world, torch.float32, "", 4)
    trainer.augment = lambda batch: (batch.global_crops.flatten(0, 1),
                                     batch.local_crops.flatten(0, 1))  # fmt: skip
    initialize(trainer)
    return trainer


def step(trainer, number):
    """A step of 4 images, two of them on each of two ranks."""
    torch.manual_seed(number)
    crops = [torch.randn(2, 4, 3, 64, 64), torch.randn(2, 4, 3, 32, 32)]
    world, nothing = trainer.world, np.zeros(0, np.int64)
    share = slice(world.rank * 4 // world.size, (world.rank + 1) * 4 // world.size)
    batch = Batch(number, 0, 0, nothing, nothing, torch.zeros(0), *(c[:, share] for c in crops))
    return train_step(trainer, [batch], NOW)


def two_steps(world, folder):
    """Backbones, heads and center after two steps from a file's weights, for every kind."""
    found = {}
    for arch, options in KINDS.items():
        trainer = trainer_of(world, arch, f"{folder}/{arch.replace('/', '_')}.pth", **options)
        losses = [step(trainer, number)["loss"] for number in range(2)]
        state = fsdp.full_tensors(trainer.state.state_dict(), everywhere=True)
        found[arch] = {name: state[name] for name in ("student", "teacher", "loss")}
        found[arch]["losses"] = dist.all_reduce_mean(torch.stack(losses))
    return found


def unused(world):
    """Three steps of a network with parameters that get no gradient: DDP waits for none."""
    created, zoo._create_timm = zoo._create_timm, lambda name, **arguments: Unused()
    trainer = set_up(replace(PretrainConfig(), SMALL | {"arch": "timm/x"}), world, torch.float32,
                     "", 4)  # fmt: skip
    zoo._create_timm = created
    trainer.augment = lambda batch: (batch.global_crops.flatten(0, 1),
                                     batch.local_crops.flatten(0, 1))  # fmt: skip
    return [step(trainer, number)["loss"].item() for number in range(3)]


def worker(rank, port, folder):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # so that only real differences show
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = dist.init("cpu")
    torch.save(two_steps(world, folder) | {"unused": unused(world)}, f"{folder}/{rank}.pt")
    dist.shutdown()


@pytest.mark.slow
def test_two_processes_from_a_backbone_equal_one(tmp_path):
    """Up to rounding in float64; timm resamples the positions of a ViT in float32."""
    torch.manual_seed(7)
    for arch in KINDS:
        torch.save(create_model(arch).state_dict(), tmp_path / f"{arch.replace('/', '_')}.pth")
    arguments = [(rank, 20_000 + os.getpid() % 20_000, str(tmp_path)) for rank in (0, 1)]
    ranks = [victims.SERVER.Process(target=worker, args=each) for each in arguments]
    for rank in ranks:
        rank.start()
    torch.set_default_dtype(torch.float64)
    try:
        want = two_steps(dist.World(0, 1, torch.device("cpu")), str(tmp_path))
    finally:
        torch.set_default_dtype(torch.float32)
    assert [victims.ended(rank) for rank in ranks] == [0, 0]
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert len(found["unused"]) == 3
        for arch in KINDS:
            pairs = zip(
                pytree.tree_leaves(found[arch]), pytree.tree_leaves(want[arch]), strict=True
            )
            for got, wanted in pairs:
                torch.testing.assert_close(
                    got, wanted, rtol=1e-6, atol=1e-6 if "vit" in arch else 1e-9
                )


def test_parameters_without_gradients_are_found_and_the_network_stays():
    model = Unused()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert unused_parameters(model, "timm/x", 32) == ["norm.weight", "norm.bias"]
    assert unused_parameters(create_model("timm/test_efficientnet"), "timm/x", 32) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_network_that_only_evaluates_is_refused():
    class Frozen(Unused):
        def forward(self, images):
            return super().forward(images).detach()

    with pytest.raises(InputError, match="--arch timm/x: it cannot be trained .*another --arch"):
        unused_parameters(Frozen(), "timm/x", 32)


def test_a_run_from_a_backbone_resumes_with_the_same_bits(tmp_path):
    make(DemoConfig(tmp_path / "shards", train=16, val=8))
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "start.pth")
    values = SMALL | {
        "arch": "timm/test_efficientnet", "data_path": tmp_path / "shards", "epochs": 1,
        "init_from": tmp_path / "start.pth",
    }  # fmt: skip
    whole, cut = (
        replace(PretrainConfig(), values | {"output_dir": tmp_path / name})
        for name in ("whole", "cut")
    )
    pretrain(whole)
    for steps in (1, 3):
        pretrain(replace(cut, {"max_steps": steps}))
    pretrain(cut)
    states = [load_checkpoint(newest_checkpoint(tmp_path / name)) for name in ("whole", "cut")]
    for key in ("student", "teacher", "loss", "optimizer", "step", "facts"):
        leaves = [pytree.tree_leaves(state[key]) for state in states]
        for one, other in zip(*leaves, strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"arch": "timm/vit_tiny_patch16_224", "local_crops_size": 40},
            "--local_crops_size 40: .*take --local_crops_size 32, or another --arch",
        ),
        (
            {"arch": "timm/convit_tiny"},
            "--global_crops_size 64: .*take --global_crops_size 224, or another --arch",
        ),
    ],
)
def test_a_network_that_takes_no_such_crops_is_refused_before_anything_is_written(
    changes, words, tmp_path
):
    make(DemoConfig(tmp_path / "shards", train=8, val=4))
    values = {"data_path": tmp_path / "shards", "output_dir": tmp_path / "run", "epochs": 1}
    with pytest.raises(InputError, match=words):
        pretrain(replace(PretrainConfig(), SMALL | values | changes))
    assert not (tmp_path / "run").exists()


def test_images_for_which_torch_has_wrong_bf16_gradients_are_refused():
    """A convolution with stride over one pixel: its gradient is not initialized."""
    model, cpu = create_model("timm/resnet10t", num_classes=0).train(), torch.device("cpu")
    sizes = {"global_crops_size": 32, "local_crops_size": 16}
    with pytest.raises(InputError, match=r"--local_crops_size 16: in bf16 .*--local_crops_size 32"):
        check_bf16(model, "timm/resnet10t", sizes, cpu, torch.bfloat16)
    check_bf16(model, "timm/resnet10t", sizes, cpu, torch.float32)
    check_bf16(model, "timm/resnet10t", {"local_crops_size": 32}, cpu, torch.bfloat16)
    xcit = create_model("xcit_pico_6_p8", num_classes=0)
    check_bf16(xcit, "xcit_pico_6_p8", {"local_crops_size": 8}, cpu, torch.bfloat16)
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())
