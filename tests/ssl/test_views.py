"""Every number of global and local crops in the real step, against a plain double loop over the
pairs of views: with accumulation, on one process and on two."""

import copy
import os

import numpy as np
import pytest
import torch

from bench.reference import plain_koleo, plain_sinkhorn
from tests import victims
from xcit_dino.data.batch import Batch
from xcit_dino.errors import InputError
from xcit_dino.models import zoo
from xcit_dino.options import replace
from xcit_dino.ssl.config import PretrainConfig
from xcit_dino.ssl.pretrain import train_step
from xcit_dino.ssl.schedule import DinoHyperparameters
from xcit_dino.ssl.trainer import set_up
from xcit_dino.train import optim
from xcit_dino.train.distributed import dist

ARCH = "xcit_test_1_p8"  # one block: two ranks talk to each other in every batch-norm
SPEC = zoo.ModelSpec(8, 16, 1, 2, 1.0, True)
OPTIONS = victims.TINY | {
    "arch": ARCH, "drop_path_rate": 0.0, "norm_last_layer": False, "clip_grad": 0.0,
    "student_temp": 0.2,
}  # fmt: skip
NOW = DinoHyperparameters(1e-2, 0.2, 0.9, 0.05, freeze_last_layer=False)
NUMBERS = [(G, L) for G in range(1, 5) for L in range(11) if G + L > 1]
MICROS, IMAGES = 2, 2
SINKHORN = {"centering": "sinkhorn_knopp"}


class Views:
    """Stands in for the augmentation: gives views that are ready."""

    def __call__(self, batch):
        return batch.global_crops.flatten(0, 1), batch.local_crops.flatten(0, 1)


def fresh(world):
    """``fresh(world)(G, L)``: a trainer at step 0, built once and taken back each time."""
    trainer = set_up(replace(PretrainConfig(), OPTIONS), world, torch.float32, "", 8)
    trainer.augment = Views()
    trainer.loss.center.normal_(generator=torch.Generator().manual_seed(5))
    start = copy.deepcopy(trainer.state.state_dict())

    def at_start(G, L, **options):
        values = OPTIONS | {"global_crops_number": G, "local_crops_number": L} | options
        trainer.config = replace(PretrainConfig(), values)
        trainer.loss.sinkhorn = trainer.config.dino.centering == "sinkhorn_knopp"
        trainer.state.load_state_dict(copy.deepcopy(start))
        return trainer

    return at_start


def crops(G, L, micro):
    """The views of all ranks' images."""
    generator = torch.Generator().manual_seed(1000 * G + 10 * L + micro)
    shapes = (G, IMAGES, 3, 16, 16), (L, IMAGES, 3, 8, 8)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def stepped(trainer, G, L, images=slice(None)):
    """The loss of a step over some of the images, and student, teacher and center after it."""
    nothing, batches = np.zeros(0, np.int64), []
    for micro in range(MICROS):
        views = [group[:, images] for group in crops(G, L, micro)]
        batches.append(Batch(0, micro, 0, nothing, nothing, torch.zeros(0), *views))
    loss = train_step(trainer, batches, NOW)["loss"]
    return loss, *(copy.deepcopy(m.state_dict()) for m in trainer.state.modules.values())


def plain_step(trainer, G, L):
    """The same, written out: one term a pair of views, one micro-batch of all ranks' images at a
    time."""
    student, teacher, center = trainer.student, trainer.teacher, trainer.loss.center
    losses, outputs = [], []
    for micro in range(MICROS):
        large, small = crops(G, L, micro)
        with torch.no_grad():
            output = teacher.head(teacher.backbone(large.flatten(0, 1)))
        groups = [group.flatten(0, 1) for group in (large, small) if len(group)]
        features = [student.backbone(group) for group in groups]
        scores = student.head(torch.cat(features))
        sinkhorn = trainer.config.dino.centering == "sinkhorn_knopp"
        centered = ((output - center) / NOW.teacher_temp).softmax(-1)
        q = plain_sinkhorn(output, NOW.teacher_temp) if sinkhorn else centered
        q = q.unflatten(0, (G, IMAGES))
        p = (scores / 0.2).log_softmax(-1).unflatten(0, (G + L, IMAGES))
        pairs = [(g, v) for g in range(G) for v in range(G + L) if v != g]
        losses.append(sum(-(q[g] * p[v]).sum(-1).mean() for g, v in pairs) / len(pairs))
        if weight := trainer.config.dino.koleo_weight:
            losses[-1] = losses[-1] + weight * plain_koleo(list(features[0].chunk(G)))
        outputs.append(output)
    loss = sum(losses) / MICROS
    loss.backward()
    optim.set_hyperparameters(trainer.state.optimizer, NOW.lr, NOW.weight_decay)
    trainer.state.optimizer.step()
    trainer.state.optimizer.zero_grad()
    if not sinkhorn:
        center.mul_(0.9).add_(0.1 * torch.cat(outputs).mean(0))
    with torch.no_grad():
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
            t.mul_(NOW.momentum_teacher).add_((1 - NOW.momentum_teacher) * s)
    return loss.detach(), *(m.state_dict() for m in trainer.state.modules.values())


