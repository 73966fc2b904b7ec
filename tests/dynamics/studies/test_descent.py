"""Descent on a quadratic, whose path is known, and on a small network against a plain loop."""

import math

import pytest
import torch
from sharpscope.dynamics.studies.descent import descend, loss_and_gradient
from sharpscope.dynamics.studies.digit_problems import digit_examples, fully_connected, half_squares, one_hot
from sharpscope.landscape import Objective
from torch import nn

EIGENVALUES = torch.tensor([4.0, 1.0, 0.25, 0.1], dtype=torch.float64)


class Bowl(nn.Module):
    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, scales):
        return 0.5 * (scales * self.theta.square()).sum(dim=1)


def bowl():
    model = Bowl()
    return model, Objective(model, lambda model, batch: model(batch).mean(), EIGENVALUES[None])


def sgd(model, lr, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def test_a_quadratic_descends_as_its_eigenvalues_say():
    model, objective = bowl()
    found = descend(model, objective, sgd(model, 0.3), 12, measure_every=4)
    assert found["step"] == [0, 4, 8, 12]
    assert not found["diverged"]
    for step, loss in zip(found["step"], found["loss"], strict=True):
        assert loss == pytest.approx(
            float(0.5 * (EIGENVALUES * (1 - 0.3 * EIGENVALUES) ** (2 * step)).sum()), rel=1e-12
        )
    assert found["sharpness"] == pytest.approx([4.0] * 4, rel=1e-3)
    assert all(abs(v - 4) <= bar + 1e-12 for v, bar in zip(found["sharpness"], found["error"], strict=True))
    assert model.theta.detach() == pytest.approx((1 - 0.3 * EIGENVALUES) ** 12)


def test_the_last_step_is_recorded_and_the_loss_alone_can_be():
    model, objective = bowl()
    assert descend(model, objective, sgd(model, 0.1), 5, measure_every=3)["step"] == [0, 3, 5]
    found = descend(model, objective, sgd(model, 0.1), 5, measure_every=None)
    assert found["step"] == [0, 1, 2, 3, 4, 5]
    assert len(found["loss"]) == 6
    assert "sharpness" not in found


@pytest.mark.parametrize("limit", [10.0, 1e5])
def test_a_run_ends_where_it_diverges(limit):
    model, objective = bowl()
    found = descend(model, objective, sgd(model, 1.0), 100, diverged=limit)
    assert found["diverged"]
    assert found["loss"][-1] > limit >= found["loss"][-2]
    assert math.isnan(found["sharpness"][-1])
    assert not any(math.isnan(v) for v in found["sharpness"][:-1])
    assert len(found["step"]) == len(found["loss"]) == len(found["sharpness"])


def test_an_overflow_is_divergence():
    model, objective = bowl()
    found = descend(model, objective, sgd(model, 1e200), 5, diverged=1e308, measure_every=None)
    assert found["diverged"]
    assert len(found["loss"]) < 6


def test_a_network_trains_as_in_a_plain_loop_with_any_optimizer():
    inputs, labels = digit_examples(20)
    targets = one_hot(labels)
    ours, plain = (fully_connected(3, 8, seed=1) for _ in range(2))
    objective = Objective.supervised(ours, half_squares, (inputs, targets))
    found = descend(ours, objective, sgd(ours, 0.1, momentum=0.9), 6, measure_every=2)
    optimizer = sgd(plain, 0.1, momentum=0.9)
    for step in range(7):
        optimizer.zero_grad()
        loss = half_squares(plain(inputs), targets)
        if step % 2 == 0:
            assert found["loss"][step // 2] == pytest.approx(loss.item(), rel=1e-12)
        if step < 6:
            loss.backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-12)


def test_loss_and_gradient_are_those_of_the_objective():
    inputs, labels = digit_examples(20)
    model = fully_connected(2, 8, seed=1)
    objective = Objective.supervised(model, half_squares, (inputs, one_hot(labels)), chunk_size=7)
    loss, gradient = loss_and_gradient(objective)
    assert loss == pytest.approx(objective.loss(), rel=1e-14)
    assert torch.allclose(gradient, objective.gradient(), rtol=0, atol=1e-14)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("steps", "every", "optimizer", "message"),
    [
        (0, 1, torch.optim.SGD, "`steps` is 0"),
        (5, 0, torch.optim.SGD, "`measure_every` is 0"),
        (5, 1, torch.optim.LBFGS, "`optimizer` is LBFGS, which evaluates the loss itself"),
    ],
)
def test_descents_that_cannot_be_are_refused(steps, every, optimizer, message):
    model, objective = bowl()
    with pytest.raises(ValueError, match=message):
        descend(model, objective, optimizer(model.parameters(), lr=0.1), steps, measure_every=every)
