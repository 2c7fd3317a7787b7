"""The real step against the plain one; interrupted runs against uninterrupted ones."""

import copy
import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from bench.reference import PlainHead, PlainLoss, PlainNet, parameter_groups, plain_step
from xcit_dino.data.loader import Batch
from xcit_dino.data.pack.demo import make
from xcit_dino.data.shards.config import DemoConfig
from xcit_dino.errors import InputError, Stopped
from xcit_dino.eval.target import run_options
from xcit_dino.options import replace
from xcit_dino.slurm.stages import launch_config
from xcit_dino.slurm.tools.dry_run import preview
from xcit_dino.ssl.config import PretrainConfig, pretrain_config
from xcit_dino.ssl.pretrain import pretrain, student_backward, teacher_targets, train_step
from xcit_dino.ssl.schedule import DinoHyperparameters
from xcit_dino.ssl.trainer import set_up
from xcit_dino.train import signals
from xcit_dino.train.distributed import dist
from xcit_dino.train.seeding import seed_drop_path
from xcit_dino.train.state import load_checkpoint, newest_checkpoint

TINY = {
    "arch": "xcit_pico_6_p8",
    "drop_path_rate": 0.1,
    "out_dim": 64,
    "head_hidden_dim": 32,
    "head_bottleneck_dim": 16,
    "global_crops_size": 32,
    "local_crops_size": 16,
    "local_crops_number": 2,
    "batch_size_per_gpu": 8,
    "epochs": 2,
    "warmup_epochs": 1,
    "lr": 0.01,
    "num_workers": 0,
    "log_every": 1,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make(DemoConfig(folder, train=40, val=16))
    return folder


def tiny(shards, folder, **options) -> PretrainConfig:
    values = TINY | {"data_path": shards, "output_dir": folder} | options
    return replace(PretrainConfig(), values)


# -- one step


class Views:
    """Stands in for the augmentation: gives views that are ready."""

    def __call__(self, batch):
        return batch.global_crops.flatten(0, 1), batch.local_crops.flatten(0, 1)


def trainer_for(config, dtype=torch.float32):
    world = dist.World(0, 1, torch.device("cpu"))
    trainer = set_up(config, world, torch.float32, data="", global_batch=4)
    trainer.augment = Views()
    for module in trainer.state.modules.values():
        module.to(dtype)
    return trainer


def batch_of(global_crops, local_crops):
    nothing = np.zeros(0, np.int64)
    return Batch(0, 0, 0, nothing, nothing, torch.zeros(0), global_crops, local_crops)


def plain_copy(net, config):
    """timm's XCiT and the plain head with a student's or teacher's values."""
    backbone = timm.create_model("xcit_nano_12_p8_224", num_classes=0)
    official = {"model": dict(net.backbone.state_dict())}
    backbone.load_state_dict(timm.models.xcit.checkpoint_filter_fn(official, backbone))
    head = config.head
    plain = PlainHead(
        backbone.num_features,
        head.out_dim,
        head.head_hidden_dim,
        head.head_bottleneck_dim,
        head.norm_last_layer,
    )
    plain.load_state_dict(net.head.state_dict())
    return PlainNet(backbone, plain).double().train()


@pytest.mark.parametrize(
    ("freeze", "norm_last", "local_side", "group_backward"),
    [
        (True, False, 16, False),
        (False, False, 16, False),
        (False, True, 16, True),
        (False, False, 32, False),  # one size: batch-norm sees all crops at once
        (False, False, 32, True),
    ],
)
def test_three_steps_equal_the_plain_step(freeze, norm_last, local_side, group_backward):
    """Clipping is off: it goes by parameter, and timm splits a qkv into three (test_optim.py)."""
    options = {"arch": "xcit_nano_12_p8", "drop_path_rate": 0.0, "norm_last_layer": norm_last}
    options |= {"clip_grad": 0.0, "group_backward": group_backward}
    config = replace(PretrainConfig(), TINY | options)
    ours = trainer_for(config, torch.float64)  # so that only real differences show
    student, teacher = (plain_copy(net, config) for net in (ours.student, ours.teacher))
    loss_fn = PlainLoss(config.head.out_dim, 4, 0.1, 0.9).double()
    optimizer = torch.optim.AdamW(parameter_groups(student))
    now = DinoHyperparameters(1e-3, 0.2, 0.9, 0.05, freeze)
    torch.manual_seed(1)
    for _ in range(3):
        global_crops = torch.randn(2, 4, 3, 32, 32).double()
        local_crops = torch.randn(2, 4, 3, local_side, local_side).double()
        metrics = train_step(ours, [batch_of(global_crops, local_crops)], now)
        want = plain_step(
            student, teacher, loss_fn, optimizer, [*global_crops, *local_crops],
            lr=1e-3, weight_decay=0.2, momentum=0.9, teacher_temp=0.05, clip=0.0,
            freeze_last_layer=freeze,
        )  # fmt: skip
        torch.testing.assert_close(metrics["loss"].item(), want, rtol=1e-8, atol=0)
    torch.testing.assert_close(ours.loss.center, loss_fn.center[0])
    for mine, plain in ((ours.student, student), (ours.teacher, teacher)):
        buffers = [b for b in mine.backbone.buffers() if b.is_floating_point()]
        others = [b for b in plain.backbone.buffers() if b.is_floating_point()]
        for a, b in zip(buffers, others, strict=True):
            torch.testing.assert_close(a, b)
        mine_head, plain_head = mine.head.state_dict(), plain.head.state_dict()
        for name in mine_head:
            torch.testing.assert_close(mine_head[name], plain_head[name])


def test_two_micro_batches_average_their_gradients():
    """Without batch-norm in the way (evaluation mode), 2 x 4 images make the step of 8."""
    config = replace(PretrainConfig(), TINY | {"drop_path_rate": 0.0})
    now = DinoHyperparameters(1e-3, 0.2, 0.9, 0.05, False)
    torch.manual_seed(1)
    global_crops, local_crops = torch.randn(2, 8, 3, 32, 32), torch.randn(2, 8, 3, 16, 16)
    whole, halves = trainer_for(config), trainer_for(config)
    for trainer in (whole, halves):
        trainer.student.eval(), trainer.teacher.eval()
    parts = [batch_of(global_crops[:, i : i + 4], local_crops[:, i : i + 4]) for i in (0, 4)]
    one = train_step(whole, [batch_of(global_crops, local_crops)], now)
    two = train_step(halves, parts, now)
    torch.testing.assert_close(one["loss"], two["loss"])
    torch.testing.assert_close(one["grad_norm"], two["grad_norm"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(whole.loss.center, halves.loss.center)


def micro_batch(seed, locals_=2, dtype=torch.float64):
    torch.manual_seed(seed)
    sizes = ((2, 32), (locals_, 16))
    return batch_of(*(torch.randn(n, 4, 3, side, side, dtype=dtype) for n, side in sizes))


def learned(trainer, batches, now):
    """Loss, gradients and batch-norm statistics of a step's passes."""
    seed_drop_path(0, 0, 0)
    losses = []
    for batch in batches:
        views = trainer.views(batch)
        targets, _ = teacher_targets(trainer, views[0], now)
        weight = 1 / len(batches)
        passed = student_backward(
            trainer, views, targets, freeze_backbone=now.freeze_backbone, loss_weight=weight,
            sync_gradients=False,
        )  # fmt: skip
        losses.append(passed.loss)
    gradients = {n: p.grad for n, p in trainer.student.named_parameters() if p.requires_grad}
    return torch.stack(losses), gradients, dict(trainer.student.named_buffers())


@pytest.mark.parametrize("groups", [False, True])
def test_a_frozen_backbone_gets_no_backward_pass_and_the_head_the_same_gradients(groups):
    """To the bit, with drop-path and batch-norm in training mode."""
    options = TINY | {"drop_path_rate": 0.3, "norm_last_layer": False, "group_backward": groups}
    now = DinoHyperparameters(1e-3, 0.2, 0.9, 0.05, False)
    batches = [micro_batch(seed) for seed in range(2)]
    trainers = [trainer_for(replace(PretrainConfig(), options), torch.float64) for _ in range(2)]
    loss, want, _ = learned(trainers[0], batches, now)
    got_loss, got, _ = learned(trainers[1], batches, dataclasses.replace(now, freeze_backbone=True))
    assert torch.equal(got_loss, loss)
    for name, gradient in got.items():
        if name.startswith("backbone."):
            assert gradient is None and want[name].abs().sum() > 0
        else:
            assert torch.equal(gradient, want[name]) and gradient.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("micros", "locals_", "again"), [(1, 2, False), (3, 5, True), (1, 0, False)]
)
def test_backward_of_each_crop_group_gives_the_same_gradients(micros, locals_, again):
    """With drop-path, batch-norm and, in the second case, activations computed again."""
    options = TINY | {"drop_path_rate": 0.3, "grad_checkpointing": again, "norm_last_layer": False}
    now = DinoHyperparameters(1e-3, 0.2, 0.9, 0.05, False)
    batches = [micro_batch(seed, locals_) for seed in range(micros)]
    one, parts = (
        trainer_for(replace(PretrainConfig(), options | {"group_backward": group}), torch.float64)
        for group in (False, True)
    )
    for got, want in zip(learned(parts, batches, now), learned(one, batches, now), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    for trainer in (one, parts):
        trainer.student.zero_grad()
        train_step(trainer, batches, now)
    for got, want in zip(parts.student.parameters(), one.student.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(parts.loss.center, one.loss.center)


class Kept:
    """Bytes that autograd keeps for backward passes, now and at most."""

    def __init__(self):
        self.now = self.most = 0

    def hooks(self):
        kept = self

        class Saved:
            def __init__(self, tensor):
                self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
                kept.now += self.bytes
                kept.most = max(kept.most, kept.now)

            def __del__(self):
                kept.now -= self.bytes

        return torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor)


def test_backward_of_each_crop_group_keeps_half_the_activations():
    """2 x 32 and 8 x 16 pixels squared: two groups of equal size."""
    now, kept = DinoHyperparameters(1e-3, 0.2, 0.9, 0.05, False), {}
    for group in (False, True):
        trainer = trainer_for(replace(PretrainConfig(), TINY | {"group_backward": group}))
        counter = kept[group] = Kept()
        with counter.hooks():
            train_step(trainer, [micro_batch(0, 8, torch.float32)], now)
        assert counter.now == 0
    assert kept[True].most < 0.6 * kept[False].most


def test_backward_of_each_crop_group_is_refused_where_the_head_has_batch_norm():
    with pytest.raises(InputError, match="--group_backward: the head's batch-norm"):
        replace(PretrainConfig(), {"group_backward": True, "use_bn_in_head": True})


def test_drop_path_depends_on_the_step_and_not_on_what_ran_before():
    config = replace(PretrainConfig(), TINY | {"drop_path_rate": 0.5})
    now = DinoHyperparameters(0.0, 0.0, 1.0, 0.05, False)
    torch.manual_seed(1)
    batch = batch_of(torch.randn(2, 4, 3, 32, 32), torch.randn(2, 4, 3, 16, 16))
    first, second = trainer_for(config), trainer_for(config)
    a = train_step(first, [batch], now)["loss"]
    torch.rand(100)
    b = train_step(second, [batch], now)["loss"]
    c = train_step(second, [batch], now)["loss"]
    assert a == b and a != c


# -- whole runs


def weights(folder):
    state = load_checkpoint(newest_checkpoint(folder))
    return state | state["student"] | {f"t.{k}": v for k, v in state["teacher"].items()}


def assert_same_run(a, b):
    first, second = weights(a), weights(b)
    assert first["step"] == second["step"]
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name]), name
    assert torch.equal(first["loss"]["center"], second["loss"]["center"])


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(tiny(shards, folder))
    return folder


@pytest.mark.parametrize("cut", [1, 3, 5, 7])
def test_a_run_cut_off_anywhere_ends_with_the_same_bits(cut, shards, uninterrupted, tmp_path):
    for _ in range(2):  # the second time there is nothing left to do
        pretrain(tiny(shards, tmp_path, max_steps=cut, num_workers=cut % 3))
        assert load_checkpoint(newest_checkpoint(tmp_path))["step"] == cut
    pretrain(tiny(shards, tmp_path))
    assert_same_run(tmp_path, uninterrupted)
    whole, resumed = logged(uninterrupted), logged(tmp_path)
    assert [x["step"] for x in resumed] == list(range(1, 11))
    assert [x["loss"] for x in resumed] == [x["loss"] for x in whole]


def test_a_finished_run_is_left_alone(shards, uninterrupted, tmp_path):
    before = copy.deepcopy(weights(uninterrupted))
    pretrain(tiny(shards, uninterrupted))
    assert before.keys() == weights(uninterrupted).keys() and len(logged(uninterrupted)) == 10


def test_a_run_with_relative_paths_goes_on_from_another_folder(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(shards.parent)
    here = os.path.relpath(tmp_path)
    pretrain(tiny(Path(shards.name), Path(here, "run"), max_steps=1))
    monkeypatch.chdir(tmp_path)
    assert run_options(Path("run"))["data_path"] == str(shards)
    pretrain(tiny(shards, Path("run"), max_steps=2))
    assert load_checkpoint(newest_checkpoint(tmp_path / "run"))["step"] == 2


def test_a_signal_saves_and_says_how_to_go_on(shards, uninterrupted, tmp_path):
    def ask(_backbone, epoch):
        if epoch == 1:
            signals.request("SIGTERM")
        return {}

    with pytest.raises(Stopped, match="SIGTERM after step 6; the same command"):
        pretrain(tiny(shards, tmp_path), evaluate=ask)
    pretrain(tiny(shards, tmp_path))
    assert_same_run(tmp_path, uninterrupted)


def test_the_callback_gets_the_teacher_at_epoch_ends(shards, tmp_path):
    seen = []

    def evaluate(backbone, epoch):
        seen.append(epoch)
        assert not any(p.requires_grad for p in backbone.parameters())
        return {"knn": 12.5}

    pretrain(tiny(shards, tmp_path), evaluate=evaluate)
    assert seen == [1, 2]
    assert [x["knn"] for x in logged(tmp_path) if "knn" in x] == [12.5, 12.5]


@pytest.mark.parametrize("arch", ["timm/test_vit", "timm/mobilenetv3_small_050"])
def test_steps_of_timms_networks_on_crops_of_two_sizes(arch):
    """Positions are resampled; the head is as wide as the features."""
    options = {"arch": arch, "drop_path_rate": 0.0, "global_crops_size": 64, "local_crops_size": 32}
    trainer = trainer_for(replace(PretrainConfig(), TINY | options))
    batch = batch_of(torch.randn(2, 4, 3, 64, 64), torch.randn(2, 4, 3, 32, 32))
    now = DinoHyperparameters(1e-3, 0.2, 0.9, 0.05, False)
    assert train_step(trainer, [batch], now)["loss"].isfinite()


def test_nothing_compiled_runs_in_any_evaluation(shards, uninterrupted, tmp_path):
    """The one before the first step of --init_from included."""
    stances = {}

    def evaluate(_backbone, epoch):
        stances[epoch] = torch._dynamo.eval_frame._stance.stance
        return {}

    pretrain(tiny(shards, tmp_path, init_from=uninterrupted, epochs=1), evaluate=evaluate)
    assert stances == {0: "force_eager", 1: "force_eager"}


@pytest.mark.parametrize("seed", [300_000_000, 2**31])
def test_large_seeds(seed, shards, tmp_path):
    pretrain(tiny(shards, tmp_path, seed=seed, max_steps=1))
    assert load_checkpoint(newest_checkpoint(tmp_path))["step"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data_path": None}, "--data_path is missing"),
        ({"batch_size_per_gpu": 100}, "batch"),
        ({"precision": "fp16"}, "--precision fp16 needs a GPU"),
    ],
)
def test_bad_input_writes_nothing(options, words, shards, tmp_path):
    with pytest.raises(InputError, match=words):
        pretrain(tiny(shards, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warmup_epochs": 10}, "--warmup_epochs 10 .*ends at 20% of the learning rate's way"),
        ({"warmup_epochs": 2}, "--warmup_epochs 2 .*rises to the end"),
        ({"freeze_last_layer": 2}, "--freeze_last_layer 2 .*prototypes are never trained"),
        (
            {"warmup_teacher_temp_epochs": 5, "teacher_temp": 0.07},
            "--warmup_teacher_temp_epochs 5 .*does not reach --teacher_temp 0.07",
        ),
        ({"warmup_teacher_temp": 0.02}, "--warmup_teacher_temp 0.02 has no effect"),
        ({"use_bn_in_head": True, "head_nlayers": 1}, "--use_bn_in_head has no effect"),
        ({"momentum_teacher": 1}, "--momentum_teacher 1: the teacher stays"),
        ({"knn_every": 3}, "--knn_every 3 .*no k-NN"),
    ],
)
def test_schedules_that_the_run_is_too_short_for_are_remarked(options, words):
    usual = {"epochs": 2, "warmup_epochs": 1, "knn_every": 1}
    assert not replace(PretrainConfig(), usual).remarks()
    (remark,) = replace(PretrainConfig(), usual | options).remarks()
    assert re.search(words, remark)


def test_remarks_are_said_where_training_begins_and_in_a_dry_run(shards, tmp_path, capsys):
    pretrain(tiny(shards, tmp_path / "run", warmup_epochs=10, knn_every=1, max_steps=1))
    assert "WARNING: --warmup_epochs 10 with --epochs 2" in capsys.readouterr().err
    words = f"--data_path {shards} --output_dir {tmp_path}/dry --epochs 2 --warmup_epochs 10"
    preview(launch_config(words.split()), "local")
    assert re.search(r"WARNING +--warmup_epochs 10 with --epochs 2", capsys.readouterr().out)


def test_a_part_of_an_epoch_is_no_warm_up_of_the_temperature():
    with pytest.raises(InputError, match=r"--warmup_teacher_temp_epochs 0\.5: .*whole number"):
        replace(PretrainConfig(), {"warmup_teacher_temp_epochs": 0.5})


def test_arch_picks_its_recipe_and_flags_win():
    config = pretrain_config(["--arch", "xcit_medium_24_p16_224", "--epochs", "7"])
    assert config.model.arch == "xcit_medium_24_p16" and config.model.drop_path_rate == 0.15
    assert config.run.epochs == 7 and config.run.batch_size_per_gpu == 32
