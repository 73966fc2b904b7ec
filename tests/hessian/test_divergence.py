"""Jensen-Shannon divergence: closed forms, SciPy, and no dependence on the grid."""

import math

import pytest
import torch
from scipy import integrate, stats
from scipy.spatial.distance import jensenshannon
from sharpscope.hessian import divergence
from sharpscope.hessian.divergence import js_divergence, spectral_masses

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


@pytest.mark.parametrize(
    ("call", "message"),
    [
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
