"""The DINO loss against the official double loop over views, values and gradients."""

import pytest
import torch

from bench.reference import PlainLoss
from xcit_dino.ssl.loss import DinoLoss
from xcit_dino.ssl.sentinel import health

K, B, TEMP = 37, 5, 0.06


def outputs(views, seed=0):
    torch.manual_seed(seed)
    return torch.randn(views * B, K, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("views", [2, 3, 12])
def test_values_gradients_and_centre_equal_the_double_loop(views):
    ours, plain = DinoLoss(K).double(), PlainLoss(K, views, 0.1, 0.9).double()
    for step in range(3):  # the centre moves
        student, teacher = outputs(views, step), outputs(2, 100 + step).detach()
        got = ours(student, ours.targets(teacher, TEMP))
        (grad,) = torch.autograd.grad(got, student)
        ours.update_center()
        want = plain(student, teacher, TEMP)
        (plain_grad,) = torch.autograd.grad(want, student)
        torch.testing.assert_close(got.double(), want, rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, plain_grad, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(ours.center, plain.center[0])


def test_two_micro_batches_make_one_centre_update():
    whole, halves = DinoLoss(K), DinoLoss(K)
    teacher = outputs(2).detach().float()
    whole.targets(teacher, TEMP), whole.update_center()
    for half in (teacher[:4], teacher[4:]):
        halves.targets(half, TEMP)
    halves.update_center()
    torch.testing.assert_close(whole.center, halves.center)


def test_the_only_state_is_the_centre():
    assert list(DinoLoss(K).state_dict()) == ["center"]


def test_health_knows_uniform_and_certain_teachers():
    uniform = torch.full((2, B, K), 1 / K)
    certain = torch.nn.functional.one_hot(torch.arange(2 * B), K).float().view(2, B, K)
    loss = torch.tensor(2.0)
    torch.testing.assert_close(
        health(loss, uniform)["teacher_entropy"].exp(), torch.tensor(K * 1.0)
    )
    signs = health(loss, certain)
    assert signs["teacher_entropy"] == 0 and signs["kl"] == 2.0 and signs["prototypes_used"] == 1.0
