"""Lion's identity, its limits, its geometry."""

import pytest
import torch
from given_gradients import noise, run
from sharpscope.dynamics.optimizers import NoPreconditionerError
from sharpscope.dynamics.optimizers.lion import Lion
from sharpscope.dynamics.optimizers.sign import SignSGD


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.98), (0.0, 0.9), (0.99, 0.9), (0.5, 0.5)])
def test_its_directions_are_an_average_of_the_extrapolated_gradient(betas):
    """u' = β₂ u + (1 − β₂)(g' + c (g' − g)), with u read from the optimizer's own momentum."""
    p = torch.nn.Parameter(torch.zeros(30, dtype=torch.float64))
    optimizer = Lion([p], lr=1.0, betas=betas)
    c = optimizer.effective_extrapolation()[0]
    m = torch.zeros(30, dtype=torch.float64)
    u = before = None
    for g in noise(60, 30):
        found = betas[0] * m + (1 - betas[0]) * g
        if before is not None:
            u = betas[1] * u + (1 - betas[1]) * (g + c * (g - before))
            torch.testing.assert_close(found, u, rtol=0, atol=1e-12)
        u, before = found if u is None else u, g
        place = p.detach().clone()
        p.grad = g.clone()
        optimizer.step()
        assert torch.equal(p.detach(), place - torch.sign(found))
        m = optimizer.state[p]["momentum"].clone()


def test_the_default_extrapolates_by_nine_steps():
    p = torch.nn.Parameter(torch.zeros(1))
    assert Lion([p]).effective_extrapolation()[0] == pytest.approx(9)
    assert Lion([p], betas=(0.0, 0.99)).effective_extrapolation()[0] == pytest.approx(99)
    assert Lion([p], betas=(0.7, 0.7)).effective_extrapolation() == [0.0]


def test_limits():
    gradients = noise(100)
    sign, signum = run(SignSGD, gradients, lr=0.01), run(SignSGD, gradients, lr=0.01, momentum=0.8)
    assert torch.equal(run(Lion, gradients, lr=0.01, betas=(0.0, 0.0)), sign)
    assert torch.equal(run(Lion, gradients, lr=0.01, betas=(0.0, 0.7)), sign)
    assert torch.equal(run(Lion, gradients, lr=0.01, betas=(0.8, 0.8)), signum)
    assert not torch.equal(run(Lion, gradients, lr=0.01, betas=(0.8, 0.9)), signum)


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.0), (0.5, 0.1)])
def test_the_preconditioner_turns_the_direction_into_its_sign(betas):
    p = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer = Lion([p], lr=0.1, betas=betas)
    with pytest.raises(ValueError, match="has not made a step"):
        optimizer.preconditioner(p)
    m = torch.zeros(6, dtype=torch.float64)
    for g in noise(4, 6):
        g[2] = 0.0
        u, m = betas[0] * m + (1 - betas[0]) * g, betas[1] * m + (1 - betas[1]) * g
        P, before = optimizer.preconditioner(p, g), p.detach().clone()
        p.grad = g
        optimizer.step()
        torch.testing.assert_close(p.detach(), before - 0.1 * u / P, rtol=0, atol=1e-15)
        assert P[2] == torch.inf


def test_the_last_direction_is_not_kept():
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = Lion([p])
    p.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(NoPreconditionerError, match="pass `gradient`"):
        optimizer.preconditioner(p)


def test_it_keeps_one_buffer():
    p = torch.nn.Parameter(torch.zeros(1000))
    optimizer = Lion([p])
    p.grad = torch.ones(1000)
    optimizer.step()
    assert optimizer.state_bytes() == 4 * 1000 + 4


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, -0.1)])
def test_betas_are_checked(betas):
    with pytest.raises(ValueError, match="betas"):
        Lion([torch.nn.Parameter(torch.ones(1))], betas=betas)
