"""Bounds on what a Lanczos run has not found, against spectra that are known."""

import itertools

import pytest
import torch
from sharpscope.hessian.exclusion import RandomRun, lift
from sharpscope.kernels import batched_lanczos


def run_on(d, start, steps, needed):
    """A Lanczos run on diag(d), its last remainder included."""
    found = batched_lanczos(lambda v: d * v, [0, len(d)], steps, start=start)
    k = int(found.steps)
    remainder = 0.0 if k < steps or k == len(d) else float(found.residual_norm)
    return RandomRun(needed, found.alpha[0, :k].tolist(), [*found.beta[0, : k - 1].tolist(), remainder])


def sum_of_squares(run, mu):
    """Σ_i p_i(μ)², by bisection on what is needed to exclude μ."""
    low, high = 0.0, 1e30
    while high - low > 1e-9 * high:
        middle = (low * high) ** 0.5 if low > 0 else high * 1e-3
        low, high = (middle, high) if RandomRun(middle, run.alpha, run.beta).excludes(mu) else (low, middle)
        if high < 1e-3:
            break
    return high


@pytest.mark.parametrize("steps", [1, 3, 8, 20])
@pytest.mark.parametrize("seed", range(5))
def test_no_eigenvalue_is_excluded_that_the_start_contains(steps, seed):
    """Σ_i p_i(λ)² ≤ 1 / (vᵀq₁)² at every eigenvalue, whatever the number of steps."""
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(40, generator=generator, dtype=torch.float64)
    start = torch.randn(40, generator=generator, dtype=torch.float64)
    shares = (start / start.norm()).square()
    run = run_on(d, start, steps, needed=1.0)
    for value, share in zip(d.tolist(), shares.tolist(), strict=True):
        assert sum_of_squares(run, value) <= (1 + 1e-6) / share


@pytest.mark.parametrize("seed", range(20))
def test_the_upper_bound_holds_and_tightens(seed):
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(200, generator=generator, dtype=torch.float64)
    start = torch.randn(200, generator=generator, dtype=torch.float64)
    top = int(d.argmax())
    needed = float((start.norm() / start[top]) ** 2)
    bounds = [run_on(d, start, steps, needed).upper_bound(100.0) for steps in (5, 10, 20, 40)]
    resolution = 2e-7  # 100 halved 30 times
    assert all(bound >= float(d[top]) - 1e-9 for bound in bounds)
    assert all(later <= earlier + resolution for earlier, later in itertools.pairwise(bounds))
    assert bounds[-1] - float(d[top]) < 0.2


def test_a_random_start_seldom_misleads():
    """With n/δ² and δ = 0.3 the top escapes at most in 24 % of the runs, over 400 seeds (± 2 %)."""
    d = torch.zeros(50, dtype=torch.float64)
    d[0] = 1.0
    misled = 0
    for seed in range(400):
        start = torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        bound = run_on(d, start, 1, needed=50 / 0.3**2).upper_bound(10.0)
        misled += bound is not None and bound < 1.0
    assert misled / 400 < 0.24 + 3 * 0.02


def test_a_run_that_has_ended_excludes_all_but_its_ritz_values():
    run = RandomRun(1e12, [1.0, 2.0], [0.5, 0.0])
    assert run.has_ended
    assert run.excludes(2.3)
    assert run.upper_bound(5.0) == pytest.approx(run.ritz_values()[0], abs=1e-6)


def test_nothing_is_excluded_below_the_ritz_values_or_too_early():
    run = RandomRun(1e6, [1.0], [1.0])
    assert run.upper_bound(0.5) is None
    assert run.upper_bound(1.5) is None
    assert run.upper_bound(1e4) == pytest.approx(1.0 + 1e3, rel=1e-3)  # p₁ = (μ − 1) / 1


def test_the_mirror_image_bounds_the_other_end():
    run = RandomRun(1e4, [-3.0, 1.0], [0.5, 0.2])
    assert run.mirrored().ritz_values()[0] == pytest.approx(3.0, abs=0.1)
    assert run.mirrored().mirrored() == run


@pytest.mark.parametrize("seed", range(30))
def test_a_small_coupling_lifts_nothing_over_the_edge(seed):
    """The bound on block matrices [[Θ, Cᵀ], [C, B]]: it holds, and fails to hold beyond what it allows."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.rand(6, generator=generator, dtype=torch.float64)
    B = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    B = B + B.T
    coupling = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    nu = float(torch.linalg.eigvalsh(B)[-1])
    mu = max(nu, 1.0) + 0.5
    coupling *= ((mu - nu) / lift(theta, coupling, mu)) ** 0.5  # exactly what is allowed
    assert lift(theta, coupling, mu) == pytest.approx(mu - nu)
    A = torch.cat([torch.cat([theta.diag(), coupling.T], 1), torch.cat([coupling, B], 1)])
    assert float(torch.linalg.eigvalsh(A)[-1]) <= mu + 1e-9


def test_the_lift_is_infinite_at_the_edge_and_zero_without_coupling():
    assert lift(torch.tensor([1.0]), torch.ones(1, 1), 1.0) == float("inf")
    assert lift(torch.ones(3), torch.empty(0, 3), 2.0) == 0.0
