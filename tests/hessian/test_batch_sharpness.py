"""Batch sharpness: all minibatches counted out, its error, and what must not matter."""

import itertools
import math

import pytest
import torch
from sharpscope import Hessian, Objective
from sharpscope.hessian.batch_sharpness import batch_sharpness
from torch import nn


def linear(num=7, dim=3, seed=0):
    """L_i = (x_i·θ − y_i)² in one number."""
    torch.manual_seed(seed)
    model = nn.Linear(dim, 1, bias=False, dtype=torch.float64)
    x, y = torch.randn(num, dim, dtype=torch.float64), torch.randn(num, 1, dtype=torch.float64)
    return model, x, y


def exact(model, x, y, size):
    """Over all minibatches of the squared error: gradient and Hessian in closed form."""
    theta, bends, squares = model.weight.detach().reshape(-1), [], []
    for rows in itertools.combinations(range(len(x)), size):
        part = x[list(rows)]
        H = 2 * part.T @ part / size
        g = 2 * part.T @ (part @ theta - y[list(rows), 0]) / size
        bends.append(g @ H @ g)
        squares.append(g @ g)
    return float(sum(bends) / sum(squares))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_mean_over_all_minibatches(size):
    model, x, y = linear()
    objective = Objective.supervised(model, nn.MSELoss(), (x, y))
    found = batch_sharpness(objective, size, num_batches=300, seed=1)
    assert abs(found.estimate - exact(model, x, y, size)) < 4 * found.stderr
    assert found.stderr < 0.15 * found.estimate
    assert found.products == 300


def test_standard_error_is_the_scatter_of_estimates():
    model, x, y = linear(num=40)
    objective = Objective.supervised(model, nn.MSELoss(), (x, y))
    found = [batch_sharpness(objective, 2, num_batches=30, seed=seed) for seed in range(30)]
    estimates = torch.tensor([f.estimate for f in found])
    typical = float(torch.tensor([f.stderr for f in found]).square().mean().sqrt())
    assert float(estimates.std()) == pytest.approx(typical, rel=0.55)  # four standard errors of a deviation of 30


def test_what_all_minibatches_agree_on_has_no_error():
    """Single examples with ‖x‖ = 1: every one has the curvature 2 along its gradient, however large that is."""
    model, x, y = linear(num=20)
    objective = Objective.supervised(model, nn.MSELoss(), (nn.functional.normalize(x, dim=1), y))
    found = batch_sharpness(objective, 1, num_batches=30)
    assert found.estimate == pytest.approx(2, rel=1e-12)
    assert found.stderr < 1e-12
    torch.testing.assert_close(found.samples, torch.full((30,), 2.0, dtype=torch.float64))


def test_the_whole_data_is_the_curvature_along_the_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    objective = Objective.supervised(
        model, nn.CrossEntropyLoss(), (torch.randn(20, 4, dtype=torch.float64), torch.randint(0, 3, (20,)))
    )
    g = objective.gradient()
    found = batch_sharpness(objective, 20)
    assert found.estimate == pytest.approx(float(g @ (Hessian(objective) @ g) / (g @ g)), rel=1e-10)
    assert (found.stderr, found.products) == (0.0, 1)


def test_how_the_data_is_cut_does_not_matter():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randint(0, 3, (20,))
    y[3] = -100  # a term less in the minibatches that hold it
    criterion, cuts = nn.CrossEntropyLoss(), [7, 12, 1]
    whole = Objective.supervised(model, criterion, (x, y))
    pieces = Objective.supervised(model, criterion, list(zip(x.split(cuts), y.split(cuts), strict=True)))
    chunked = Objective.supervised(model, criterion, (x, y), chunk_size=3)
    expected = batch_sharpness(whole, 8, num_batches=5, seed=2)
    for other in (pieces, chunked):
        found = batch_sharpness(other, 8, num_batches=5, seed=2)
        torch.testing.assert_close(found.samples, expected.samples, rtol=1e-9, atol=0)
    assert batch_sharpness(whole, 8, num_batches=5, seed=3).estimate != expected.estimate


def test_no_gradient_at_all():
    model, x, _ = linear()
    found = batch_sharpness(Objective.supervised(model, nn.MSELoss(), (x, model(x).detach())), 2, num_batches=3)
    assert math.isnan(found.estimate)


def test_refusals():
    model, x, y = linear()
    objective = Objective.supervised(model, nn.MSELoss(), (x, y))
    for size in (0, 8, 2.5):
        with pytest.raises(ValueError, match="from 1 to 7"):
            batch_sharpness(objective, size)
    with pytest.raises(ValueError, match="at least one"):
        batch_sharpness(objective, 2, num_batches=0)
    with pytest.raises(TypeError, match="Objective"):
        batch_sharpness(model, 2)
    theta = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="closure"):
        batch_sharpness(Objective.from_closure(lambda t: t.square().sum(), theta), 1)
    ignored = Objective.supervised(nn.Linear(3, 2).double(), nn.CrossEntropyLoss(), (x, torch.tensor([0] + 6 * [-100])))
    with pytest.raises(ValueError, match="no term"):
        batch_sharpness(ignored, 1, num_batches=20)
