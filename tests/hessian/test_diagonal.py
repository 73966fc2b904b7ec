"""Diagonal estimates and the stated error of every entry."""

import math

import pytest
import torch
from sharpscope.hessian.diagonal import diagonal
from sharpscope.hessian.operator import DenseOperator, DiagonalOperator

N = 90


def symmetric(eigenvalues, seed=0):
    torch.manual_seed(seed)
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    A = (Q * torch.as_tensor(eigenvalues, dtype=torch.float64)) @ Q.T
    return (A + A.T) / 2


SPECTRA = {
    "decaying": 0.8 ** torch.arange(float(N)),
    "indefinite": torch.linspace(-3, 4, N),
    "flat": torch.linspace(1, 3, N),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("num_probes", [12, 40])
def test_nearly_all_entries_lie_within_three_standard_errors(name, num_probes, dtype):
    A = symmetric(SPECTRA[name])
    op = DenseOperator(A.to(dtype))
    shares = []
    for seed in range(30):
        found = diagonal(op, num_probes=num_probes, seed=seed)
        assert found.products == num_probes
        assert found.estimate.dtype == found.stderr.dtype == dtype
        shares.append(((found.estimate - A.diagonal()).abs() <= 3 * found.stderr).double().mean())
    assert float(torch.stack(shares).mean()) > 0.97
    assert float(torch.stack(shares).min()) > 0.9


def test_errors_have_their_closed_form():
    A = symmetric(SPECTRA["indefinite"])
    off = A - A.diag().diag()
    for num_probes in (10, 40):
        found = [diagonal(DenseOperator(A), num_probes=num_probes, seed=seed) for seed in range(100)]
        errors = torch.stack([e.estimate for e in found]) - A.diagonal()
        stated = torch.stack([e.stderr for e in found])
        expected = off.square().sum(1) / num_probes
        # Each entry's mean square over 100 seeds scatters by √(2/100); the mean over 90 entries by a tenth of that.
        assert float((errors.square().mean(0) / expected).mean()) == pytest.approx(1, abs=0.06)
        assert float((stated.square().mean(0) / expected).mean()) == pytest.approx(1, abs=0.06)


def test_a_diagonal_matrix_is_exact_within_the_stated_rounding():
    d = torch.randn(500) * torch.logspace(-3, 3, 500)
    found = diagonal(DiagonalOperator(d), num_probes=3)
    assert bool(((found.estimate - d).abs() <= 3 * found.stderr).all())
    assert float(found.stderr.max()) < 1e-5 * float(d.abs().max())


def test_a_row_of_zeros_among_large_ones_has_the_error_of_the_products():
    A = symmetric(SPECTRA["flat"])
    A[5], A[:, 5] = 0.0, 0.0
    found = diagonal(DenseOperator(A.float()), num_probes=10)
    assert float(found.estimate[5]) == 0.0
    assert 0 < float(found.stderr[5]) < 1e-5


@pytest.mark.parametrize("n", [1, 2, 7])
def test_n_products_give_the_exact_diagonal(n):
    A = symmetric(torch.linspace(-1, 1, n))
    found = diagonal(DenseOperator(A), num_probes=max(n, 7))
    torch.testing.assert_close(found.estimate, A.diagonal())
    assert not bool(found.stderr.any())
    assert found.products == n


@pytest.mark.parametrize("num_probes", [0, -1])
def test_bad_counts(num_probes):
    with pytest.raises(ValueError, match=f"`num_probes` is {num_probes}"):
        diagonal(DiagonalOperator(torch.ones(5)), num_probes=num_probes)


def test_one_probe_is_refused_because_it_has_no_error():
    with pytest.raises(ValueError, match="at least 2"):
        diagonal(DiagonalOperator(torch.ones(5)), num_probes=1)


def test_nan_names_the_product():
    d = torch.ones(20)
    d[3] = math.nan
    with pytest.raises(ValueError, match="product 1 of DiagonalOperator"):
        diagonal(DiagonalOperator(d), num_probes=4)
