r"""The algebra of leave-one-out estimates from a sketch, in matrices no larger than the number of probes.

Sizes: n rows of A, k probes ω_i, r ≤ k orthonormal rows of the sketch Q (r = k unless A has rank below k).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class LeaveOneOut:
    """The mean of `samples` [k], which share their probes and so are not independent, and its error."""

    samples: Tensor
    stderr: float


class Removed(NamedTuple):
    """What is left without some of the probes: the probes kept, and for each the sketch of the others.

    kept [j]; S [r, j], the direction of Q that the sketch of the others lacks; X [r, j], the coordinates of Qᵀ Q ω in
    that sketch; scale [j], the resphering factor; trace and squared_norm, of A on the sketch of all kept probes.
    """

    kept: Tensor
    S: Tensor
    X: Tensor
    scale: Tensor
    trace: Tensor
    squared_norm: Tensor


@dataclass(frozen=True)
class Gram:
    r"""All inner products of the probes Ω, their images A Ω = Qᵀ R, the sketch Q and its image A Q, in float64.

    With Gaussian probes and Q_(i) a basis of the images of all probes but the i-th,

        t_i = tr(Q_(i) A Q_(i)ᵀ) + ω̃_iᵀ A ω̃_i,    ω̃_i = √d P_i ω_i / ‖P_i ω_i‖,    P_i = I − Q_(i)ᵀ Q_(i)

    with d = rank P_i is unbiased for tr A, because ω_i is independent of Q_(i) and so the direction of P_i ω_i is
    uniform in its space. Likewise f_i = ‖A Q_(i)ᵀ‖_F² + ‖A ω̃_i‖² for ‖A‖_F². All k of them follow from matrices
    [k, k], because Q_(i) spans Q without the direction s_i ∝ R⁻ᵀ e_i.

    Args:
        n: Rows of A.
        W: Q Ω, shape [r, k].
        R: Q A Ω, shape [r, k].
        H: Q A Qᵀ, shape [r, r].
        Z: Q A A Qᵀ, shape [r, r].
        lengths: ‖ω_i‖² [k].
        relative_rounding: Of the vectors behind the inner products.

    Source: Epperly, Tropp and Webber, XTrace: Making the Most of Every Sample in Stochastic Trace Estimation, 2024, in
    the variant with normalised test vectors.
    """

    n: int
    W: Tensor
    R: Tensor
    H: Tensor
    Z: Tensor
    lengths: Tensor
    relative_rounding: float

    def trace(self) -> LeaveOneOut:
        """tr A; the error is the larger of `jackknife` and `residual_stderr`."""
        stderr = max(self.jackknife(self._traces), self._residual_stderr())
        return LeaveOneOut(self._traces(self.without()), stderr)

    def frobenius(self) -> float:
        """‖A‖_F, without its error."""
        return math.sqrt(float(self._squared_norms(self.without()).mean()))

    def squared_norm(self) -> LeaveOneOut:
        """‖A‖_F²; the error is the larger of `jackknife` and what pairs of residual images imply."""
        stderr = max(self.jackknife(self._squared_norms), self._image_stderr())
        return LeaveOneOut(self._squared_norms(self.without()), stderr)

    def jackknife(self, samples: Callable[[Removed], Tensor]) -> float:
        """Standard error of a mean of leave-one-out samples, from the means without each of the probes.

        By the Efron-Stein inequality its square overstates the variance of the estimate from k − 1 probes on average.
        s/√k understates it, by up to a half where A decays, because the samples share probes.

        Source: Epperly and Tropp, Efficient Error and Variance Estimation for Randomized Matrix Computations, 2024.
        """
        k = self.R.shape[1]
        means = torch.stack([samples(self.without(i)).mean() for i in range(k)])
        return math.sqrt((k - 1) / k * float((means - means.mean()).square().sum()))

    def without(self, removed: int | None = None) -> Removed:
        """The leave-one-out sketches of all probes, or of all but one."""
        r, k = self.R.shape
        kept = torch.tensor([i for i in range(k) if i != removed])
        lost = self._duals[:, [removed]] if removed is not None else self._duals[:, :0]  # [r, 0 or 1]
        S = self._duals[:, kept]
        for _ in range(2):
            S = S - lost @ (lost.T @ S)
        S = S / torch.linalg.vector_norm(S, dim=0).clamp(min=torch.finfo(S.dtype).tiny)
        W = self.W[:, kept]
        X = W - lost @ (lost.T @ W)
        X = X - S * _columnwise(S, X)
        inside = r - (kept.numel() < k) - 1 if r == k else r
        scale = (self.n - inside) / (self.lengths[kept] - _columnwise(X, X))
        trace = self.H.trace() - (lost.T @ self.H @ lost).trace()
        squared_norm = self.Z.trace() - (lost.T @ self.Z @ lost).trace()
        return Removed(kept, S, X, scale, trace, squared_norm)

    @cached_property
    def _duals(self) -> Tensor:
        """Unit vectors ∝ R⁻ᵀ e_i [r, k]: each orthogonal to the images of all the other probes.

        If A has rank below k, the images of the others span all there is, so nothing is lost with one of them: zeros.
        """
        r, k = self.R.shape
        if r < k:
            return torch.zeros_like(self.R)
        D = torch.linalg.solve_triangular(self.R.T, torch.eye(k, dtype=self.R.dtype), upper=False)
        return D / torch.linalg.vector_norm(D, dim=0)

    def _traces(self, m: Removed) -> Tensor:
        return m.trace - _columnwise(m.S, self.H @ m.S) + m.scale * self._forms(m)

    def _forms(self, m: Removed) -> Tensor:
        """(P_i ω_i)ᵀ A (P_i ω_i)."""
        R, W = self.R[:, m.kept], self.W[:, m.kept]
        return _columnwise(W, R) - 2 * _columnwise(m.X, R) + _columnwise(m.X, self.H @ m.X)

    def _squared_norms(self, m: Removed) -> Tensor:
        return m.squared_norm - _columnwise(m.S, self.Z @ m.S) + m.scale * self._image_lengths(m)

    def _image_lengths(self, m: Removed) -> Tensor:
        """‖A P_i ω_i‖²."""
        R = self.R[:, m.kept]
        lengths = _columnwise(R, R) - 2 * _columnwise(m.X, self.H @ R) + _columnwise(m.X, self.Z @ m.X)
        return lengths.clamp(min=0)

    def _residual_stderr(self) -> float:
        r"""Standard error from the variance 2d/(d + 2) (‖P_i A P_i‖_F² − tr(P_i A P_i)²/d) of one sample, over k.

        ‖P_i A ω̃_i‖² estimates the first term. It neglects that the samples share probes, but is steady where the
        jackknife is not: few probes and no decay.
        """
        m, k = self.without(), self.R.shape[1]
        d = self.n - (self.R.shape[0] - 1 if self.R.shape[0] == k else self.R.shape[0])
        inside = self.R - self.H @ m.X  # Q A P_i ω_i
        lengths = self._image_lengths(m) - _columnwise(inside, inside) + _columnwise(m.S, inside).square()
        rounding = self.relative_rounding * _columnwise(self.R, self.R)
        square = float((m.scale * (lengths - rounding).clamp(min=0)).mean())
        trace = float((m.scale * self._forms(m)).mean())
        return math.sqrt(2 * d / (d + 2) * max(square - trace**2 / d, 0.0) / k)

    def _image_stderr(self) -> float:
        """The like for ‖A P_i ω̃_i‖², with 2 ‖P_i A A P_i‖_F² estimated by (A ω̃_i · A ω̃_j)² of pairs of probes."""
        m, k = self.without(), self.R.shape[1]
        crossed = self.R.T @ self.R - m.X.T @ self.H @ self.R
        crossed = crossed - (self.R.T @ self.H @ m.X) + m.X.T @ self.Z @ m.X
        squares = crossed.square() * m.scale * m.scale.unsqueeze(1)
        return math.sqrt(2 * float(squares.sum() - squares.trace()) / (k * (k - 1)) / k)


def _columnwise(A: Tensor, B: Tensor) -> Tensor:
    """Inner products of the columns of A and B."""
    return (A * B).sum(0)
