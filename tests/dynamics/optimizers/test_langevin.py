"""Langevin noise: the variances that it must have, and what it leaves to its base."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from sharpscope.dynamics.optimizers.langevin import LangevinSGD
from sharpscope.dynamics.optimizers.sam import SAM
from torch import nn

N = 40_000  # independent coordinates: a sample variance has the relative standard error √(2/N) = 0.7 %


def points(n=N, dtype=torch.float64):
    return nn.Parameter(torch.zeros(n, dtype=dtype))


def run(optimizer, params, curvatures, steps):
    for _ in range(steps):
        for p, h in zip(params, curvatures, strict=True):
            p.grad = h * p.detach()
        optimizer.step()


def assert_variance(p, expected):
    values = p.detach().double()
    assert float(values.var()) == pytest.approx(expected, rel=4 * math.sqrt(2 / len(values)))
    assert abs(float(values.mean())) < 4 * math.sqrt(expected / len(values))


def test_stationary_variance_on_a_quadratic():
    lr, T, curvatures = 0.1, 0.3, (0.5, 4.0, 15.0)
    params = [points() for _ in curvatures]
    run(LangevinSGD(params, lr, temperature=T), params, curvatures, 150)  # (1 − ηh)^300 < 1e-6 for each
    for p, h in zip(params, curvatures, strict=True):
        assert_variance(p, T / (h * (1 - lr * h / 2)))


def test_free_diffusion():
    p = points()
    optimizer = LangevinSGD([p], 0.05, temperature=2.0)
    run(optimizer, [p], [0.0], 1)
    assert_variance(p, 2 * 0.05 * 2.0)
    run(optimizer, [p], [0.0], 9)
    assert_variance(p, 10 * 2 * 0.05 * 2.0)  # so the steps are independent


def with_momentum(lr, mu, T, h):
    a = lr * h
    return T / h * ((1 + mu) * (1 - mu) ** 2 + 2 * mu * a) / ((1 - mu) * (1 + mu - a / 2))


def test_stationary_variance_with_momentum():
    lr, mu, T, h = 0.02, 0.8, 0.5, 1.5
    # (x, b) ← M (x, b) + (ξ, 0) with b' = μ b + h x, x' = x − η b'.
    M = np.array([[1 - lr * h, -lr * mu], [h, mu]])
    exact = solve_discrete_lyapunov(M, np.diag([2 * lr * T, 0.0]))[0, 0]
    assert with_momentum(lr, mu, T, h) == pytest.approx(exact, rel=1e-10)
    assert with_momentum(1e-6, mu, T, h) == pytest.approx(T * (1 - mu) / h, rel=1e-3)
    p = points()
    run(LangevinSGD([p], lr, temperature=T, momentum=mu), [p], [h], 300)
    assert_variance(p, exact)


def test_weight_decay_adds_to_the_curvature():
    p = points()
    run(LangevinSGD([p], 0.1, temperature=0.3, weight_decay=2.0), [p], [3.0], 100)
    assert_variance(p, 0.3 / (5.0 * (1 - 0.1 * 5.0 / 2)))


def test_groups_have_their_own_temperature_and_schedules_are_read():
    hot, cold = points(), points()
    groups = [{"params": [hot], "temperature": 2.0}, {"params": [cold], "lr": 0.2}]
    optimizer = LangevinSGD(groups, 0.1, temperature=0.5)
    run(optimizer, [hot, cold], [0.0, 0.0], 1)
    assert_variance(hot, 2 * 0.1 * 2.0)
    assert_variance(cold, 2 * 0.2 * 0.5)
    assert abs(float((hot.detach() * cold.detach()).mean())) < 4 * math.sqrt(0.4 * 0.2 / N)
    optimizer.param_groups[0].update(lr=0.0, temperature=0.0)
    before = hot.detach().clone()
    run(optimizer, [hot, cold], [0.0, 0.0], 1)
    assert torch.equal(hot, before)


def test_seeds_differ_and_repeat():
    draws = []
    for seed in (0, 0, 1):
        p = points(100)
        run(LangevinSGD([p], 0.1, temperature=1.0, seed=seed), [p], [1.0], 3)
        draws.append(p.detach().clone())
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_global_random_state_is_left_alone():
    p = points(100)
    before = torch.get_rng_state()
    run(LangevinSGD([p], 0.1, temperature=1.0), [p], [1.0], 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_weights_take_noise_drawn_in_float32():
    p = points(dtype=torch.bfloat16)
    run(LangevinSGD([p], 0.5, temperature=1.0), [p], [0.0], 1)
    assert p.dtype == torch.bfloat16
    assert_variance(p, 1.0)


def test_it_goes_round_sam():
    def trained(wrap):
        p = nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
        optimizer = wrap(SAM(torch.optim.SGD([p], lr=0.1, momentum=0.9), rho=0.3))
        calls = []

        def closure():
            optimizer.zero_grad()
            loss = (p.square() + p.sin()).sum()
            loss.backward()
            calls.append(1)
            return loss

        for _ in range(10):
            assert optimizer.step(closure) is not None
        assert len(calls) == 20
        return p.detach()

    plain = trained(lambda sam: sam)
    assert torch.equal(trained(lambda sam: LangevinSGD(sam, temperature=0.0)), plain)
    assert not torch.equal(trained(lambda sam: LangevinSGD(sam, temperature=1e-3)), plain)


def test_the_threshold_is_that_of_the_base():
    x = nn.Parameter(torch.ones(1))
    assert LangevinSGD([x], 0.1, temperature=1.0).stability_threshold() == 20.0
    assert LangevinSGD([x], 0.1, temperature=1.0, momentum=0.9).stability_threshold() == pytest.approx(38.0)


def test_misuse_is_refused():
    x = [nn.Parameter(torch.ones(1))]
    with pytest.raises(ValueError, match="`lr` is missing"):
        LangevinSGD(x, temperature=1.0)
    with pytest.raises(ValueError, match="belong to the optimizer"):
        LangevinSGD(torch.optim.SGD(x, lr=0.1), 0.1, temperature=1.0)
    with pytest.raises(ValueError, match="`temperature` is -1"):
        LangevinSGD(x, 0.1, temperature=-1.0)
    with pytest.raises(TypeError, match="`seed` is 0.5"):
        LangevinSGD(x, 0.1, temperature=1.0, seed=0.5)
    optimizer = LangevinSGD(x, 0.1, temperature=1.0)
    with pytest.raises(ValueError, match="`temperature` is -2"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "temperature": -2.0})
    assert len(optimizer.param_groups) == len(optimizer.base.param_groups) == 1
