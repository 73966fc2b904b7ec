"""Deflated densities, densities to a tolerance, and rounded bases: identities, coverage, budgets."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from sharpscope.hessian.deflation import leading_subspace
from sharpscope.hessian.density import SpectralDensity, w1_distance
from sharpscope.hessian.estimate import NotConvergedWarning
from sharpscope.hessian.operator import DenseOperator, DiagonalOperator
from sharpscope.hessian.probes import rademacher, random_generator
from sharpscope.hessian.slq import spectral_density

N = 400
OUTLIERS = torch.tensor([10.0, 8, 5, -3])
SPECTRA = {
    "outliers": torch.cat([OUTLIERS, 0.2 * torch.sin(torch.arange(N - 4.0))]),
    "indefinite": torch.linspace(-3, 4, N),
    "decaying": 5 * 0.97 ** torch.arange(float(N)),
}


def symmetric(eigenvalues, seed=0):
    torch.manual_seed(seed)
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    A = (Q * torch.as_tensor(eigenvalues, dtype=torch.float64)) @ Q.T
    return (A + A.T) / 2


class Counted(DenseOperator):
    def __init__(self, matrix):
        super().__init__(matrix)
        self.products, self.expected = 0, []

    def expect(self, products):
        self.expected.append(products)

    def matmat(self, V):
        self.products += V.shape[1]
        return super().matmat(V)


def w1(density, eigenvalues):
    nodes = density.nodes.reshape(-1).numpy()
    return wasserstein_distance(nodes, eigenvalues.numpy(), density.weights.reshape(-1).numpy())


@pytest.mark.parametrize("name", SPECTRA)
def test_deflated_values_are_nodes_and_the_rest_is_the_quadrature_of_the_complement(name):
    A = symmetric(SPECTRA[name])
    op = Counted(A)
    density = spectral_density(op, num_steps=8, num_probes=3, deflate=4, seed=5)
    known = leading_subspace(DenseOperator(A), 4, seed=5)
    K = len(known)
    torch.testing.assert_close(density.deflated, known.values)
    torch.testing.assert_close(density.deflated_residuals, known.residuals)
    assert density.coupling == pytest.approx(2 * known.coupling / N)
    assert density.products == op.products == known.products + 24
    assert len(op.expected) == 1
    assert density.nodes.shape == density.weights.shape == (3, K + 8)
    torch.testing.assert_close(density.weights.sum(1), torch.ones(3, dtype=torch.float64))
    assert bool((density.nodes.diff(dim=1) >= 0).all())
    P = torch.eye(N).double() - known.vectors.T @ known.vectors
    V = rademacher(op, 3, random_generator(op, 5)) @ P
    V = V / V.norm(dim=1, keepdim=True)
    image = V
    for power in range(6):
        moments = (density.weights * density.nodes**power).sum(1)
        expected = (known.values**power).sum() / N + (N - K) / N * (V * image).sum(1)
        torch.testing.assert_close(moments, expected, rtol=1e-9, atol=1e-9)
        image = image @ P @ A @ P


def test_deflating_exact_vectors_gives_the_top_exactly():
    density = spectral_density(DenseOperator(symmetric(SPECTRA["outliers"])), num_steps=10, num_probes=4, deflate=4)
    for outlier in OUTLIERS.tolist():
        near = (density.nodes - outlier).abs() < 0.5
        assert near.sum(1).tolist() == [1] * 4
        torch.testing.assert_close(density.weights[near], torch.full((4,), 1 / N, dtype=torch.float64))
        assert float((density.nodes[near] - outlier).abs().max()) < 1e-2


@pytest.mark.parametrize("name", SPECTRA)
def test_deflated_mean_is_unbiased_and_its_error_honest(name):
    op, truth = DenseOperator(symmetric(SPECTRA[name])), float(SPECTRA[name].double().mean())
    found = [spectral_density(op, num_steps=3, num_probes=4, deflate=4, seed=seed).mean() for seed in range(200)]
    errors = np.array([f.estimate - truth for f in found])
    stderrs = np.array([f.stderr for f in found])
    assert abs(errors.mean()) <= 3 * errors.std() / math.sqrt(200)
    assert (np.abs(errors) <= 3 * stderrs).sum() >= 190
    # Both are known to 5 % or better.
    assert np.linalg.norm(stderrs) == pytest.approx(np.linalg.norm(errors), rel=0.2)


def test_deflation_pays():
    """‖A‖_F falls from 14 to 2.8 with the outliers, and the probes' share of the mean's error with it."""
    op = DenseOperator(symmetric(SPECTRA["outliers"]))
    plain = spectral_density(op, num_steps=10, num_probes=6)
    less = spectral_density(op, num_steps=10, num_probes=4, deflate=4)
    assert less.products <= plain.products
    assert less.mean().stderr < plain.mean().stderr / 3
    assert less.w1_stderr() < plain.w1_stderr() / 2


def test_moments_shares_and_grids_of_a_deflated_density():
    eigenvalues = SPECTRA["decaying"].double()
    density = spectral_density(DenseOperator(symmetric(eigenvalues)), num_steps=15, num_probes=12, deflate=6)
    for power in (0, 1, 2, 3):
        found, truth = density.moment(power), float((eigenvalues**power).mean())
        assert abs(found.estimate - truth) <= 4 * found.stderr + 6 * density.coupling * 5 ** (power - 1) + 1e-12
    share = density.weight_below(1.0)
    assert share.estimate == pytest.approx(float((eigenvalues <= 1).double().mean()), abs=0.03)
    x = density.grid(2000)
    smooth, band = density.on_grid(x)
    assert float(torch.trapezoid(smooth, x)) == pytest.approx(1, abs=1e-6)
    assert bool((band > 0).any())


def test_wasserstein_distances_are_scipys():
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    shares, others = torch.rand(2, 5, dtype=torch.float64), torch.rand(9, dtype=torch.float64)
    shares, others = shares / shares.sum(), others / others.sum()
    expected = wasserstein_distance(a.reshape(-1), b, shares.reshape(-1), others)
    assert w1_distance(a, shares, b, others) == pytest.approx(expected, rel=1e-12)
    assert w1_distance(b, others, a, shares) == pytest.approx(expected, rel=1e-12)
    assert w1_distance(b, others, b + 0.3, others) == pytest.approx(0.3)


def test_standard_error_in_wasserstein_distance_is_its_formula():
    """Probes at 0 and at 1: |F₁ − F₂| is 1 between, so the standard error is s / √2 = 1/2 over a length of 1."""
    nodes, weights = torch.tensor([[0.0], [1.0]]).double(), torch.ones(2, 1, dtype=torch.float64)
    density = SpectralDensity(nodes, weights, 0.0, False, 2, 0.0, resolution=0.25)
    assert density.w1_stderr() == pytest.approx(0.5)
    assert density.w1_error() == pytest.approx(0.75)
    assert SpectralDensity(nodes[:1], weights[:1], 0.0, False, 1, 0.0).w1_stderr() == math.inf
    assert SpectralDensity(nodes[:1], weights[:1], 0.0, True, 1, 0.0).w1_error() == 0.0


@pytest.mark.parametrize("name", SPECTRA)
def test_distance_falls_with_the_steps_and_the_stated_error_covers_it(name):
    eigenvalues = SPECTRA[name].double()
    op, seen = DenseOperator(symmetric(eigenvalues)), []
    for steps in (6, 12, 24, 48):
        found = [spectral_density(op, num_steps=steps, num_probes=6, deflate=2, seed=seed) for seed in range(5)]
        seen.append(np.mean([w1(d, eigenvalues) for d in found]))
        assert sum(w1(d, eigenvalues) <= d.w1_error() for d in found) >= 4
    assert seen[0] > seen[1] > seen[2]
    assert seen[3] < 1.1 * seen[2]


@pytest.mark.parametrize(("tol", "deflate"), [(0.03, 4), (0.012, 0), (0.012, 4)])
@pytest.mark.parametrize("name", SPECTRA)
def test_tolerance_is_honoured(name, tol, deflate):
    # Copies of a spectrum, so that forming the matrix is no way out.
    eigenvalues = SPECTRA[name].double().repeat(6)
    op, radius, hits = DiagonalRotated(eigenvalues), float(eigenvalues.abs().max()), 0
    for seed in range(20):
        op.products = 0
        found = spectral_density(op, tol=tol, deflate=deflate, seed=seed)
        assert not found.exact
        assert found.converged
        assert found.w1_error() <= tol * found.radius()
        assert found.products == op.products <= 2000
        hits += w1(found, eigenvalues) <= tol * radius
    assert hits >= 18


class DiagonalRotated(DiagonalOperator):
    """D conjugated with a Householder reflection: dense, with cheap products."""

    def __init__(self, d):
        super().__init__(d)
        self._u = torch.randn(len(d), dtype=d.dtype, generator=torch.Generator().manual_seed(8))
        self._u /= self._u.norm()
        self.products = 0

    def matmat(self, V):
        self.products += V.shape[1]
        return self._reflect(super().matmat(self._reflect(V)))

    def _reflect(self, V):
        return V - 2 * torch.outer(self._u, self._u @ V)


def test_a_tighter_tolerance_takes_more_products():
    op = DiagonalRotated(SPECTRA["indefinite"].double().repeat(6))
    spent = [spectral_density(op, tol=tol).products for tol in (0.05, 0.01, 0.004)]
    assert spent[0] < spent[1] < spent[2]


def test_a_tolerance_out_of_reach_is_said():
    op = DiagonalRotated(SPECTRA["indefinite"].double().repeat(6))
    with pytest.warns(NotConvergedWarning, match="raise `max_products`"):
        found = spectral_density(op, tol=1e-4, max_products=150)
    assert not found.converged
    assert found.products <= 150
    with pytest.warns(NotConvergedWarning):
        fixed = spectral_density(op, tol=0.004, num_steps=10)
    assert fixed.nodes.shape[1] - len(fixed.deflated) == 10
    with pytest.warns(NotConvergedWarning):
        assert len(spectral_density(op, tol=0.004, num_probes=4, max_products=400).nodes) == 4


def test_a_small_matrix_is_formed_where_that_is_cheaper():
    op = Counted(symmetric(SPECTRA["indefinite"]))
    found = spectral_density(op, tol=1e-6)
    assert found.exact
    assert found.products == op.products
    assert w1(found, SPECTRA["indefinite"].double()) < 1e-6
    assert spectral_density(DenseOperator(symmetric(torch.linspace(0, 1, 60))), tol=0.1).products == 60


def test_without_a_tolerance_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert spectral_density(DenseOperator(symmetric(SPECTRA["indefinite"])), num_steps=4, num_probes=2).converged


@pytest.mark.parametrize("deflate", [0, 4])
def test_a_rounded_basis_gives_the_same_density(deflate):
    eigenvalues = torch.cat([OUTLIERS, torch.randn(3000, generator=torch.Generator().manual_seed(0)) / 5])
    op = DiagonalRotated(eigenvalues)
    options = {"num_steps": 60, "num_probes": 3, "deflate": deflate}
    plain = spectral_density(op, **options)
    rounded = spectral_density(op, basis_dtype=torch.float16, **options)
    assert plain.orthogonality < 1e-6 < rounded.orthogonality < 2e-4
    assert w1(rounded, eigenvalues.double()) == pytest.approx(w1(plain, eigenvalues.double()), rel=0.02)
    assert rounded.mean().estimate == pytest.approx(plain.mean().estimate, abs=1e-5)
    assert rounded.mean_stderr == pytest.approx(plain.mean_stderr, rel=1e-3)
    for value in OUTLIERS.tolist():
        assert ((rounded.nodes - value).abs() < 0.3).sum(1).tolist() == [1, 1, 1]


def test_the_basis_is_rounded_where_memory_is_short(monkeypatch):
    chosen = []
    run = __import__("sharpscope.hessian.lockstep", fromlist=["batched_lanczos"]).batched_lanczos

    def watched(*args, **options):
        chosen.append(options["basis_dtype"])
        return run(*args, **options)

    monkeypatch.setattr("sharpscope.hessian.lockstep.batched_lanczos", watched)
    monkeypatch.setattr("sharpscope.hessian.lockstep.SMALL_BASIS", 0)
    d = torch.linspace(-1, 1, 3000)
    one_run = 24 * 4 * 3000  # 20 vectors and four beside
    for dtype, free in ((torch.float32, 2 * one_run + 8), (torch.float32, 2 * one_run - 8), (torch.float64, one_run)):
        monkeypatch.setattr("sharpscope.hessian.lockstep.available_bytes", lambda _, free=free: free)
        spectral_density(DiagonalOperator(d.to(dtype)), num_steps=20, num_probes=1)
    assert chosen == [None, torch.float16, None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": 0.0}, "`tol` is 0.0"),
        ({"tol": math.nan}, "`tol` is nan"),
        ({"tol": 0.1, "num_probes": 1}, "`num_probes` is 1"),
        ({"tol": 0.1, "num_steps": 1}, "`num_steps` is 1"),
        ({"max_products": 100}, "`max_products` is 100 without `tol`"),
        ({"tol": 0.1, "max_products": 0}, "`max_products` is 0"),
        ({"deflate": -2}, "`deflate` is -2"),
        ({"deflate": 3000}, "only n = 3000"),
        ({"basis_dtype": torch.bfloat16}, "`basis_dtype` is torch.bfloat16"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        spectral_density(DiagonalOperator(torch.linspace(0, 1, 3000)), **options)
