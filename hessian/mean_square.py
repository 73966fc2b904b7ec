"""Mean-square stability of stochastic gradient descent near an optimum that fits every example."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from .batch_moments import BatchMoments
from .eigs import top_eigenvalues
from .operator import LinearOperator

# Up to this rank the map on matrices [k, k] is formed as a matrix [k², k²] and diagonalised.
DENSE_RANK = 24
# Vectors [k²] that Lanczos may hold.
BASIS_BYTES = 2 << 30


class MeanSquareStability:
    r"""When E‖w‖² grows under w ← w − η Ĥ w, with Ĥ = (1/B) Σ_{i in batch} H_i drawn anew at each step.

    The second moment X = E[w wᵀ] obeys

        T(X) = (I − ηH) X (I − ηH) + η² (c Σ_i H_i X H_i − p H X H),   H = (1/n) Σ_i H_i,

    with c and p of `BatchMoments`. T maps positive matrices to positive ones, so its spectral radius ρ is its largest
    eigenvalue; it is below 1 exactly for the learning rates below one threshold. All is restricted to the span of the
    ranges of the H_i, since w outside it never moves. In orthonormal coordinates of that span in which H is diagonal,
    one application of T costs O(n r k²) for its dimension k, whatever the number of parameters.

    Heavy-ball momentum: v ← β v + Ĥ w, w ← w − η v, as `torch.optim.SGD(momentum=β)`. Unnormalised SAM: w ← w − η
    (1/B) Σ_{i in batch} ∇ℓ_i(w + rho ∇ℓ_i(w)), which is SGD with H_i + rho H_i² in the place of H_i. Each example has
    its own perturbation: one perturbation by the mean gradient of a batch is the same for B = 1 only, and not covered
    for larger batches. Neither is the SAM that normalises its perturbation, which is not linear in w.

    Args:
        factors: F_i [n, k, r] in any orthonormal coordinates, H_i = F_i F_iᵀ; fill up smaller ranks with zeros.
        rank_tol: Directions in which H is at most this share of its largest eigenvalue count as outside of the span;
            None takes rounding in float64.

    Attributes:
        num_examples: n.
        eigenvalues: Of H, ascending, those above zero [k].
        coordinates: F_i in the eigenvectors of H [n, k, r].

    Raises:
        ValueError: `factors` is not [n, k, r] with finite numbers.

    Source: Dexter et al., A Precise Characterization of SGD Stability Using Loss Surface Geometry, 2024;
    Mulayoff and Michaeli, Exact Mean Square Linear Stability Analysis for SGD, 2024; momentum: derived here.
    """

    def __init__(self, factors: Tensor, *, rank_tol: float | None = None) -> None:
        self.check(factors)
        n, k, r = factors.shape
        flat = factors.double().transpose(0, 1).reshape(k, n * r)
        if k <= n * r:
            values, vectors = torch.linalg.eigh(flat @ flat.T)
            rows = vectors.T @ flat
        else:
            values, rows = _coordinates(flat.T @ flat)
        self._keep(values, rows, n, rank_tol)

    @staticmethod
    def check(factors: Tensor) -> None:
        """Raises a ValueError unless `factors` is [n, k, r] with finite numbers."""
        if not isinstance(factors, Tensor) or factors.ndim != 3 or factors.is_complex() or 0 in factors.shape:
            shape = list(factors.shape) if isinstance(factors, Tensor) else type(factors).__name__
            raise ValueError(f"`factors` is {shape}; give real F_i as one tensor [n, k, r]")
        if not bool(torch.isfinite(factors).all()):
            raise ValueError("`factors` holds numbers that are not finite; check the model at these weights")

    @classmethod
    def from_gram(cls, gram: Tensor, num_examples: int, *, rank_tol: float | None = None) -> MeanSquareStability:
        """From the inner products [n r, n r] of the columns of all factors, those of an example side by side.

        Raises:
            ValueError: `gram` is not square, or not a multiple of `num_examples` wide.
        """
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or num_examples < 1 or gram.shape[0] % num_examples:
            raise ValueError(f"`gram` is {list(gram.shape)}; give [n r, n r] for the {num_examples} examples")
        made = cls.__new__(cls)
        made._keep(*_coordinates(gram.double()), num_examples, rank_tol)
        return made

    def _keep(self, values: Tensor, rows: Tensor, n: int, rank_tol: float | None) -> None:
        """Takes on what lies in the span: `values` [k] of Σ H_i, factors by `rows` [k, n r]."""
        tol = len(values) * torch.finfo(torch.float64).eps if rank_tol is None else rank_tol
        kept = values > tol * values[-1].clamp(min=0.0)
        self.num_examples = n
        self.eigenvalues = values[kept] / n
        self.coordinates = rows[kept].reshape(int(kept.sum()), n, rows.shape[1] // n).transpose(0, 1).contiguous()
        self._of_sam: dict[float, MeanSquareStability] = {}

    @property
    def rank(self) -> int:
        """k, the dimension of the span of the ranges of the H_i."""
        return len(self.eigenvalues)

    @property
    def largest_eigenvalue(self) -> float:
        """Of H."""
        return float(self.eigenvalues[-1]) if self.rank else 0.0

    def radius(
        self,
        lr: float,
        batch_size: float,
        *,
        sampling: str = "bernoulli",
        momentum: float = 0.0,
        rho: float = 0.0,
        tol: float = 1e-8,
    ) -> float:
        """ρ(T): E‖w‖² grows or decays like ρᵏ over k steps; 0 where every H_i is zero.

        With momentum, that of the map on the second moments of (w_t, w_(t−1)).

        Args:
            lr: η.
            batch_size: B, in (0, n].
            sampling: "bernoulli" or "without_replacement", as for `BatchMoments`.
            momentum: β in [0, 1).
            rho: Of unnormalised SAM, in units of a learning rate.
            tol: Relative accuracy.

        Raises:
            ValueError: an argument is out of its range.

        Warns:
            NotConvergedWarning: `tol` was not reached.
        """
        if not (lr > 0 and math.isfinite(lr)):
            raise ValueError(f"`lr` is {lr}; a learning rate is positive")
        noise = self._checked(batch_size, sampling, momentum)
        if rho != 0.0:
            return self._sam(rho).radius(lr, batch_size, sampling=sampling, momentum=momentum, tol=tol)
        if not self.rank:
            return 0.0
        without_noise = _squared_roots(lr, momentum, self.eigenvalues)
        if noise.own == 0.0:
            return without_noise
        if momentum > 0.0 or self.rank > DENSE_RANK:
            return self._sought_radius(lr, momentum, noise, without_noise, tol)
        x = lr * self.eigenvalues
        x, y = x.unsqueeze(1), x.unsqueeze(0)
        diagonal = (1 - x) * (1 - y) - noise.centre * x * y
        return self._top(diagonal, torch.ones_like(diagonal), lr**2 * noise.own, tol)[0]

    def threshold(
        self,
        batch_size: float,
        *,
        sampling: str = "bernoulli",
        momentum: float = 0.0,
        rho: float = 0.0,
        tol: float = 1e-8,
    ) -> float:
        r"""The learning rate up to which E‖w‖² stays bounded; infinite where every H_i is zero.

        It is 1/μ for the largest μ with Q(X) = μ L(X): in the eigenvectors of H, where λ_a are its eigenvalues,

            L(X)_ab = (1 + β) (λ_a + λ_b) X_ab,
            Q(X) = H X H − β/(1 − β)² (H²X − 2 HXH + XH²) + (1 + β)/(1 − β) (c Σ_i H_i X H_i − p H X H).

        One eigenvalue problem gives it, without a search over learning rates. With β = 0 and without replacement this
        is the threshold of Mulayoff and Michaeli, 2024; with momentum it is derived here: per pair of
        eigenvectors the stationary covariance of two autoregressions with common noise is known in closed form.

        Args:
            batch_size, sampling, momentum, rho, tol: As for `radius`.

        Raises:
            ValueError: an argument is out of its range.

        Warns:
            NotConvergedWarning: `tol` was not reached.
        """
        noise = self._checked(batch_size, sampling, momentum)
        if rho != 0.0:
            return self._sam(rho).threshold(batch_size, sampling=sampling, momentum=momentum, tol=tol)
        if not self.rank:
            return math.inf
        if noise.own == 0.0:
            return 2 * (1 + momentum) / self.largest_eigenvalue
        a, b = self.eigenvalues.unsqueeze(1), self.eigenvalues.unsqueeze(0)
        gain = (1 + momentum) / (1 - momentum)
        scale = ((1 + momentum) * (a + b)).rsqrt()
        diagonal = (1 - gain * noise.centre) * a * b - momentum / (1 - momentum) ** 2 * (a - b).square()
        return 1 / self._top(diagonal * scale.square(), scale, gain * noise.own, tol)[0]

    def advanced(self, moment: Tensor, lr: float, batch_size: float, *, sampling: str = "bernoulli") -> Tensor:
        """T(X) for X = E[w wᵀ] [k, k] in the eigenvectors of H; the mean loss is ½ Σ_a λ_a X_aa."""
        noise = BatchMoments.of(self.num_examples, batch_size, sampling)
        x = lr * self.eigenvalues
        x, y = x.unsqueeze(1), x.unsqueeze(0)
        return ((1 - x) * (1 - y) - noise.centre * x * y) * moment + lr**2 * noise.own * self._products(moment)

    def _checked(self, batch_size: float, sampling: str, momentum: float) -> BatchMoments:
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"`momentum` is {momentum}; it must lie in [0, 1)")
        return BatchMoments.of(self.num_examples, batch_size, sampling)

    def _sam(self, rho: float) -> MeanSquareStability:
        """The same with H_i + rho H_i² = F_i (I + rho F_iᵀF_i) F_iᵀ."""
        if not (rho > 0 and math.isfinite(rho)):
            raise ValueError(f"`rho` is {rho}; the perturbation of SAM has a size of 0 or more")
        if rho not in self._of_sam:
            own, vectors = torch.linalg.eigh(self.coordinates.mT @ self.coordinates)
            roots = (1 + rho * own.clamp(min=0.0)).sqrt().unsqueeze(1)
            self._of_sam[rho] = MeanSquareStability(self.coordinates @ vectors * roots, rank_tol=0.0)
        return self._of_sam[rho]

    def _sought_radius(self, lr: float, beta: float, noise: BatchMoments, lowest: float, tol: float) -> float:
        """The ρ at which T / ρ is marginal, sought above the radius without noise.

        T / ρ is the same map with φ / √ρ, β / ρ and noise / ρ, for the autoregressions w_(t+1) = φ w_t − β w_(t−1). The
        response to noise is known in closed form, so the crowd of eigenvalues of T near 1 costs no products.
        """
        from scipy.optimize import root_scalar

        x = lr * self.eigenvalues
        noises = -noise.centre * x.unsqueeze(1) * x.unsqueeze(0)
        start: Tensor | None = None

        def excess(rho: float) -> float:
            """1 − 1/λ for the gain λ of one turn: noise, then the response to it, at growth ρ."""
            nonlocal start
            phi, turn = (1 + beta - x) / rho**0.5, beta / rho
            a, b = phi.unsqueeze(1), phi.unsqueeze(0)
            response = (1 - turn**2) / ((1 - turn**2) ** 2 - (1 - turn) ** 2 * a * b + turn * (a - b).square()) / rho
            gain, start = self._top(noises * response, response.sqrt(), lr**2 * noise.own, tol / 10, start)
            return 1 - 1 / max(gain, 1e-300)

        low, high = max(lowest, 1e-30) * (1 + tol), max(2 * lowest, 0.5)
        if excess(low) <= 0:
            return lowest
        while excess(high) > 0:
            low, high = high, 2 * high
        return float(root_scalar(excess, bracket=(low, high), method="brentq", rtol=max(tol, 1e-14)).root)

    def _products(self, moment: Tensor) -> Tensor:
        """Σ_i H_i X H_i."""
        factors = self.coordinates
        n, k, r = factors.shape
        flat = factors.transpose(0, 1).reshape(k, n * r)
        inner = (moment @ flat).reshape(k, n, r).transpose(0, 1)  # X F_i
        inner = factors @ (factors.mT @ inner)  # F_i F_iᵀ X F_i
        return inner.transpose(0, 1).reshape(k, n * r) @ flat.T

    @cached_property
    def _dense_products(self) -> Tensor:
        """Σ_i H_i ⊗ H_i [k², k²]."""
        k = self.rank
        hessians = (self.coordinates @ self.coordinates.mT).reshape(self.num_examples, k * k)
        return (hessians.T @ hessians).reshape(k, k, k, k).permute(0, 2, 1, 3).reshape(k * k, k * k)

    def _top(
        self, diagonal: Tensor, scale: Tensor, gain: float, tol: float, start: Tensor | None = None
    ) -> tuple[float, Tensor | None]:
        """Largest eigenvalue of X -> diagonal ∘ X + gain · scale ∘ Σ_i H_i (scale ∘ X) H_i; its vector if iterated."""
        if self.rank <= DENSE_RANK:
            s = scale.reshape(-1)
            matrix = gain * s.unsqueeze(1) * self._dense_products * s + torch.diag(diagonal.reshape(-1))
            return float(torch.linalg.eigvalsh(matrix)[-1]), None
        operator = _ScaledMap(self, diagonal, scale, gain)
        basis = max(8, min(200, BASIS_BYTES // (8 * self.rank**2)))
        start = torch.diag(scale.diagonal().reciprocal()).reshape(-1) if start is None else start
        # The eigenvector is a positive matrix, on which the start is not zero: nothing is left to verify.
        pairs = top_eigenvalues(operator, tol=tol, start=start, verify=False, basis_size=basis)
        return float(pairs.values[0]), pairs.vectors[:, 0]


class _ScaledMap(LinearOperator):
    """X -> diagonal ∘ X + gain · scale ∘ Σ_i H_i (scale ∘ X) H_i on symmetric matrices as vectors [k²], else 0."""

    def __init__(self, stability: MeanSquareStability, diagonal: Tensor, scale: Tensor, gain: float) -> None:
        super().__init__(stability.rank**2, dtype=torch.float64, device=diagonal.device)
        self._stability, self._diagonal, self._scale, self._gain = stability, diagonal, scale, gain

    def matmat(self, V: Tensor) -> Tensor:
        k = self._stability.rank
        columns = []
        for column in V.unbind(1):
            X = column.reshape(k, k)
            X = (X + X.T) / 2
            product = self._diagonal * X
            product += self._gain * self._scale * self._stability._products(self._scale * X)
            columns.append(product.reshape(-1))
        return torch.stack(columns, dim=1)


def _coordinates(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of Σ_i H_i and the factors' columns in its eigenvectors [m, m], from their inner products [m, m]."""
    values, vectors = torch.linalg.eigh(gram)
    return values, (vectors * values.clamp(min=0.0).sqrt()).T


def _squared_roots(lr: float, beta: float, eigenvalues: Tensor) -> float:
    """Largest |z|² of the roots of z² − (1 + β − ηλ) z + β."""
    phi = 1 + beta - lr * eigenvalues
    discriminant = phi.square() - 4 * beta
    real = ((phi.abs() + discriminant.clamp(min=0.0).sqrt()) / 2).square()
    return float(torch.where(discriminant >= 0, real, beta).max())
