"""Frobenius norms and the coverage of their stated errors."""

import math

import pytest
import torch
from sharpscope.hessian.frobenius import frobenius_norm
from sharpscope.hessian.operator import DenseOperator, DiagonalOperator

SAMPLED = ["hutchinson", "xtrace"]
N = 90


def symmetric(eigenvalues, seed=0):
    torch.manual_seed(seed)
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    A = (Q * torch.as_tensor(eigenvalues, dtype=torch.float64)) @ Q.T
    return (A + A.T) / 2


SPECTRA = {
    "decaying": 0.8 ** torch.arange(float(N)),
    "outliers": torch.cat([torch.tensor([10.0, 8, 5, 4, 3, 2]), 0.05 * torch.sin(torch.arange(N - 6.0))]),
    "indefinite": torch.linspace(-3, 4, N),
    "flat": torch.linspace(1, 3, N),
}


def errors_and_stderrs(A, num_seeds=100, **options):
    op, truth = DenseOperator(A), float(torch.linalg.matrix_norm(A.double()))
    found = [frobenius_norm(op, seed=seed, **options) for seed in range(num_seeds)]
    assert all(e.products <= options["num_probes"] for e in found)
    return torch.tensor([e.estimate - truth for e in found]), torch.tensor([e.stderr for e in found])


def rms(x):
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("method", SAMPLED)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("num_probes", [12, 30])
def test_truth_lies_within_three_standard_errors(method, name, num_probes):
    errors, stderrs = errors_and_stderrs(symmetric(SPECTRA[name]), method=method, num_probes=num_probes)
    assert int((errors.abs() <= 3 * stderrs).sum()) >= 95
    assert rms(stderrs) < 6 * rms(errors)


@pytest.mark.parametrize("method", SAMPLED)
def test_float32_keeps_its_promise(method):
    A = symmetric(SPECTRA["outliers"]).float()
    errors, stderrs = errors_and_stderrs(A, num_seeds=40, method=method, num_probes=40)
    assert int((errors.abs() <= 3 * stderrs).sum()) >= 38


def test_hutchinson_falls_as_the_root_of_the_products():
    A = symmetric(SPECTRA["outliers"])
    # The delta method: √Var(‖A z‖²) / (2 ‖A‖_F), with Var ‖A z‖² = 2 (‖A²‖_F² − Σ (A²)_ii²) for one product.
    square = A @ A
    variance = 2 * float((square - square.diag().diag()).square().sum())
    one = math.sqrt(variance) / (2 * float(torch.linalg.matrix_norm(A)))
    for num_probes in (16, 64):
        errors, _ = errors_and_stderrs(A, num_seeds=200, method="hutchinson", num_probes=num_probes)
        assert rms(errors) == pytest.approx(one / math.sqrt(num_probes), rel=0.15)


def test_a_sketch_pays_where_outliers_carry_the_norm():
    A = symmetric(SPECTRA["outliers"])
    plain, _ = errors_and_stderrs(A, num_seeds=20, method="hutchinson", num_probes=20)
    sketched, _ = errors_and_stderrs(A, num_seeds=20, method="xtrace", num_probes=20)
    assert rms(sketched) < rms(plain) / 100


@pytest.mark.parametrize("method", [*SAMPLED, "exact"])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_n_products_give_the_exact_norm(method, n):
    A = symmetric(torch.linspace(-1, 2, n))
    found = frobenius_norm(DenseOperator(A), method=method, num_probes=max(n, 9))
    assert found.estimate == pytest.approx(float(torch.linalg.matrix_norm(A)), rel=1e-12)
    assert (found.stderr, found.products) == (0.0, n)


@pytest.mark.parametrize("method", SAMPLED)
def test_zero_operator(method):
    found = frobenius_norm(DiagonalOperator(torch.zeros(100)), method=method, num_probes=10)
    assert (found.estimate, found.stderr) == (0.0, 0.0)


def test_samples_are_those_of_the_square():
    found = frobenius_norm(DenseOperator(symmetric(SPECTRA["flat"])), num_probes=20)
    assert found.estimate == pytest.approx(math.sqrt(float(found.samples.mean())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "hutch++"}, "did you mean 'hutchinson'"),
        ({"num_probes": 0}, "`num_probes` is 0"),
        ({"num_probes": 3}, "xtrace needs at least 4"),
        ({"num_probes": 1, "method": "hutchinson"}, "hutchinson needs at least 2"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        frobenius_norm(DiagonalOperator(torch.ones(50)), **options)


def test_nan_names_the_product():
    with pytest.raises(ValueError, match="product 1 of DiagonalOperator"):
        frobenius_norm(DiagonalOperator(torch.full((20,), math.nan)), num_probes=8)
