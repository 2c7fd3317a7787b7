"""What only a GPU can show: ``pytest -m gpu``, skipped where there is none. What makes sense on a
CPU too runs there in every test run, so that no line of it is first tried on the GPU."""

from __future__ import annotations

from functools import partial, partialmethod

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.gpu.devices import NO_GPU, NOW, batch_on, no_waiting, trainer_on
from xcit_dino.data.batch import Batch, Copier
from xcit_dino.data.ring import Ring
from xcit_dino.errors import RunError
from xcit_dino.ssl.pretrain import replay_step, train_step
from xcit_dino.train import memory
from xcit_dino.train.async_copy import HostCopy
from xcit_dino.train.compiler import eager
from xcit_dino.train.nonfinite import Skips, first_tensor


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)],
)
def test_a_step_is_that_of_float32_on_the_cpu(dtype, tolerance, device):
    """Loss and gradient norm of two steps, the augmentation with them; nothing waits."""
    plain, ours = trainer_on(torch.device("cpu")), trainer_on(device, dtype)
    for number in range(2):
        want = train_step(plain, [batch_on(torch.device("cpu"), plain, number)], NOW)
        batch = batch_on(device, ours, number)
        if number:  # the first makes constants and the optimizer's state
            with no_waiting(device):
                got = train_step(ours, [batch], NOW)
        else:
            got = train_step(ours, [batch], NOW)
        for name in ("loss", "teacher_entropy", "center_norm"):
            torch.testing.assert_close(
                got[name].cpu().float(), want[name], rtol=tolerance, atol=tolerance
            )
        norms = got["grad_norm"].cpu().float(), want["grad_norm"]
        torch.testing.assert_close(*norms, rtol=10 * tolerance, atol=tolerance)
        assert not got["skipped"]


def test_the_augmentation_is_the_cpus(device):
    plain, ours = trainer_on(torch.device("cpu")), trainer_on(device)
    batch = batch_on(torch.device("cpu"), plain)
    ours.augment(batch.to(device))
    moved = batch.to(device)
    with no_waiting(device):
        views = ours.augment(moved)
    for got, want in zip(views, plain.augment(batch), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-4)


def test_an_overflow_of_fp16_is_skipped_without_an_alarm_and_changes_nothing(
    device, tmp_path, capfd
):
    trainer = trainer_on(device, torch.float16)
    batch = batch_on(device, trainer)
    train_step(trainer, [batch], NOW)
    before = {n: p.detach().clone() for n, p in trainer.student.named_parameters()}
    trainer.state.scaler.update(2.0**120)  # the scaled loss's gradients overflow
    scale = trainer.state.scaler.get_scale()
    with no_waiting(device):
        metrics = train_step(trainer, [batch], NOW)
    assert metrics["skipped"] == 1 and metrics["loss"].isfinite()
    assert trainer.state.scaler.get_scale() == scale / 2
    for name, parameter in trainer.student.named_parameters():
        assert torch.equal(parameter, before[name]), name
    trainer.state.scaler.update(2.0**120)
    modules, schedule = trainer.state.modules, lambda _: NOW
    trace = partial(first_tensor, modules, partial(replay_step, trainer, schedule))
    skips = Skips(9, True, modules, trace, lambda _: [], tmp_path, scaled=True)
    for number in (2, 3):  # on a GPU the host learns of a step with the next one
        skips.add(number, metrics["skipped"], [batch])
    assert "the gradient of" in (tmp_path / "nonfinite.jsonl").read_text()
    assert not capfd.readouterr().err


def test_a_copy_of_the_state_is_that_of_its_step(device):
    """The next step is queued before the copy is read."""
    trainer = trainer_on(device)
    batch = batch_on(device, trainer)
    copy = HostCopy()
    for _ in range(2):  # the second uses the first one's buffers
        train_step(trainer, [batch], NOW)
        want = {n: v.clone() for n, v in trainer.student.state_dict().items()}
        copy.take({"student": trainer.student.state_dict()})
        train_step(trainer, [batch], NOW)
        for name, value in copy.ready()["student"].items():
            assert value.device.type == "cpu" and torch.equal(value, want[name].cpu()), name


def test_training_goes_on_bit_for_bit(device):
    """From a state in host memory, in objects whose own weights are others."""
    whole, cut = trainer_on(device), trainer_on(device)
    for number in range(3):
        train_step(whole, [batch_on(device, whole, number)], NOW)
    for number in range(2):
        train_step(cut, [batch_on(device, cut, number)], NOW)
    saved = HostCopy().take(cut.state.state_dict()).ready()
    other = trainer_on(device)
    for parameter in other.state.modules["student"].parameters():
        parameter.data.add_(1)
    other.state.load_state_dict(saved)
    train_step(other, [batch_on(device, other, 2)], NOW)
    for name in ("student", "teacher", "loss"):
        want = whole.state.modules[name].state_dict()
        for key, value in other.state.modules[name].state_dict().items():
            assert torch.equal(value, want[key]), (name, key)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
def test_compiled_blocks_are_one_graph_for_each_size_and_stay_so(device, monkeypatch):
    """Two sizes of the student's crops and one of the teacher's; an evaluation between two steps
    adds none, and nothing is compiled again."""
    if device.type == "cpu":  # inductor takes half a minute there
        quick = partialmethod(nn.Module.compile, backend="aot_eager")
        monkeypatch.setattr(nn.Module, "compile", quick)
    torch._dynamo.reset()
    counters.clear()
    trainer, plain = trainer_on(device, compile="on"), trainer_on(device)
    losses, graphs = [], []
    for number in range(3):
        batch = batch_on(device, trainer, number)
        losses.append([train_step(each, [batch], NOW)["loss"] for each in (trainer, plain)])
        graphs.append(counters["stats"]["unique_graphs"])
        with eager(), torch.inference_mode():
            trainer.eval_backbone()(torch.zeros(3, 3, 48, 48, device=device))
    torch._dynamo.reset()
    assert graphs == [3, 3, 3]
    for compiled, want in losses:
        torch.testing.assert_close(compiled, want, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@NO_GPU
def test_no_slot_is_overwritten_before_it_is_copied():
    """Slots are filled again as soon as the loader may do so, while the GPU is busy."""
    device = torch.device("cuda", 0)
    ring, copier = Ring(2, [(2, 8, 96, 96, 3), (1, 8, 32, 32, 3)]), Copier(device)
    ring.pin()
    nothing, found = np.zeros(8, np.int64), []
    try:
        for step in range(60):
            large, small = ring.views(step % 2)
            large.fill_(step), small.fill_(step)
            labels = torch.full((8,), step)
            batch = Batch(step, 0, 0, nothing, nothing, labels, large, small)
            (moved,) = copier.copied([batch])
            torch.cuda._sleep(2_000_000)
            parts = (moved.global_crops, moved.local_crops, moved.labels)
            found += [(part == step).all() for part in parts]
        assert torch.stack(found).all()
    finally:
        ring.unpin()


@pytest.mark.gpu
@NO_GPU
def test_out_of_memory_is_explained():
    trainer = trainer_on(torch.device("cuda", 0))
    with pytest.raises(RunError, match="out of memory in step 1.*batch_size_per_gpu"):
        with memory.explained(trainer.state, trainer.config.run, "--local_crops_number"):
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
