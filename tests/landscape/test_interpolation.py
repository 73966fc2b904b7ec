"""Losses on a line: closed forms on polynomials, the ends of a network, nothing left behind."""

import pytest
import torch
from sharpscope import Objective
from sharpscope.landscape.interpolation import LinearInterpolation, linear_interpolation
from torch import nn


def double_well():
    """Minima at x = ±1, a barrier of 1 at 0."""
    x = torch.zeros(1, dtype=torch.float64)
    return Objective.from_closure(lambda y: (y.square() - 1).square().sum(), x)


def test_the_barrier_between_two_wells():
    line = linear_interpolation(
        double_well(), torch.tensor([-1.0]), torch.tensor([1.0]), [i / 10 for i in range(-2, 13)]
    )
    assert line.alphas[0] == -0.2
    assert line.losses[0] == pytest.approx((1.4**2 - 1) ** 2)
    assert line.ends == (0.0, 0.0)
    assert line.barrier == pytest.approx(1.0)
    assert line.highest == pytest.approx(1.0)  # the points outside the segment are as high, but do not count


def test_a_convex_loss_has_no_barrier():
    x = torch.zeros(3, dtype=torch.float64)
    objective = Objective.from_closure(lambda y: y.square().sum(), x)
    line = linear_interpolation(objective, torch.ones(3), 2 * torch.ones(3))
    assert len(line.alphas) == 21
    assert line.barrier == 0.0
    assert line.highest == line.ends[1] == 12.0


def test_the_barrier_is_measured_from_the_line_between_the_ends():
    line = LinearInterpolation([0.0, 0.5, 1.0], [0.0, 1.5, 2.0])
    assert line.barrier == 0.5
    assert line.highest == 2.0


def test_the_ends_of_a_network_are_its_losses_and_nothing_is_left_behind():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)) for _ in range(2)]
    data = (torch.randn(12, 4), torch.randint(2, (12,)))
    objectives = [Objective.supervised(model, nn.CrossEntropyLoss(), data) for model in models]
    before = {name: tensor.clone() for name, tensor in models[0].state_dict().items()}
    line = linear_interpolation(objectives[0], models[0].state_dict(), models[1].state_dict())
    assert line.ends == tuple(objective.loss() for objective in objectives)
    flat = linear_interpolation(objectives[0], *(one.flatten(one.parameters) for one in objectives))
    assert flat.losses == line.losses
    assert all(torch.equal(before[name], tensor) for name, tensor in models[0].state_dict().items())


def test_what_does_not_fit_is_refused():
    objective = double_well()
    with pytest.raises(ValueError, match=r"`end` has the shape \(2,\)"):
        linear_interpolation(objective, torch.zeros(1), torch.zeros(2))
    with pytest.raises(ValueError, match="`start` lacks"):
        linear_interpolation(objective, {"other": torch.zeros(1)}, torch.zeros(1))
    x = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match="uses its tensors directly"):
        linear_interpolation(Objective.from_closure(lambda: x.square().sum(), x), torch.zeros(1), torch.zeros(1))
