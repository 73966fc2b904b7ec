"""The monitor sees Adam diverge long before any number overflows."""

import math

import pytest
import torch
from sharpscope.dynamics.beta_condition import BetaCondition
from sharpscope.dynamics.point import Point
from sharpscope.dynamics.studies.counterexamples import adam_counterexample
from sharpscope.landscape.objective import Objective
from torch import nn


def descent(betas, steps=1500):
    """Rows of the last step of a run on the counterexample with ten terms."""
    problem = adam_counterexample(10)
    x = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    objective = Objective.from_closure(lambda x: problem.value(x, torch.arange(10)), [x])
    optimizer = torch.optim.Adam([x], lr=1e-3, betas=betas)
    stream, state, rows = torch.Generator().manual_seed(0), {}, []
    for step in range(steps):
        before = x.detach().clone()
        optimizer.zero_grad()
        problem.value(x, torch.randint(10, (1,), generator=stream)).backward()
        optimizer.step()
        point = Point(step, objective, optimizer, state=state, update=(x.detach() - before).reshape(1))
        rows = list(BetaCondition(window=1000).measure(point))
    return rows


def test_the_condition_is_read_from_every_group_with_betas():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups = [{"params": [p]}, {"params": [q], "betas": (0.99, 0.95)}]
    point = Point(0, Objective.from_closure(lambda p: p.sum(), [p]), torch.optim.Adam(groups, betas=(0.9, 0.999)))
    first, second = BetaCondition().measure(point)
    assert (first.quantity, first.index, second.index) == ("beta_condition", 0, 1)
    assert first.value == pytest.approx(math.sqrt(0.999) - 0.9)
    assert second.value == pytest.approx(math.sqrt(0.95) - 0.99)
    assert second.value < 0
    sgd = Point(0, point.objective, torch.optim.SGD([p], lr=0.1))
    assert list(BetaCondition().measure(sgd)) == []
    assert list(BetaCondition().measure(Point(0, point.objective))) == []


def test_steps_lead_uphill_where_beta2_is_too_small_and_downhill_where_not():
    rows = {betas: descent(betas)[-1] for betas in ((0.0, 0.5), (0.0, 0.999))}
    assert all(row.quantity == "descent" for row in rows.values())
    bad, good = rows[0.0, 0.5], rows[0.0, 0.999]
    assert bad.value < -4 * bad.error
    assert good.value > 4 * good.error


def test_the_descent_of_plain_gradient_descent_is_one():
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    objective = Objective.from_closure(lambda p: 0.5 * p.square().sum(), [p])
    state = {}
    for step in range(3):
        update = -0.1 * p.detach()
        p.data.add_(update)
        row = list(BetaCondition().measure(Point(step, objective, state=state, update=update)))[-1]
        assert row.value == pytest.approx(1.0)
    assert set(state) == {"total", "size", "squares"}


def test_the_error_of_the_descent_is_its_spread():
    objective = Objective.from_closure(lambda x: x.sum(), torch.zeros(1, dtype=torch.float64))
    rng, found, errors = torch.Generator().manual_seed(0), [], []
    for _ in range(300):
        state = {}
        measurement = BetaCondition(window=20)
        for step in range(100):
            update = torch.randn(1, generator=rng, dtype=torch.float64)
            [row] = measurement.measure(Point(step, objective, state=state, update=update))
        found.append(row.value)
        errors.append(row.error)
    spread = torch.tensor(found).std()
    assert float(torch.tensor(errors).mean()) == pytest.approx(float(spread), rel=0.15)
