"""What a Lanczos run from a random start proves about eigenvalues that it has not found.

Let v be a unit eigenvector with eigenvalue μ, and p_i the orthonormal polynomials of the run. The Lanczos vectors
have the components p_i(μ) (vᵀq₁) along v, whose squares sum to at most 1. A random start has |vᵀq₁| ≥ δ/√n with
probability 1 − 0.8 δ, so every μ with Σ_i p_i(μ)² > n/δ² is then excluded. Beyond the Ritz values the sum grows with
every step like the error of a Krylov method falls.

Source: van Dorsselaer, Hochstenbach, van der Vorst, Computing probabilistic bounds for extreme eigenvalues of
symmetric matrices with the Lanczos method, SIAM J. Matrix Anal. Appl. 22, 2001, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BISECTIONS = 30


def excludes(alpha: Sequence[float], beta: Sequence[float], mu: float, needed: float) -> bool:
    """Σ_i p_i(μ)² ≥ needed, for a run with diagonal `alpha` [k] and remainders `beta` [k], the last one included.

    A last remainder of 0 ended the run: it saw everything, and excludes all but its own Ritz values.
    """
    total, before, now, b = 1.0, 0.0, 1.0, 0.0
    for a, b_next in zip(alpha, beta, strict=True):
        if b_next == 0.0:
            return True
        before, now = now, ((mu - a) * now - b * before) / b_next
        b = b_next
        total += now * now
        if total >= needed:
            return True
    return False


def upper_bound(alpha: Sequence[float], beta: Sequence[float], limit: float, needed: float) -> float | None:
    """The least μ beyond the Ritz values from which on all is excluded, if it is below `limit`; else None."""
    low = float(torch.linalg.eigvalsh(tridiagonal(alpha, beta))[-1])
    if low >= limit or not excludes(alpha, beta, limit, needed):
        return None
    high = limit
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if excludes(alpha, beta, middle, needed):
            high = middle
        else:
            low = middle
    return high


def tridiagonal(alpha: Sequence[float], beta: Sequence[float]) -> Tensor:
    """The matrix T [k, k] of a run with diagonal `alpha` [k] and remainders `beta` [k], the last one left out."""
    off = torch.tensor(beta[:-1], dtype=torch.float64)
    return torch.diag(torch.tensor(alpha, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)


def coupling_strength(theta: Tensor, coupling: Tensor, mu: float) -> float:
    """‖C (μ − Θ)^{-1/2}‖², for Ritz values θ [k] < μ of one subspace and its coupling C [r, k] to the complement.

    If the complement has no eigenvalue above μ_c, the two together have none above μ where this is at most μ − μ_c
    (Schur complement).
    """
    if coupling.numel() == 0:
        return 0.0
    distance = mu - theta
    if float(distance.min()) <= 0.0:
        return math.inf
    return float(torch.linalg.matrix_norm(coupling / distance.sqrt(), ord=2)) ** 2
