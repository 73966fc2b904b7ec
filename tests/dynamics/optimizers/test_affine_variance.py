"""D1 and D0 on lines, on the counterexample and on a network."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from sharpscope.dynamics.optimizers.affine_variance import affine_variance, batch_gradients, estimate_D1_D0
from sharpscope.dynamics.studies.counterexamples import adam_counterexample
from sharpscope.landscape.objective import Objective
from torch import nn


def test_the_line_is_the_solution_of_the_linear_programme():
    rng = np.random.default_rng(0)
    for case in range(30):
        x = rng.uniform(0.0, 2.0, 12)
        y = rng.uniform(0.0, 3.0, 12) + (case % 3) * x
        found = affine_variance(x, y, 4)
        best = linprog([x.sum(), 12], A_ub=-np.stack([x, np.ones(12)], 1), b_ub=-y, bounds=[(0, None)] * 2)
        assert (y <= found.D1 * x + found.D0 + 1e-9).all()
        assert found.D1 * x.sum() + 12 * found.D0 == pytest.approx(best.fun, rel=1e-9)


def test_lines_are_recovered():
    x = np.array([0.5, 1.0, 2.0, 2.0])
    assert pytest.approx((3, 1)) == (affine_variance(x, 3 * x + 1, 5).D1, affine_variance(x, 3 * x + 1, 5).D0)
    found = affine_variance([2.0], [5.0], 5)
    assert pytest.approx(5.0) == found.D1 * 2 + found.D0
    assert found.noise_ratio == pytest.approx([0.5])
    with pytest.raises(ValueError, match="finite"):
        affine_variance([1.0], [np.nan], 2)


def test_the_counterexample_has_no_variance_at_its_minimum():
    problem, x = adam_counterexample(10), np.linspace(-4, 3, 50)
    sums = np.square(problem.slope(x[:, None], np.arange(10))).sum(1)
    found = affine_variance(problem.full_slope(x) ** 2, sums, 10)
    a = 1 / 81
    assert pytest.approx(100 * ((1 + 9 * a) ** 2 + 9 * a**2)) == found.D1
    assert pytest.approx(0, abs=1e-9) == found.D0


def problem(mlp):
    model, (inputs, targets) = mlp
    batches = [(inputs[i : i + 32], targets[i : i + 32]) for i in (0, 32, 64)]  # 32, 32 and 6 examples
    return model, batches, Objective.supervised(model, nn.functional.cross_entropy, batches, chunk_size=5)


def test_batch_gradients_are_those_of_autograd_and_their_mean_is_the_gradient(mlp):
    model, batches, objective = problem(mlp)
    here = objective.flatten(objective.parameters).detach()
    found = torch.stack(list(batch_gradients(objective, here)))
    torch.testing.assert_close(found.mean(0), objective.gradient(), rtol=1e-12, atol=1e-15)
    for gradient, (x, y) in zip(found, batches, strict=True):
        model.zero_grad()
        (3 * len(x) / 70 * nn.functional.cross_entropy(model(x), y)).backward()
        own = torch.cat([p.grad.flatten() for p in model.parameters()])
        torch.testing.assert_close(gradient, own, rtol=1e-11, atol=1e-14)


def test_a_network_is_measured_at_other_weights_and_left_as_it_is(mlp):
    model, batches, objective = problem(mlp)
    before = [p.detach().clone() for p in model.parameters()]
    found = estimate_D1_D0(objective, 5, spread=0.3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert found.n == 3
    assert len(found.full) == 5
    assert (found.sums <= found.D1 * found.full + found.D0 + 1e-12).all()
    assert (found.noise_ratio >= 1 - 1e-12).all()
    here = objective.flatten(objective.parameters).detach()
    given = estimate_D1_D0(objective, [here])
    assert given.full[0] == pytest.approx(found.full[0])
    one_batch = Objective.supervised(model, nn.functional.cross_entropy, batches[0])
    with pytest.raises(ValueError, match="at least 2"):
        estimate_D1_D0(one_batch)