def worker(rank, port, folder):
    zoo._SPECS[ARCH] = SPEC
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # so that only real differences show
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = dist.init("cpu")
    images = slice(rank * IMAGES // 2, (rank + 1) * IMAGES // 2)
    found, trainer = {}, fresh(world)
    for G, L in NUMBERS:
        found[G, L] = stepped(trainer(G, L, group_backward=L % 2 == 1), G, L, images)
    found["sinkhorn"] = stepped(trainer(2, 3, **SINKHORN), 2, 3, images)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.shutdown()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two ranks found, with half of the images each."""
    folder = tmp_path_factory.mktemp("views")
    arguments = [(rank, 20_000 + (os.getpid() + 7) % 20_000, str(folder)) for rank in (0, 1)]
    ranks = [victims.SERVER.Process(target=worker, args=each) for each in arguments]
    for rank in ranks:
        rank.start()
    assert [victims.ended(rank) for rank in ranks] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture
def in_double(monkeypatch):
    monkeypatch.setitem(zoo._SPECS, ARCH, SPEC)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("G", range(1, 5))
def test_the_step_is_the_double_loop_for_any_number_of_views(G, two_ranks, in_double):
    """Loss, weights, batch-norm statistics, teacher and center."""
    trainer = fresh(dist.World(0, 1, torch.device("cpu")))
    for L in (L for g, L in NUMBERS if g == G):
        want_loss, *want = copy.deepcopy(plain_step(trainer(G, L), G, L))
        kinds = [stepped(trainer(G, L, group_backward=b), G, L) for b in (False, True)]
        halves = [rank[G, L] for rank in two_ranks]
        kinds.append(((halves[0][0] + halves[1][0]) / 2, *halves[0][1:]))
        for loss, *modules in kinds:
            torch.testing.assert_close(loss, want_loss, rtol=1e-10, atol=0)
            torch.testing.assert_close(modules, want, rtol=1e-6, atol=1e-6)


def test_the_step_with_sinkhorn_knopp_on_one_process_and_on_two(two_ranks, in_double):
    trainer = fresh(dist.World(0, 1, torch.device("cpu")))
    want_loss, *want = copy.deepcopy(plain_step(trainer(2, 3, **SINKHORN), 2, 3))
    halves = [rank["sinkhorn"] for rank in two_ranks]
    both = ((halves[0][0] + halves[1][0]) / 2, *halves[0][1:])
    for loss, *modules in (stepped(trainer(2, 3, **SINKHORN), 2, 3), both):
        torch.testing.assert_close(loss, want_loss, rtol=1e-10, atol=0)
        torch.testing.assert_close(modules, want, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(want_loss, plain_step(trainer(2, 3), 2, 3)[0])


@pytest.mark.parametrize("L", [0, 3])
@pytest.mark.parametrize("group_backward", [False, True])
def test_the_step_with_koleo(L, group_backward, in_double):
    trainer = fresh(dist.World(0, 1, torch.device("cpu")))
    options = {"koleo_weight": 0.3, "group_backward": group_backward}
    want_loss, *want = copy.deepcopy(plain_step(trainer(2, L, **options), 2, L))
    loss, *modules = stepped(trainer(2, L, **options), 2, L)
    torch.testing.assert_close(loss, want_loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(modules, want, rtol=1e-6, atol=1e-6)


def test_koleo_with_one_image_is_refused():
    options = {"koleo_weight": 0.1, "batch_size_per_gpu": 1}
    with pytest.raises(InputError, match="--koleo_weight: .* --batch_size_per_gpu 2 or more"):
        replace(PretrainConfig(), options)


def test_one_view_of_an_image_is_refused():
    """There would be no pair, and a loss of nothing over nothing."""
    with pytest.raises(InputError, match="--local_crops_number 0: .*nothing to compare") as error:
        replace(PretrainConfig(), {"global_crops_number": 1, "local_crops_number": 0})
    assert "--global_crops_number 2" in str(error.value)
