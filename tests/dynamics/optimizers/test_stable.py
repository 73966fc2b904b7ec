"""Stable random numbers against their characteristic functions, known laws and SciPy."""

import math

import pytest
import torch
from scipy import stats
from sharpscope.dynamics.optimizers.stable import (
    isotropic_stable,
    positive_stable,
    stable,
    stable_abs_mean,
    stable_ou_scale,
)

ALPHAS = [0.7, 1.0, 1.2, 1.5, 1.8, 2.0]
POINTS = (0.2, 0.5, 1.0, 1.5, 2.5)


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_mean(samples, expected, errors=4):
    stderr = float(samples.std()) / math.sqrt(len(samples))
    assert abs(float(samples.mean()) - expected) < errors * stderr, (float(samples.mean()), expected, stderr)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_one_dimensional_characteristic_function(alpha):
    x = stable((400_000,), alpha, generator=stream())
    assert x.dtype == torch.float64
    for u in POINTS:
        assert_mean(torch.cos(u * x), math.exp(-(u**alpha)))
        assert_mean(torch.sin(u * x), 0.0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_isotropic_characteristic_function_depends_on_the_length_alone(alpha):
    x = isotropic_stable(400_000, 3, alpha, generator=stream(1))
    for u in ((1.0, 0.0, 0.0), (0.0, 0.6, 0.8), (0.5, -0.5, 0.7), (-1.2, 0.3, 0.1), (0.2, 0.2, 0.1)):
        direction = torch.tensor(u, dtype=torch.float64)
        assert_mean(torch.cos(x @ direction), math.exp(-(float(direction.norm()) ** alpha)))


def test_isotropic_entries_are_dependent_and_independent_ones_are_not():
    u = torch.tensor([1.0, 1.0], dtype=torch.float64)
    expected = {"isotropic": math.exp(-(2**0.6)), "independent": math.exp(-2)}  # α = 1.2: ‖u‖^α and Σ|u_j|^α
    assert_mean(torch.cos(isotropic_stable(200_000, 2, 1.2, generator=stream()) @ u), expected["isotropic"])
    assert_mean(torch.cos(stable((200_000, 2), 1.2, generator=stream()) @ u), expected["independent"])


@pytest.mark.parametrize("beta", [0.35, 0.5, 0.75, 0.9])
def test_laplace_transform_of_the_positive_law(beta):
    A = positive_stable((400_000,), beta, generator=stream(2))
    assert bool((A > 0).all())
    for s in (0.1, 0.5, 1.0, 3.0):
        assert_mean(torch.exp(-s * A), math.exp(-(s**beta)))
    assert torch.equal(positive_stable((3,), 1.0, generator=stream()), torch.ones(3, dtype=torch.float64))


def test_laws_that_are_known_by_other_names():
    n = 50_000
    laws = {
        stats.norm(scale=math.sqrt(2)): stable((n,), 2.0, generator=stream(3)),
        stats.cauchy(): stable((n,), 1.0, generator=stream(4)),
        stats.levy(scale=0.5): positive_stable((n,), 0.5, generator=stream(5)),
    }
    for law, samples in laws.items():
        assert stats.kstest(samples.numpy(), law.cdf).pvalue > 1e-3
    gaussian = isotropic_stable(n, 2, 2.0, generator=stream(6))
    assert_mean(gaussian[:, 0].square(), 2.0)
    assert_mean(gaussian[:, 0] * gaussian[:, 1], 0.0)


@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.8])
def test_quantiles_agree_with_scipy(alpha):
    samples = stable((200_000,), alpha, generator=stream(7))
    for x in (-3.0, -1.0, 0.3, 1.0, 4.0):
        assert_mean((samples <= x).double(), float(stats.levy_stable.cdf(x, alpha, 0.0)))


@pytest.mark.parametrize("alpha", [1.5, 1.8, 2.0])
def test_mean_absolute_value(alpha):
    # 2 %: the variance is infinite, so there is no standard error to go by.
    samples = stable((2_000_000,), alpha, generator=stream(8))
    assert float(samples.abs().mean()) == pytest.approx(stable_abs_mean(alpha), rel=0.02)


def test_mean_absolute_value_in_closed_form():
    assert stable_abs_mean(2.0) == pytest.approx(2 / math.sqrt(math.pi), rel=1e-14)
    assert stable_abs_mean(1.5) == pytest.approx(1.7055, abs=5e-5)
    assert stable_abs_mean(1.8) == pytest.approx(1.2687, abs=5e-5)
    assert stable_abs_mean(1.0) == math.inf


@pytest.mark.parametrize("alpha", [0.8, 1.3, 2.0])
def test_stationary_scale_solves_its_equation(alpha):
    a, sigma, lr = 3.0, 0.7, 0.2
    s = stable_ou_scale(alpha, a, sigma, lr)
    assert s**alpha == pytest.approx(abs(1 - lr * a) ** alpha * s**alpha + sigma**alpha * lr, rel=1e-13)
    assert stable_ou_scale(alpha, a, sigma, 1e-7) == pytest.approx(stable_ou_scale(alpha, a, sigma), rel=1e-6)


def test_stationary_scale_at_the_normal_law():
    a, sigma, lr = 3.0, 0.7, 0.2
    assert 2 * stable_ou_scale(2.0, a, sigma) ** 2 == pytest.approx(sigma**2 / a, rel=1e-13)
    assert 2 * stable_ou_scale(2.0, a, sigma, lr) ** 2 == pytest.approx(sigma**2 / (a * (1 - lr * a / 2)), rel=1e-13)


def test_misuse_is_refused():
    for bad in (0.0, 2.1, math.nan):
        with pytest.raises(ValueError, match="`alpha`"):
            stable((3,), bad)
    with pytest.raises(ValueError, match="`beta` is 1.5"):
        positive_stable((3,), 1.5)
    with pytest.raises(ValueError, match="nothing is stationary"):
        stable_ou_scale(1.5, 10.0, lr=0.2)
