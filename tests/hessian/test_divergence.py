"""Jensen-Shannon divergence: closed forms, SciPy, and no dependence on the grid."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from scipy.spatial.distance import jensenshannon
from sharpscope.hessian import divergence
from sharpscope.hessian.divergence import js_divergence, js_grid_sum, js_to, spectral_masses

LN2 = math.log(2)


def atoms(*values, weights=None):
    nodes = torch.tensor(values, dtype=torch.float64)
    return nodes, torch.full_like(nodes, 1 / len(values)) if weights is None else torch.tensor(weights)


def js(spectra, **options):
    return js_divergence(spectral_masses(spectra, **options)[1])


def test_agrees_with_scipy_squared():
    rng = torch.Generator().manual_seed(0)
    masses = torch.rand(5, 40, generator=rng, dtype=torch.float64) * torch.randint(0, 2, (5, 40), generator=rng)
    expected = [[jensenshannon(p, q) ** 2 for q in masses.numpy()] for p in masses.numpy()]
    torch.testing.assert_close(js_divergence(masses), torch.tensor(expected), atol=1e-12, rtol=0)


def test_equal_is_zero_and_disjoint_is_ln_2():
    masses = torch.tensor([[0.2, 0.8, 0.0, 0.0], [0.1, 0.4, 0.0, 0.0], [0.0, 0.0, 3.0, 4.0]])
    found = js_divergence(masses)
    assert torch.equal(found, found.T)
    assert float(found[0, 1]) <= 1e-15
    torch.testing.assert_close(found[0, 2], torch.tensor(LN2, dtype=torch.float64), atol=1e-15, rtol=0)
    assert bool((found.diagonal() == 0).all())


def test_its_root_is_a_metric():
    masses = torch.rand(30, 6, generator=torch.Generator().manual_seed(1)) ** 4
    d = js_divergence(masses).sqrt()
    assert float((d.unsqueeze(2) - d.unsqueeze(1)).abs().sub(d.unsqueeze(0)).max()) <= 1e-12


@pytest.mark.parametrize("distance", [0.05, 0.2, 0.7])
def test_two_gaussians_against_quadrature(distance):
    """One eigenvalue each: the densities are two Gaussians, whose divergence is an integral."""
    found = js([atoms(1.0), atoms(10**distance)], sigma=0.1)[0, 1]
    p, q = stats.norm(0, 0.1).pdf, stats.norm(distance, 0.1).pdf

    def integrand(x):
        m = (p(x) + q(x)) / 2
        return sum(f(x) * math.log(f(x) / m) / 2 if f(x) > 0 else 0.0 for f in (p, q))

    expected, _ = integrate.quad(integrand, -1, 1 + distance, points=[0, distance / 2, distance], epsabs=1e-12)
    # The rectangle rule on Gaussians sampled four times a width.
    assert abs(float(found) - expected) < 1e-6


@pytest.mark.parametrize("axis", ["log", "linear"])
def test_the_grid_does_not_matter(axis, monkeypatch):
    rng = torch.Generator().manual_seed(2)
    spectra = [atoms(*(torch.randn(30, generator=rng, dtype=torch.float64) ** 3 * 10**i).tolist()) for i in range(3)]
    coarse = js(spectra, axis=axis)
    monkeypatch.setattr(divergence, "POINTS_PER_SIGMA", 64)
    fine = js(spectra, axis=axis)
    torch.testing.assert_close(coarse, fine, atol=1e-6, rtol=0)


@pytest.mark.parametrize("axis", ["log", "linear"])
def test_a_common_factor_does_not_matter(axis):
    rng = torch.Generator().manual_seed(3)
    nodes = torch.randn(3, 20, generator=rng, dtype=torch.float64)
    before = js([atoms(*row.tolist()) for row in nodes], axis=axis)
    after = js([atoms(*row.tolist()) for row in 1e5 * nodes], axis=axis)
    torch.testing.assert_close(before, after, atol=1e-9, rtol=0)


def test_zeros_are_an_outcome_of_their_own():
    """p = (δ₀ + f) / 2 against q = f: KL terms ½ ln 2 + ½ ln ⅔ and ln 4⁄3, whatever f."""
    half, none, all_zero = atoms(0.0, 3.0), atoms(3.0, 3.0), atoms(0.0, 0.0)
    expected = (math.log(2) / 2 + math.log(2 / 3) / 2) / 2 + math.log(4 / 3) / 2
    for noise in (0.0, 1e-9):
        spectra = [half, none, all_zero, (none[0] * 1e-12, none[1])]
        found = js(spectra, zeros=[noise] * 4)
        assert abs(float(found[0, 1]) - expected) < 1e-12
        assert abs(float(found[1, 2]) - LN2) < 1e-12
        # Below the noise an eigenvalue is zero; without a noise level it is twelve decades away.
        assert float(found[2, 3]) < 1e-12 if noise else abs(float(found[2, 3]) - LN2) < 1e-12
    assert js([all_zero, all_zero]).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_the_log_axis_tells_scales_apart_that_the_linear_one_cannot():
    spectra = [atoms(1e-6, 2e-6), atoms(1e-3, 2e-3), atoms(1.0, 2.0)]
    assert float(js(spectra)[0, 1]) > 0.99 * LN2
    assert float(js(spectra, axis="linear")[0, 1]) < 1e-3
    assert float(js([atoms(-1.0, 2.0), atoms(1.0, 2.0)])[0, 1]) < 1e-12, "the log axis drops signs"
    assert float(js([atoms(-1.0, 2.0), atoms(1.0, 2.0)], axis="linear")[0, 1]) > 0.3


def test_masses_are_normalised_on_the_grid():
    grid, masses = spectral_masses([atoms(1.0, 0.0, 5.0), atoms(2.0, weights=[7.0])], sigma=0.2)
    assert masses.shape == (2, len(grid) + 1)
    torch.testing.assert_close(masses.sum(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(masses[:, -1], torch.tensor([1 / 3, 0.0], dtype=torch.float64))
    mean = float((grid * masses[1, :-1]).sum())
    assert abs(mean - math.log10(2)) < 1e-9
    spread = float(((grid - mean) ** 2 * masses[1, :-1]).sum())
    assert abs(spread - 0.2**2) < 1e-9


def test_one_row_against_many_is_a_row_of_the_matrix():
    masses = torch.rand(6, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    masses = masses / masses.sum(1, keepdim=True)
    torch.testing.assert_close(js_to(masses[2], masses), js_divergence(masses)[2], atol=1e-15, rtol=0)


@pytest.mark.parametrize("points", [4001, 40001])
def test_a_sum_over_a_grid_is_the_divergence_over_the_spacing(points):
    """Two Gaussians on a fine grid, against SciPy; disjoint ones give ln 2 over the spacing, above any bound."""
    near, far = [atoms(0.0), atoms(0.02)], [atoms(0.0), atoms(1.0)]
    spacing = (0.02 + 2) / (points - 1)
    grid = torch.linspace(-1, 1.02, points, dtype=torch.float64).numpy()
    # SciPy divides what is nearly zero by what is nearer.
    p, q = (np.where(abs(grid - mean) < 0.2, stats.norm(mean, 0.01).pdf(grid), 0.0) for mean in (0.0, 0.02))
    found = js_grid_sum(near, sigma=0.01, num_points=points)
    assert torch.equal(found, found.T)
    assert float(found[0, 1]) == pytest.approx(jensenshannon(p, q) ** 2 / spacing, rel=1e-9)
    assert float(found[0, 1]) * spacing == pytest.approx(float(js(near, axis="linear", sigma=0.01)[0, 1]), abs=1e-6)
    assert float(js_grid_sum(far, sigma=0.01, num_points=points)[0, 1]) == pytest.approx(LN2 * (points - 1) / 3)


def test_the_weights_of_a_grid_sum_count():
    light, heavy = (
        js_grid_sum([atoms(0.0, 0.5, weights=[w, 1 - w]), atoms(0.0)], sigma=0.01, num_points=5000)[0, 1]
        for w in (0.9, 0.1)
    )
    assert float(heavy) > 5 * float(light)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: js_grid_sum([atoms(0.0, 1000.0)]), "`sigma` is 0.00316 but the grid of 50000 points has a spacing"),
        (lambda: js_grid_sum([atoms(0.0)], num_points=1), "`num_points` is 1"),
        (lambda: js_divergence(torch.tensor([[1.0, -0.1]])), "non-negative and finite"),
        (lambda: js_divergence(torch.tensor([[1.0, math.nan]])), "non-negative and finite"),
        (lambda: js_divergence(torch.ones(3)), r"shape \[3\]"),
        (lambda: js_divergence(torch.tensor([[1.0, 0.0], [0.0, 0.0]])), r"`masses\[1\]` sums to 0"),
        (lambda: spectral_masses([atoms(1.0)], axis="lin"), "`axis` is 'lin'"),
        (lambda: spectral_masses([atoms(1.0)], sigma=0.0), "`sigma` is 0.0"),
        (lambda: spectral_masses([atoms(0.0, 1e6)], axis="linear", sigma=1e-3), "use a sigma of at least"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
