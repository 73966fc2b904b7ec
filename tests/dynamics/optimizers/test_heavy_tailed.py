"""Heavy-tailed noise: its law at a step and at stationarity."""

import math

import pytest
import torch
from sharpscope.dynamics.optimizers.heavy_tailed import HeavyTailedSGD
from sharpscope.dynamics.optimizers.stable import stable_ou_scale
from torch import nn


def assert_mean(samples, expected):
    stderr = float(samples.std()) / math.sqrt(len(samples))
    assert abs(float(samples.mean()) - expected) < 4 * stderr, (float(samples.mean()), expected, stderr)


@pytest.mark.parametrize("alpha", [1.2, 1.6, 2.0])
def test_stationary_law_on_a_quadratic(alpha):
    a, sigma, lr = 4.0, 0.7, 0.1
    p = nn.Parameter(torch.zeros(60_000, dtype=torch.float64))
    optimizer = HeavyTailedSGD([p], lr, alpha=alpha, sigma=sigma, isotropic=False)
    for _ in range(40):  # 0.6^40 = 1e-9
        p.grad = a * p.detach()
        optimizer.step()
    scale = stable_ou_scale(alpha, a, sigma, lr)
    for u in (0.3, 0.8, 1.5):
        assert_mean(torch.cos(u / scale * p.detach()), math.exp(-(u**alpha)))


def increments(params, steps, **options):
    """The noise of every step, [steps, n] over all parameters."""
    optimizer = HeavyTailedSGD(params, 0.3, sigma=2.0, **options)
    rows = []
    for _ in range(steps):
        for p in params:
            p.data.zero_()
            p.grad = torch.zeros_like(p)
        optimizer.step()
        rows.append(torch.cat([p.detach().reshape(-1) for p in params]))
    return torch.stack(rows)


@pytest.mark.parametrize("isotropic", [True, False])
def test_law_of_a_step_over_several_parameters(isotropic):
    alpha = 1.3
    params = [nn.Parameter(torch.zeros(2, 1, dtype=torch.float64)), nn.Parameter(torch.zeros(1, dtype=torch.float64))]
    noise = increments(params, 12_000, alpha=alpha, isotropic=isotropic) / (2.0 * 0.3 ** (1 / alpha))
    for u in ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.7, 0.0, 0.7), (0.5, -0.5, 0.5), (0.8, 0.8, 0.0)):
        direction = torch.tensor(u, dtype=torch.float64)
        exponent = float(direction.norm()) ** alpha if isotropic else float(direction.abs().pow(alpha).sum())
        assert_mean(torch.cos(noise @ direction), math.exp(-exponent))


def test_at_two_the_noise_is_that_of_langevin_at_the_square_of_sigma():
    params = [nn.Parameter(torch.zeros(500, dtype=torch.float64))]
    for isotropic in (True, False):
        noise = increments(params, 100, alpha=2.0, isotropic=isotropic).reshape(-1)
        expected = 2 * 0.3 * 2.0**2  # 2 η T with T = σ²
        assert float(noise.var()) == pytest.approx(expected, rel=4 * math.sqrt(2 / len(noise)))
        assert float((noise**4).mean()) == pytest.approx(3 * expected**2, rel=4 * math.sqrt(96 / 9 / len(noise)))


def test_a_parameter_that_sat_out_a_step_has_its_own_count():
    p, q = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = HeavyTailedSGD([p, q], 0.1, alpha=1.5, sigma=1.0)
    p.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(q, torch.zeros(3))
    q.grad = torch.zeros(3)
    optimizer.step()
    assert [int(optimizer.state[x]["step"]) for x in (p, q)] == [2, 1]
    assert not torch.equal(q, torch.zeros(3))


def test_misuse_is_refused():
    x = [nn.Parameter(torch.ones(1))]
    with pytest.raises(ValueError, match="`alpha` is 2.5"):
        HeavyTailedSGD(x, 0.1, alpha=2.5, sigma=1.0)
    with pytest.raises(ValueError, match="`sigma` is -1"):
        HeavyTailedSGD(x, 0.1, alpha=1.5, sigma=-1.0)
    with pytest.raises(TypeError, match="isotropic"):
        HeavyTailedSGD(x, 0.1, alpha=1.5, sigma=1.0, isotropic=1)
    with pytest.raises(ValueError, match="`lr` is missing"):
        HeavyTailedSGD(x, alpha=1.5, sigma=1.0)
