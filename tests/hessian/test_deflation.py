"""Leading subspaces: the identities that hold for any, the bounds that they state, what they cost."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from sharpscope.hessian.deflation import Complement, leading_subspace, products_for
from sharpscope.hessian.operator import DenseOperator, DiagonalOperator

N = 300
SPECTRA = {
    "outliers": torch.cat([torch.tensor([10.0, 8, 5, -3]), 0.2 * torch.sin(torch.arange(N - 4.0))]),
    "decaying": 0.9 ** torch.arange(float(N)),
    "indefinite": torch.linspace(-3, 4, N),
}


def symmetric(eigenvalues, seed=0):
    torch.manual_seed(seed)
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    A = (Q * torch.as_tensor(eigenvalues, dtype=torch.float64)) @ Q.T
    return (A + A.T) / 2


class Counted(DenseOperator):
    def __init__(self, matrix, start=None):
        super().__init__(matrix)
        self.products, self._start = 0, start

    def start_vector(self):
        return self._start

    def matmat(self, V):
        self.products += V.shape[1]
        return super().matmat(V)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("max_products", [4, 12, None])
def test_numbers_are_those_of_the_dense_matrix(name, max_products):
    A = symmetric(SPECTRA[name])
    op = Counted(A)
    found = leading_subspace(op, 4, seed=1, max_products=max_products)
    U = found.vectors
    assert found.products == op.products <= (max_products or products_for(4, N))
    assert len(found) == len(U) >= 4
    torch.testing.assert_close(U @ U.T, torch.eye(len(U)).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(U @ A @ U.T, torch.diag(found.values), atol=1e-11, rtol=0)
    assert bool((found.values.abs().diff() <= 0).all())
    C = A @ U.T - U.T @ (U @ A @ U.T)
    torch.testing.assert_close(C.norm(dim=0), found.residuals, atol=1e-10, rtol=0)
    assert found.coupling == pytest.approx(float(torch.linalg.matrix_norm(C, "nuc")), abs=1e-9)
    assert found.square == pytest.approx(float((A @ U.T).square().sum()), rel=1e-10)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("max_products", [4, 12])
def test_split_keeps_the_trace_and_moves_the_density_by_no_more_than_stated(name, max_products):
    A = symmetric(SPECTRA[name])
    found = leading_subspace(DenseOperator(A), 4, seed=2, max_products=max_products)
    U, P = found.vectors, torch.eye(N).double() - found.vectors.T @ found.vectors
    rest = P @ A @ P
    assert float(found.values.sum() + rest.trace()) == pytest.approx(float(A.trace()), abs=1e-10)
    split = torch.linalg.eigvalsh(U.T @ torch.diag(found.values) @ U + rest)
    distance = wasserstein_distance(split.numpy(), SPECTRA[name].numpy())
    assert 0 < distance <= 2 * found.coupling / N + 1e-12


def test_complement_is_the_projected_matrix():
    A = symmetric(SPECTRA["indefinite"])
    found = leading_subspace(DenseOperator(A), 3, seed=0)
    P = torch.eye(N).double() - found.vectors.T @ found.vectors
    V = P @ torch.randn(N, 5, dtype=torch.float64)
    torch.testing.assert_close(Complement(DenseOperator(A), found) @ V, P @ A @ P @ V, atol=1e-11, rtol=0)
    Z = torch.randn(7, N, dtype=torch.float64)
    torch.testing.assert_close(found.project(Z), Z @ P, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_leading_pairs_are_found(dtype):
    A = symmetric(SPECTRA["outliers"])
    found = leading_subspace(DenseOperator(A.to(dtype)), 4, seed=3)
    torch.testing.assert_close(found.values[:4], torch.tensor([10.0, 8, 5, -3]).double(), atol=1e-2, rtol=0)
    assert bool((found.residuals[:4] <= 0.02 * 10.0 + 1e-5).all())
    assert found.products < 20


def test_start_vector_is_used_and_has_company():
    """The start is orthogonal to all leading eigenvectors but one; noise finds the others."""
    A = torch.diag(SPECTRA["outliers"].double())
    start = torch.zeros(N, dtype=torch.float64)
    start[1] = 1.0
    found = leading_subspace(Counted(A, start), 1, seed=0, max_products=1)
    assert float(found.vectors[0, 1]) ** 2 > 0.9
    assert float(leading_subspace(Counted(A, start), 4, seed=0).values[0]) == pytest.approx(10.0, abs=1e-2)


def test_short_memory_restarts(monkeypatch):
    A = symmetric(SPECTRA["decaying"])
    monkeypatch.setattr("sharpscope.hessian.deflation.available_bytes", lambda _: 0)
    found = leading_subspace(DenseOperator(A), 5, seed=0)
    assert 5 <= len(found) <= 20
    C = A @ found.vectors.T - found.vectors.T @ torch.diag(found.values)
    torch.testing.assert_close(C.norm(dim=0), found.residuals, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.values[:5], SPECTRA["decaying"][:5].double(), atol=1e-2, rtol=0)


def test_noise_is_independent_of_the_probes_of_that_seed():
    op, seeds = DiagonalOperator(torch.zeros(4000)), range(40)
    products = []
    for seed in seeds:
        u = leading_subspace(op, 1, seed=seed).vectors[0]
        generator = torch.Generator().manual_seed(seed)
        products.append(float(u @ torch.randn(4000, generator=generator)))
    assert np.linalg.norm(products) / math.sqrt(40) == pytest.approx(1, rel=0.5)
    assert len({round(p, 6) for p in products}) == 40


def test_an_invariant_space_ends_the_run():
    d = torch.cat([torch.full((200,), 1.0), torch.full((100,), -2.0)]).double()
    found = leading_subspace(DiagonalOperator(d), 5, seed=0)
    assert found.products == 2
    torch.testing.assert_close(found.values, torch.tensor([-2.0, 1.0]).double())
    assert found.coupling < 1e-12


@pytest.mark.parametrize(
    ("num", "dtype", "message"),
    [
        (-1, torch.float32, "`deflate` is -1"),
        (2.0, torch.float32, "`deflate` is 2.0"),
        (True, torch.float32, "`deflate` is True"),
        (50, torch.float32, "only n = 50"),
        (3, torch.bfloat16, "too coarse"),
    ],
)
def test_bad_numbers(num, dtype, message):
    with pytest.raises(ValueError, match=message):
        leading_subspace(DiagonalOperator(torch.ones(50, dtype=dtype)), num, seed=0)


def test_not_finite_is_said():
    with pytest.raises(ValueError, match="NaN or infinite"):
        leading_subspace(DiagonalOperator(torch.full((50,), math.nan)), 3, seed=0)
