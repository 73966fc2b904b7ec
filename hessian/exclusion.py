"""What a Lanczos run from a random start proves about eigenvalues that it has not found.

Let v be a unit eigenvector with eigenvalue μ, and p_i the orthonormal polynomials of the run. The Lanczos vectors
have the components p_i(μ) vᵀq₁ along v, whose squares sum to at most 1. A random start has |vᵀq₁| ≥ δ/√n with
probability 1 − 0.8 δ, so every μ with Σ_i p_i(μ)² > n/δ² is then excluded. Beyond the Ritz values the sum grows with
every step as the error of a Krylov method falls.

Source: van Dorsselaer, Hochstenbach, van der Vorst, Computing probabilistic bounds for extreme eigenvalues of
symmetric matrices with the Lanczos method, SIAM J. Matrix Anal. Appl. 22, 2001.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

BISECTIONS = 30


@dataclass(frozen=True)
class RandomRun:
    """Coefficients of k Lanczos steps from a random start, that exclude what the start would have shown.

    Attributes:
        needed: n/δ², the value of Σ_i p_i(μ)² from which on μ is excluded.
        alpha: Diagonal of T [k].
        beta: Remainders [k], the last one beyond T. A 0 ends the run: it has seen everything there is.
    """

    needed: float
    alpha: list[float] = field(default_factory=list)
    beta: list[float] = field(default_factory=list)

    @property
    def has_ended(self) -> bool:
        return self.beta[-1] == 0.0

    def mirrored(self) -> RandomRun:
        """The same run for −A."""
        return RandomRun(self.needed, [-a for a in self.alpha], self.beta)

    def ritz_values(self) -> list[float]:
        """Descending."""
        off = torch.tensor(self.beta[:-1], dtype=torch.float64)
        T = torch.diag(torch.tensor(self.alpha, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
        return torch.linalg.eigvalsh(T).flip(0).tolist()

    def excludes(self, mu: float) -> bool:
        """No eigenvalue is at μ, nor further out if μ lies beyond the Ritz values."""
        total, before, now, b = 1.0, 0.0, 1.0, 0.0
        for a, b_next in zip(self.alpha, self.beta, strict=True):
            if b_next == 0.0:
                return True
            before, now = now, ((mu - a) * now - b * before) / b_next
            b = b_next
            total += now * now
            if total >= self.needed:
                return True
        return False

    def last_squares(self, mu: Sequence[float]) -> np.ndarray:
        """p_k(μ)² for each μ, k the number of steps; infinite where the run has ended.

        All zeros of p_k are Ritz values, so log p_k² is concave between two of them: an interval without Ritz values
        is excluded if both its ends are.
        """
        at, before, b = np.asarray(mu, dtype=np.longdouble), np.longdouble(0.0), 0.0
        now = np.ones_like(at)
        with np.errstate(all="ignore"):
            for a, b_next in zip(self.alpha, self.beta, strict=True):
                if b_next == 0.0:
                    return np.full_like(at, np.inf)
                before, now = now, ((at - a) * now - b * before) / b_next
                b = b_next
            return np.nan_to_num(now * now, nan=np.inf, posinf=np.inf)

    def excludes_all_but(self, found: Sequence[float], edges: Sequence[tuple[int, float]], margin: float) -> bool:
        """Every eigenvalue beyond the edges is within `margin` of a found one, or of the edge itself.

        Copies of found ones, and what lies as close to them, are not excluded.

        Args:
            found: The outermost Ritz values, all that lie beyond the edges.
            edges: Pairs (sign, edge): λ is beyond it if sign · λ > edge.
            margin: Positive distance.
        """
        ends: list[float] = []
        for sign, edge in edges:
            inward = sorted({edge, *(sign * value for value in found if sign * value > edge)}, reverse=True)
            ends.append(sign * (inward[0] + margin))
            for outer, inner in itertools.pairwise(inward):
                if outer - inner > 2 * margin:
                    ends += [sign * (outer - margin), sign * (inner + margin)]
        return bool((self.last_squares(ends) >= self.needed).all())

    def upper_bound(self, limit: float) -> float | None:
        """The least μ beyond the Ritz values from which on all is excluded; None if that is not below `limit`."""
        low, high = self.ritz_values()[0], limit
        if low >= limit or not self.excludes(limit):
            return None
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if self.excludes(middle):
                high = middle
            else:
                low = middle
        return high


def lift(theta: Tensor, coupling: Tensor, mu: float) -> float:
    """‖C (μ − Θ)^{-1/2}‖², for Ritz values θ [k] < μ of a subspace and its coupling C [p, k] to the complement.

    If the complement has no eigenvalue above some ν < μ, then the two together have none above μ as long as this is
    at most μ − ν: the Schur complement stays definite.
    """
    if coupling.numel() == 0:
        return 0.0
    if float(theta.max()) >= mu:
        return math.inf
    return float(torch.linalg.matrix_norm(coupling / (mu - theta).sqrt(), ord=2)) ** 2
