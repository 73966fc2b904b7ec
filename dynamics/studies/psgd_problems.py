"""Functions whose inverse Hessian lies in one of PSGD's groups, and Rosenbrock's."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def x_shaped_hessian(n: int, condition: float, seed: int, *, indefinite: bool = False) -> Tensor:
    """A symmetric matrix [n, n], n even, with entries on the diagonal and the antidiagonal only.

    The absolute eigenvalues are equally spaced in the logarithm from 1 to `condition`, in random order; the 2 × 2 block
    on coordinates k and n − 1 − k is turned by a random angle. Indefinite: every block has one negative eigenvalue.
    """
    draw = torch.Generator().manual_seed(seed)
    values = torch.logspace(0, math.log10(condition), n, dtype=torch.float64)[torch.randperm(n, generator=draw)]
    angles = 2 * math.pi * torch.rand(n // 2, dtype=torch.float64, generator=draw)
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for k in range(n // 2):
        c, s = torch.cos(angles[k]), torch.sin(angles[k])
        one, other = values[2 * k] * (-1 if indefinite else 1), values[2 * k + 1]
        i = n - 1 - k
        matrix[k, k], matrix[i, i] = c * c * one + s * s * other, s * s * one + c * c * other
        matrix[k, i] = matrix[i, k] = c * s * (one - other)
    return matrix


def low_rank_hessian(n: int, rank: int, seed: int) -> Tensor:
    """diag(0.5 … 1.5) + W Wᵀ with W [n, rank] standard normal."""
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(n, rank, dtype=torch.float64, generator=draw)
    return torch.diag(0.5 + torch.rand(n, dtype=torch.float64, generator=draw)) + W @ W.T


def absolute_inverse(matrix: Tensor, noise: float = 0.0) -> Tensor:
    """(A² + noise² I)^(-1/2) for a symmetric A [n, n]: |A|⁻¹ without noise."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * (values.square() + noise**2).rsqrt()) @ vectors.T


def square_root(matrix: Tensor) -> Tensor:
    """The positive definite root of a positive definite matrix [n, n]."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.sqrt()) @ vectors.T


def rosenbrock(x: Tensor) -> Tensor:
    """Σ (1 − x_{2i})² + 100 (x_{2i+1} − x_{2i}²)² for x [n], n even; n / 2 at 0, 0 at ones."""
    even, odd = x[0::2], x[1::2]
    return ((1 - even).square() + 100 * (odd - even.square()).square()).sum()
