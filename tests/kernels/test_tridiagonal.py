"""Quadrature rules against closed forms and SciPy."""

import numpy as np
import pytest
import scipy.linalg
import torch
from sharpscope.kernels.tridiagonal import tridiagonal_quadrature


def _random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k = shape[-1]
    alpha = torch.randn(shape, generator=generator, dtype=torch.float64)
    beta = torch.rand((*shape[:-1], k - 1), generator=generator, dtype=torch.float64) + 0.1
    return alpha, beta


def test_legendre_coefficients_give_gauss_legendre():
    k = 12
    i = torch.arange(1, k, dtype=torch.float64)
    nodes, weights = tridiagonal_quadrature(torch.zeros(k), i / (4 * i**2 - 1).sqrt())
    points, masses = np.polynomial.legendre.leggauss(k)
    assert np.allclose(nodes, points, atol=1e-14)
    assert np.allclose(weights, masses / 2, atol=1e-14)  # as a probability measure


def test_moments_are_those_of_the_first_basis_vector():
    """Σ w θ^p = e₁ᵀ T^p e₁."""
    alpha, beta = _random(7)
    nodes, weights = tridiagonal_quadrature(alpha, beta)
    T = torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1)
    for power in range(6):
        moment = torch.linalg.matrix_power(T, power)[0, 0]
        assert float((weights * nodes**power).sum()) == pytest.approx(float(moment), rel=1e-12, abs=1e-12)


def test_a_batch_is_its_members_and_agrees_with_scipy():
    alpha, beta = _random(2, 3, 9)
    nodes, weights = tridiagonal_quadrature(alpha, beta)
    assert nodes.shape == weights.shape == (2, 3, 9)
    for at in np.ndindex(2, 3):
        values, vectors = scipy.linalg.eigh_tridiagonal(alpha[at].numpy(), beta[at].numpy())
        assert np.allclose(nodes[at], values, atol=1e-13)
        assert np.allclose(weights[at], vectors[0] ** 2, atol=1e-13)


def test_padding_counts_for_nothing():
    alpha, beta = _random(4, 6)
    lengths = torch.tensor([6, 1, 4, 4])
    for row, size in enumerate(lengths.tolist()):
        alpha[row, size:], beta[row, max(size - 1, 0) :] = torch.nan, torch.nan
    nodes, weights = tridiagonal_quadrature(alpha, beta, lengths)
    for row, size in enumerate(lengths.tolist()):
        alone = tridiagonal_quadrature(alpha[row, :size], beta[row, : size - 1])
        assert torch.allclose(nodes[row, :size], alone[0], atol=1e-14)
        assert torch.allclose(weights[row, :size], alone[1], atol=1e-14)
        assert (nodes[row, size:] == nodes[row, size - 1]).all()
        assert (weights[row, size:] == 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(4, dtype=torch.float64), atol=1e-14)


def test_one_step_is_one_node():
    nodes, weights = tridiagonal_quadrature(torch.tensor([2.5]), torch.empty(0))
    assert (nodes.tolist(), weights.tolist()) == ([2.5], [1.0])
    assert nodes.dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3), torch.ones(3)), r"`alpha` has shape \[3\] and `beta` \[3\]"),
        ((torch.tensor(1.0), torch.ones(0)), r"must be \[..., k\]"),
        ((torch.ones(2, 3), torch.ones(2, 2), torch.tensor([3])), r"`lengths` has shape \[1\]"),
        ((torch.ones(2, 3), torch.ones(2, 2), torch.tensor([0, 3])), "runs from 0 to 3; each must be 1 to k = 3"),
        ((torch.ones(2, 3), torch.ones(2, 2), torch.tensor([1, 4])), "runs from 1 to 4"),
        ((torch.ones(2, 3), torch.ones(2, 2), torch.tensor([1.0, 3.0])), "`lengths` is torch.float32; it must be int"),
        ((torch.ones(3), torch.ones(2, device="meta")), "`beta` is on meta and `alpha` on cpu"),
        ((torch.tensor([1.0, torch.nan]), torch.ones(1)), "NaN or infinite"),
        ((torch.ones(2, 3), torch.tensor([[1.0, 1], [torch.inf, 1]])), "NaN or infinite"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tridiagonal_quadrature(*arguments)
