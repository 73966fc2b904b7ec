"""Mean-square stability of stochastic gradient descent near an optimum that fits every example."""

from __future__ import annotations

import math
import warnings
from functools import cached_property

import torch
from torch import Tensor

from .batch_moments import BatchMoments, is_number
from .eigs import top_eigenvalues
from .estimate import NotConvergedWarning
from .operator import LinearOperator

# Up to this rank the map on matrices [k, k] is formed as a matrix [k², k²] and diagonalised.
DENSE_RANK = 24
# Vectors [k²] that Lanczos may hold.
BASIS_BYTES = 2 << 30
# Of the largest: a Gram matrix in float32 is symmetric and positive up to this.
GRAM_ROUNDING = 1e-3
# Search for the radius: accuracy of the eigenvalues far from its root, best accuracy of the root, steps it may take.
FAR_TOL = 1e-3
ROOT_TOL = 1e-13
MOST_STEPS = 60


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
            ValueError: `gram` is not square, not a multiple of `num_examples` wide, not finite, not symmetric or not
                positive semidefinite, both up to rounding in float32.
        """
        if isinstance(num_examples, bool) or not isinstance(num_examples, int) or num_examples < 1:
            raise ValueError(f"`num_examples` is {num_examples!r}; give the number of examples, 1 or more")
        if not isinstance(gram, Tensor) or gram.ndim != 2 or gram.is_complex() or gram.shape[0] != gram.shape[1]:
            shape = list(gram.shape) if isinstance(gram, Tensor) else type(gram).__name__
            raise ValueError(f"`gram` is {shape}; give real inner products [n r, n r] as one tensor")
        if len(gram) == 0 or len(gram) % num_examples:
            raise ValueError(f"`gram` is {list(gram.shape)}; give [n r, n r] for the {num_examples} examples")
        if not bool(torch.isfinite(gram).all()):
            raise ValueError("`gram` holds numbers that are not finite; check the model at these weights")
        gram = gram.double()
        skew, largest = float((gram - gram.T).abs().max()), float(gram.abs().max())
        if skew > GRAM_ROUNDING * largest:
            raise ValueError(
                f"`gram` differs from its transpose by {skew:.3g} with a largest entry of {largest:.3g}; inner "
                "products are symmetric: give factorsᵀ @ factors"
            )
        values, rows = _coordinates((gram + gram.T) / 2)
        if values[0] < -GRAM_ROUNDING * values.abs().max():
            raise ValueError(
                f"`gram` has eigenvalues from {float(values[0]):.3g} to {float(values[-1]):.3g}; inner products have "
                "none below zero: give factorsᵀ @ factors"
            )
        made = cls.__new__(cls)
        made._keep(values, rows, num_examples, rank_tol)
        return made

    def _keep(self, values: Tensor, rows: Tensor, n: int, rank_tol: float | None) -> None:
        """Takes on what lies in the span: `values` [k] of Σ H_i, factors by `rows` [k, n r]."""
        if not (rank_tol is None or (is_number(rank_tol) and rank_tol >= 0)):
            raise ValueError(f"`rank_tol` is {rank_tol!r}; give a share of the largest eigenvalue, 0 or more, or None")
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

        With momentum, that of the map on the second moments of (w_t, w_(t−1)). Up to k = 24 it is found by dense
        eigenvalue problems [k², k²]. Beyond, or with momentum, it is the root of a function, and each of two to ten
        values of it takes an eigenvalue problem like that of `threshold`, the first ones a rough solution only: one to
        six times the cost of `threshold` in all, most where the noise hardly raises the radius.

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
        if not (is_number(lr) and lr > 0):
            raise ValueError(f"`lr` is {lr!r}; a learning rate is a positive number")
        noise = self._checked(batch_size, sampling, momentum, rho, tol)
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
        noise = self._checked(batch_size, sampling, momentum, rho, tol)
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

    def _checked(self, batch_size: float, sampling: str, momentum: float, rho: float, tol: float) -> BatchMoments:
        if not (is_number(momentum) and 0.0 <= momentum < 1.0):
            raise ValueError(f"`momentum` is {momentum!r}; give a number in [0, 1)")
        if not (is_number(rho) and rho >= 0):
            raise ValueError(f"`rho` is {rho!r}; the perturbation of SAM has a size of 0 or more")
        if not (is_number(tol) and 0 < tol < 1):
            raise ValueError(f"`tol` is {tol!r}; give a relative accuracy above 0 and below 1, such as 1e-8")
        return BatchMoments.of(self.num_examples, batch_size, sampling)

    def _sam(self, rho: float) -> MeanSquareStability:
        """The same with H_i + rho H_i² = F_i (I + rho F_iᵀF_i) F_iᵀ."""
        if rho not in self._of_sam:
            own, vectors = torch.linalg.eigh(self.coordinates.mT @ self.coordinates)
            roots = (1 + rho * own.clamp(min=0.0)).sqrt().unsqueeze(1)
            self._of_sam[rho] = MeanSquareStability(self.coordinates @ vectors * roots, rank_tol=0.0)
        return self._of_sam[rho]

    def _sought_radius(self, lr: float, beta: float, noise: BatchMoments, lowest: float, tol: float) -> float:
        """The ρ at which T / ρ is marginal, sought above the radius without noise.

        One turn is noise, then the response R_ab(ρ) to it, known in closed form, of the autoregressions w_(t+1) = φ w_t
        − β w_(t−1) at growth ρ; so the crowd of eigenvalues of T near 1 costs no products. T / ρ is marginal where the
        gain λ of a turn is 1. 1/λ is nearly linear in ρ, concave for β = 0, and its slope Σ_ab V_ab² (−log R_ab)' / λ
        follows from the eigenvector V alone: Newton's method, kept between ends of known sign.
        """
        x = lr * self.eigenvalues
        phi = 1 + beta - x
        noises = -noise.centre * x.unsqueeze(1) * x.unsqueeze(0)
        products, squares = phi.unsqueeze(1) * phi.unsqueeze(0), (phi.unsqueeze(1) - phi.unsqueeze(0)).square()
        moment: Tensor | None = None

        def turn(rho: float, inner_tol: float) -> tuple[float, float]:
            """λ and λ times the slope of 1/λ."""
            nonlocal moment
            t = beta / rho
            inverse = rho * (1 - t**2) - (1 - t) / (1 + t) * products + t / (1 - t**2) * squares
            slope = 1 + t**2 - 2 * t / (1 + t) ** 2 / rho * products - t * (1 + t**2) / (1 - t**2) ** 2 / rho * squares
            scale = inverse.rsqrt()
            start = None if moment is None else (moment / scale).reshape(-1)
            gain, vector = self._top(noises / inverse, scale, lr**2 * noise.own, inner_tol, start)
            vector = vector.reshape_as(scale)
            moment = scale * vector
            return gain, float((vector.square() * slope / inverse).sum())

        tol = max(tol, ROOT_TOL)
        floor, inner_tol = max(lowest, 1e-30) * (1 + tol), max(FAR_TOL, tol / 10)
        low, high, rho = floor, math.inf, max(1.0, 1.1 * lowest)
        before: tuple[float, float] | None = None
        above, at_floor = rho, False
        for _ in range(MOST_STEPS):
            gain, steepness = turn(rho, inner_tol)
            fine = inner_tol <= tol / 10
            if rho == floor and gain <= 1:
                return lowest
            # A gain is too small if at all: above 1 it is that for certain, below 1 where it is accurate.
            if gain > 1:
                low = max(low, rho)
            elif fine:
                high = min(high, rho)
            step = (gain - 1) / steepness if steepness > 0 else math.copysign(rho, gain - 1)
            slope = steepness / gain if gain > 0 else math.inf
            if fine and (abs(gain - 1) <= tol or _error_left(step, rho, slope, before, lowest) <= tol * rho):
                return rho + step
            before = (rho, slope)
            if gain <= 1:
                above = rho
            # Near the pole at `lowest` steps do little more than double the distance from it: halve its logarithm.
            far = 10 * (rho + step - lowest) < above - lowest
            creeping = far and 0.3 * (rho - lowest) < step < 3 * (rho - lowest)
            if rho + step < low and low == floor and not at_floor:
                rho, at_floor = floor, True
            elif creeping or rho + step < low:
                rho = lowest + math.sqrt((low - lowest) * (above - lowest))
            else:
                rho = rho + step if rho + step <= high else (rho + high) / 2
            if at_floor or abs(step) <= 0.03 * (rho - lowest):
                inner_tol = tol / 10
        warnings.warn(f"the radius near {rho:.6g} is not known to `tol` = {tol:g}", NotConvergedWarning, stacklevel=3)
        return rho

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
    ) -> tuple[float, Tensor]:
        """Largest eigenvalue of X -> diagonal ∘ X + gain · scale ∘ Σ_i H_i (scale ∘ X) H_i and its vector [k²]."""
        if self.rank <= DENSE_RANK:
            s = scale.reshape(-1)
            matrix = gain * s.unsqueeze(1) * self._dense_products * s + torch.diag(diagonal.reshape(-1))
            values, vectors = torch.linalg.eigh(matrix)
            return float(values[-1]), vectors[:, -1]
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


def _error_left(step: float, at: float, slope: float, before: tuple[float, float] | None, pole: float) -> float:
    """Of a step of Newton's method, by how the slope has changed since the point before; infinite where it did much."""
    if before is None or at == before[0] or not 0 < slope < math.inf:
        return math.inf
    change = abs(slope - before[1]) / slope
    return change * step**2 / min(abs(at - before[0]), at - pole) if change < 0.5 else math.inf
