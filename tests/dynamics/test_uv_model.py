"""The UV model's map, sharpness and fixed points against autograd and dense matrices."""

import math

import numpy as np
import pytest
import torch
from sharpscope.dynamics.uv_model import (
    UVModel,
    balanced_map,
    balanced_slope,
    period_two,
    uv_jacobian,
    uv_map,
    uv_sharpness,
)
from sharpscope.hessian.curvature import Hessian
from sharpscope.hessian.eigs import top_eigenvalues
from sharpscope.landscape.objective import Objective


def example(seed, N=None, scale=0.5):
    model = UVModel(6, 4, N=N, scale=scale, seed=seed)
    x = torch.randn(4, generator=torch.Generator().manual_seed(seed + 50), dtype=torch.float64)
    return model, x


def objective(model, x, y):
    return Objective(model, lambda module, batch: 0.5 * (module(batch) - y).square().mean(), x[None])


def step(model, x, y, lr):
    gradients = torch.autograd.grad(model.loss(x, y), list(model.parameters()))
    with torch.no_grad():
        for p, g in zip(model.parameters(), gradients, strict=True):
            p -= lr * g


@pytest.mark.parametrize("N", [None, 1.0, 40.0])
def test_gradient_descent_is_the_map(N):
    model, x = example(0, N, scale=0.2)
    y = 1.3
    lr = 1.1 * model.eta_c(x, y)
    F, L, Y = model.scaled(x, y, lr)
    assert pytest.approx(1.1) == Y
    for _ in range(30):
        step(model, x, y, lr)
        F, L = uv_map(F, L, Y)
        assert model.scaled(x, y, lr) == pytest.approx((F, L, Y), abs=1e-13)


@pytest.mark.parametrize("y", [-30.0, -0.4, 0.0, 0.7, 25.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_trace_and_sharpness_are_exact_at_any_residual(y, seed):
    model, x = example(seed, N=3.0)
    dense = Hessian(objective(model, x, y)).dense()
    values = torch.linalg.eigvalsh(dense)
    assert model.ntk_exact(x) == pytest.approx(float(dense.trace()), rel=1e-12)
    assert model.sharpness_exact(x, y) == pytest.approx(float(values[-1]), rel=1e-12)


@pytest.mark.parametrize("y", [-3.0, 3.0])
def test_one_unit_is_enough(y):
    model = UVModel(1, 3, seed=1)
    x = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64)
    values = torch.linalg.eigvalsh(Hessian(objective(model, x, y)).dense())
    assert model.sharpness_exact(x, y) == pytest.approx(float(values[-1]), rel=1e-12)


def test_without_weights_the_largest_eigenvalue_is_a_cluster_at_the_residual():
    model, x = example(0, scale=0.0)
    root = math.sqrt(float(x.square().sum()) / model.N)
    for y in (-2.0, 2.0):
        assert model.sharpness_exact(x, y) == pytest.approx(2.0 * root, rel=1e-13)
        values = torch.linalg.eigvalsh(Hessian(objective(model, x, y)).dense())
        assert int((values > 1.9 * root).sum()) == 6
        found = top_eigenvalues(Hessian(objective(model, x, y)), tol=1e-10)
        assert float(found.values[0]) == pytest.approx(2.0 * root, rel=1e-9)


def test_the_balance_variables_decouple():
    random = np.random.default_rng(0)
    F, L, Y = random.normal(size=50), 4 + random.random(50), random.normal(size=50)
    after_F, after_L = uv_map(F, L, Y)
    D = F - Y
    np.testing.assert_allclose(after_L + 2 * after_F, (L + 2 * F) * (1 - D) ** 2, atol=1e-11)
    np.testing.assert_allclose(after_L - 2 * after_F, (L - 2 * F) * (1 + D) ** 2, atol=1e-11)


def test_the_jacobian_is_the_derivative():
    state = torch.tensor([0.7, 2.3], dtype=torch.float64)
    exact = torch.autograd.functional.jacobian(lambda s: torch.stack(uv_map(s[0], s[1], 1.2)), state)
    np.testing.assert_allclose(uv_jacobian(0.7, 2.3, 1.2), exact.numpy(), rtol=1e-13)
    F = torch.tensor(0.7, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(lambda f: balanced_map(f, 1.2), F)
    assert balanced_slope(0.7, 1.2) == pytest.approx(float(slope), rel=1e-13)


@pytest.mark.parametrize("Y", [1.001, 1.1, 1.2, math.sqrt(5) - 1, 1.45])
def test_the_orbit_of_period_two(Y):
    orbit = period_two(Y)
    low, high = orbit.F
    assert balanced_map(low, Y) == pytest.approx(high, rel=1e-12)
    assert balanced_map(high, Y) == pytest.approx(low, rel=1e-11)
    assert low * high == pytest.approx(1.0, rel=1e-12)
    assert orbit.multiplier == pytest.approx(balanced_slope(low, Y) * balanced_slope(high, Y), rel=1e-11)
    assert orbit.transverse == pytest.approx(np.mean([math.log(abs(1 + F - Y)) for F in orbit.F]), abs=1e-11)
    assert orbit.mean_ntk == pytest.approx(low + high, rel=1e-12)
    means = np.mean([uv_sharpness(F, 2 * F, Y) for F in orbit.F])
    assert orbit.mean_sharpness == pytest.approx(means, rel=1e-11)
    if math.sqrt(5) - 1 >= Y:
        assert orbit.mean_sharpness == pytest.approx((3 + Y) / 2, rel=1e-9)


def test_period_two_begins_stable_at_one_and_ends_at_the_golden_value():
    assert period_two(1 + 1e-9).multiplier == pytest.approx(1.0, abs=1e-7)
    assert period_two(math.sqrt(5) - 1).multiplier == pytest.approx(-1.0, abs=1e-12)


def test_balance_is_reached_at_once_where_a_point_has_d_minus_one():
    assert period_two(1.5).transverse == -math.inf
    F = period_two(1.5).F[0]
    after_F, after_L = uv_map(F, 2 * F + 0.1, 1.5)
    assert after_L == pytest.approx(2 * after_F, rel=1e-13)


def test_eta_c_is_where_the_flattest_minimum_loses_stability():
    model, x = example(3, N=2.0)
    y = -0.8
    # Balanced weights at f = y: ‖Ux‖² = z ‖v‖² = √(zN) |y|.
    z = float(x.square().sum())
    flattest = 2 * math.sqrt(z / model.N) * abs(y)
    assert model.eta_c(x, y) == pytest.approx(2 / flattest)
    assert model.eta_c(x, 0.0) == math.inf


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="`width` is 0"):
        UVModel(0, 3)
    with pytest.raises(ValueError, match="`N` is 0"):
        UVModel(2, 3, N=0)
    with pytest.raises(ValueError, match="`Y` is 1"):
        period_two(1.0)
