"""Measurements in the geometry that the optimizer moves in, and of how near its step is to instability."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..hessian.eigs import EigenPairs
from ..hessian.operator import LinearOperator
from ..hessian.preconditioned import Root
from ..hessian.solve import solve
from ..hessian.tracking import EigenTracker
from ..kernels.accurate import dot, norm
from .optimizers.base import MissingGradientError
from .optimizers.preconditioners import Idle, Preconditioner, Which, preconditioner_of
from .optimizers.torch_geometry import NoPreconditionerError
from .point import Point
from .row import Row
from .spectra_measurements import eigenvalue_rows

# Relative residual of the solve for uᵀ P u where P is no diagonal.
SOLVE_TOL = 1e-6


@dataclass(frozen=True)
class PreconditionedSharpness:
    """Largest eigenvalues of P^-1/2 H P^-1/2, for an optimizer whose steps are θ ← θ − η P⁻¹ m.

    They are those of P⁻¹ H, of a symmetric operator. P has bias correction and eps in it; see `preconditioner_of`.
    For plain gradient descent this is `Sharpness`, and like it each point starts from the eigenvectors of the one
    before.

    Rows: index i for the i-th of `num`, with its error bar, see `EigenTracker`; and "zero_second_moment", the share of
    parameters whose second moment is exactly zero, so that P is nothing but eps. These do not move, and are left out
    by default: a curvature of rounding errors divided by eps would exceed all others.

    No row before the first step for which="current"; none, and one warning, for an optimizer without such a P, such as
    LBFGS; none where only weights are known (`replay`).

    Args:
        every: Period in steps.
        num: How many.
        which: "next", P of the step about to be made, with the gradient of the objective: the optimizer's own where it
            trains on all of the data; or "current", P of the last step.
        idle: "exclude" leaves out parameters with a second moment of zero, "keep" does not.
        tol, max_products, proof_every, seed, keep_vectors: As for `Sharpness`. Vectors are of the symmetric operator:
            P^1/2 times a direction of the parameters.

    Source: Cohen et al., Adaptive Gradient Methods at the Edge of Stability, 2022, section 2.
    """

    every: int | None = None
    num: int = 1
    which: Which = "next"
    _: KW_ONLY
    idle: Idle = "exclude"
    tol: float = 1e-3
    max_products: int | None = None
    proof_every: int | None = 25
    seed: int = 0
    keep_vectors: bool = False
    name: str = "preconditioned_sharpness"

    def measure(self, point: Point) -> Iterator[Row]:
        P = _preconditioner(point, self.which, self.idle, self.name)
        if P is None:
            return
        pairs, spent = _eigenvalues(
            self, P.operator(point.hessian()), point, f"preconditioned {self.which} {self.idle}"
        )
        yield from eigenvalue_rows(self.name, pairs, keep_vectors=self.keep_vectors, spent=spent)
        yield Row("zero_second_moment", P.zero_share, error=0.0)


@dataclass(frozen=True)
class ThresholdRatio:
    """How near the next step is to instability: 1 at the edge, for every optimizer that has a threshold.

    It is the largest eigenvalue of T^-1/2 P^-1/2 (H + Λ) P^-1/2 T^-1/2 for the thresholds T of the parameters and the
    weight decay Λ that is part of their gradient: the preconditioned sharpness over the threshold where all parameter
    groups agree. For gradient descent it is λ_max(H) η/2. Exact for groups that differ in learning rate only; see
    `Preconditioner.ratio_operator`. Where `PreconditionedSharpness` is measured with the same settings and groups
    agree, its products are shared. Round unnormalised SAM with several groups it is near 1 at the edge only.

    No row, and one warning, for an optimizer without a threshold; none where only weights are known (`replay`).

    Args: As for `PreconditionedSharpness`.

    Source: Cohen et al., Adaptive Gradient Methods at the Edge of Stability, 2022, section 2, for the thresholds.
    """

    every: int | None = None
    which: Which = "next"
    _: KW_ONLY
    idle: Idle = "exclude"
    tol: float = 1e-3
    max_products: int | None = None
    proof_every: int | None = 25
    seed: int = 0
    name: str = "threshold_ratio"

    num: ClassVar[int] = 1

    def measure(self, point: Point) -> Iterator[Row]:
        P = _preconditioner(point, self.which, self.idle, self.name)
        if P is None:
            return
        op = P.ratio_operator(point.hessian())
        if op is None:
            _warn(self.name, point, "it has no stability threshold with these settings")
            return
        scale, label = 1.0, "ratio"
        if P.threshold is not None and not bool(P.weight_decay.any()):
            op, scale, label = P.operator(point.hessian()), P.threshold, "preconditioned"
        pairs, spent = _eigenvalues(self, op, point, f"{label} {self.which} {self.idle}")
        yield Row(
            self.name,
            float(pairs.values[0]) / scale,
            float(pairs.value_bounds[0]) / scale,
            converged=pairs.converged,
            products=pairs.products if spent else 0,
            seconds=pairs.seconds if spent else 0.0,
        )


@dataclass(frozen=True)
class EffectiveSharpness:
    """uᵀ H u / uᵀ P u for the last parameter change u = θ_t − θ_(t−1), at θ_t.

    The curvature that the update meets, in the geometry of the optimizer: the Rayleigh quotient of P^-1/2 H P^-1/2 at
    P^1/2 u, so never above the preconditioned sharpness but for parameters that it leaves out. For P = I it is
    `UpdateCurvature`. Parameters that the optimizer does not hold are left out of u. Where P is no diagonal, P u comes
    from conjugate gradients on P⁻¹; where they do not reach 1e-6, the row is marked as not converged and has no error.

    No row at the first step, nor where only weights are known (`replay`); NaN where nothing moved; no row, and one
    warning, for an optimizer without such a P.

    Args:
        every: Period in steps.
        which: "current", P of the step that u was, or "next". What is left of it: of 4-bit moments it is the decoded
            one, and Adadelta's has taken in the step itself. Methods that keep no copy of the gradient, such as Lion,
            have none, and no row.
    """

    every: int | None = None
    which: Which = "current"
    _: KW_ONLY
    name: str = "effective_sharpness"

    needs_update: ClassVar[bool] = True

    def measure(self, point: Point) -> Iterator[Row]:
        if point.update is None:
            return
        P = _preconditioner(point, self.which, "keep", self.name)
        if P is None:
            return
        op = point.hessian()
        u = point.update.to(op.device, op.dtype)
        length = float(norm(u))
        if length == 0.0 or not math.isfinite(length):
            yield Row(self.name, math.nan, converged=False)
            return
        u, weighed, converged = _weighed(P, u / length)  # unit: an update may be tiny
        size = float(dot(u, weighed))
        if size <= 0.0:
            yield Row(self.name, math.nan, converged=False)
            return
        product = op @ u
        error = op.relative_error * float(norm(product)) * float(norm(u)) / size if converged else math.nan
        yield Row(self.name, float(dot(u, product)) / size, error=error, converged=converged, products=1)


def _preconditioner(point: Point, which: Which, idle: Idle, name: str) -> Preconditioner | None:
    """Of the optimizer about to step, made once for a point; None where there is none."""
    optimizer = point.optimizer
    if optimizer is None:
        return None
    gradient = point.gradient() if which == "next" else None
    try:
        return point.shared(
            f"preconditioner {which} {idle}",
            lambda: preconditioner_of(optimizer, point.objective, which=which, gradient=gradient, idle=idle),
        )
    except MissingGradientError:
        return None  # before the first step
    except NoPreconditionerError as error:
        _warn(name, point, str(error))
        return None


def _eigenvalues(measurement: Any, op: LinearOperator, point: Point, label: str) -> tuple[EigenPairs, bool]:
    """The largest eigenvalues of `op`, and whether products were spent here: once for all measurements of a point that
    ask for the same, and each of them remembers what the tracker does."""
    options = {key: getattr(measurement, key) for key in ("tol", "max_products", "proof_every", "seed")}
    spent = []

    def track() -> tuple[EigenPairs, dict[str, Any]]:
        spent.append(True)
        tracker = EigenTracker(measurement.num, state=point.state, **options)
        return tracker.measure(op), dict(point.state)

    pairs, state = point.shared(f"eigenvalues {label} {measurement.num} {options}", track)
    point.state.update(state)
    return pairs, bool(spent)


def _weighed(P: Preconditioner, u: Tensor) -> tuple[Tensor, Tensor, bool]:
    """u without what the optimizer does not hold, P u, and whether that is exact to the tolerance."""
    u = torch.where(P.moves, u, 0.0)
    if P.diagonal is not None:
        return u, torch.where(P.moves, P.diagonal, 0.0) * u, True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the row says so
        solution = solve(_Gram(P.root, u), u, tol=SOLVE_TOL)
    return u, solution.x, solution.converged


class _Gram(LinearOperator):
    """P⁻¹ = Rᵀ R [n, n]."""

    def __init__(self, root: Root, like: Tensor) -> None:
        super().__init__(root.shape[1], dtype=like.dtype, device=like.device)
        self._root = root

    def matmat(self, V: Tensor) -> Tensor:
        return self._root.transposed(self._root.apply(V))


def _warn(name: str, point: Point, reason: str) -> None:
    warnings.warn(f"measurement {name!r} records nothing for {type(point.optimizer).__name__}: {reason}", stacklevel=4)
