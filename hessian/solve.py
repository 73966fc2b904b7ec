"""Linear systems with a symmetric operator: conjugate gradients, and MINRES where the operator is indefinite.

Both report directions of negative curvature that they meet. Sizes: n rows.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.accurate import dot, norm
from .estimate import NotConvergedWarning
from .lanczos import checked_vector, plain_tensors
from .operator import LinearOperator
from .plan import planned
from .planners import plan_solve
from .probes import ROUNDING_EPS, check_method, checked_finite

# Default budget: enough for convergence in exact arithmetic where n is small, bounded where it is large.
MOST_PRODUCTS = 1000

# One product for the residual of the start, one for a step, three for checks.
FEWEST_PRODUCTS = 5

# Every so many steps, and when the residual has fallen by such a factor since, the true residual is computed. Where
# it exceeds that of the recurrence by the last factor, rounding has driven them apart: the method starts again.
CHECK_EVERY = 50
CHECK_BELOW = 1e-3
DRIFT = 1.1

# A restart must make the true residual smaller by this factor, or rounding rules.
WORTHWHILE = 0.5


class NegativeCurvature(NamedTuple):
    """A unit `direction` d [n] and its `curvature` dᵀ (A + damping I) d, negative, or zero to rounding."""

    direction: Tensor
    curvature: float


@dataclass(frozen=True)
class Solution:
    """What came out of `solve`.

    Attributes:
        x: [n], in the operator's dtype.
        residual: ‖b − (A + damping I) x‖ / ‖b‖, computed from x with a product of its own.
        converged: `residual` is at most the tolerance.
        products: Operator products spent.
        negative_curvature: The direction met and its curvature, or None. A system that is not positive definite need
            not show one.
        reason: Why it stopped, in words.
        seconds: Wall-clock time.
    """

    x: Tensor
    residual: float
    converged: bool
    products: int
    negative_curvature: NegativeCurvature | None
    reason: str
    seconds: float


@planned(plan_solve)
def solve(
    op: LinearOperator,
    b: Tensor,
    *,
    method: str = "cg",
    damping: float = 0.0,
    tol: float = 1e-6,
    max_products: int | None = None,
    start: Tensor | None = None,
) -> Solution:
    r"""x with (A + damping I) x = b.

    - "cg": for a positive definite system. It stops at the first search direction p with pᵀ A p ≤ 0 and reports it.
    - "minres": for any symmetric system. Negative curvature does not stop it, the most negative found is reported.
      Where b is not in the range of A + damping I, it ends at a least-squares solution.

    Without convergence x is the one with the smallest residual on the way. The residual that counts is computed from
    x; where rounding has driven that of the recurrence away from it, the method starts again from the true one, until
    that no longer helps. In float32 this floor lies near 1e-7 · ‖A‖ ‖x‖ / ‖b‖.

    Args:
        op: Symmetric, shape [n, n].
        b: Right-hand side [n].
        method: As above.
        damping: Added to every eigenvalue, ≥ 0; for a negative shift solve with `op.shifted(...)`.
        tol: Relative residual asked, > 0.
        max_products: Budget; by default 10 n + 10, at most 1000.
        start: First guess [n]; zero if None.

    Returns:
        A `Solution`. If it has not converged, a `NotConvergedWarning` says why.

    Source: Hestenes and Stiefel, Methods of Conjugate Gradients for Solving Linear Systems, 1952; Paige and Saunders,
    Solution of Sparse Indefinite Systems of Linear Equations, 1975; Liu and Roosta, MINRES: From Negative Curvature
    Detection to Monotonicity Properties, 2022, for the curvature test.

    >>> from sharpscope.hessian.operator import DiagonalOperator
    >>> solve(DiagonalOperator(torch.tensor([1.0, 2.0, 4.0])), torch.ones(3)).x
    tensor([1.0000, 0.5000, 0.2500])
    """
    began = time.perf_counter()
    check_method(method, METHODS)
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(
            f"`damping` is {damping}; it must be 0 or more. For a negative shift solve with op.shifted(...)"
        )
    if not (math.isfinite(tol) and tol > 0):
        raise ValueError(f"`tol` is {tol}; the relative residual asked for must be positive")
    n = op.shape[0]
    budget = default_budget(n) if max_products is None else max_products
    if budget < FEWEST_PRODUCTS:
        raise ValueError(
            f"`max_products` is {budget}; a first residual, a step and the checks of its result take {FEWEST_PRODUCTS}"
        )
    with plain_tensors(), op.fixed():
        system = _System(op, damping)
        b = checked_vector(op, b, "b")
        x = torch.zeros_like(b) if start is None else checked_vector(op, start, "start").clone()
        x, residual, curvature, reason = _refine(system, b, x, METHODS[method], tol, budget)
    solution = Solution(x, residual, residual <= tol, system.products, curvature, reason, time.perf_counter() - began)
    if not solution.converged:
        warnings.warn(
            f"solve stopped at a relative residual of {residual:.2g}, above `tol` = {tol:g}, after "
            f"{solution.products} products: {reason}",
            NotConvergedWarning,
            stacklevel=2,
        )
    return solution


class _System:
    """A + damping I, with its products counted."""

    def __init__(self, op: LinearOperator, damping: float) -> None:
        self.op, self.damping = op, damping
        self.eps = torch.finfo(op.dtype).eps
        self.products = 0

    def apply(self, v: Tensor) -> Tensor:
        self.products += 1
        image = self.op.matvec(v)
        return image + self.damping * v if self.damping else image

    def form(self, v: Tensor, image: Tensor) -> float:
        """vᵀ (A + damping I) v from the product just made."""
        return checked_finite(dot(v, image), self.op, self.products)

    def residual(self, b: Tensor, x: Tensor) -> tuple[Tensor, float]:
        """b − (A + damping I) x and its length."""
        r = b - self.apply(x)
        return r, checked_finite(norm(r), self.op, self.products)


class _Step(NamedTuple):
    """The best x [n] after a step, its residual norm by recurrence, curvature met, why the step has to be the last."""

    x: Tensor
    residual: float
    curvature: NegativeCurvature | None = None
    end: str = ""


Method = Callable[[_System, Tensor], Iterator[_Step]]


def default_budget(n: int) -> int:
    """Most products for n unknowns."""
    return min(10 * n + 10, MOST_PRODUCTS)


def _refine(
    system: _System, b: Tensor, x: Tensor, method: Method, tol: float, budget: int
) -> tuple[Tensor, float, NegativeCurvature | None, str]:
    """Runs of a method, each from the true residual of the last: x, its relative residual, curvature, why it ended."""
    length = float(norm(b))
    if length == 0.0:
        return torch.zeros_like(b), 0.0, None, "`b` is zero"
    r, left = system.residual(b, x) if bool(x.any()) else (b, length)
    found: NegativeCurvature | None = None
    end = ""
    last_step = budget - 3  # three products are left for checks, of a run, the result and a direction
    while left > tol * length and not end:
        correction, curvature, end = _run(system, r, left, method, tol * length, last_step)
        found = min((c for c in (found, curvature) if c is not None), key=lambda c: c.curvature, default=None)
        before, candidate = left, x + correction
        rest, after = system.residual(b, candidate)
        if after < before:
            x, r, left = candidate, rest, after
        if not end and system.products >= last_step:
            end = _budget_ended(budget)
        elif not end and after > WORTHWHILE * before:
            name = str(system.op.dtype).removeprefix("torch.")
            end = f"the errors of products in {name} allow no less; work in float64, or raise `damping`"
    if found is not None and method is _minres:  # by recurrence until here
        d = found.direction / float(norm(found.direction))
        curvature = system.form(d, system.apply(d))
        found = NegativeCurvature(d, curvature) if curvature < 0 else None
    return x, left / length, found, "the residual is small enough" if left <= tol * length else end


def _run(
    system: _System, r: Tensor, length: float, method: Method, target: float, last_step: int
) -> tuple[Tensor, NegativeCurvature | None, str]:
    """Steps from zero for the right-hand side r: x, the lowest curvature, why no other run would help."""
    checked, lowest = _Step(torch.zeros_like(r), length), None
    steps, count = method(system, r), 0
    while True:
        step = next(steps)
        count += 1
        if step.curvature is not None and (lowest is None or step.curvature.curvature < lowest.curvature):
            lowest = step.curvature
        if step.end or step.residual <= target:
            return step.x, lowest, step.end
        spent = system.products >= last_step
        if spent or count % CHECK_EVERY == 0 or step.residual < CHECK_BELOW * checked.residual:
            _, actual = system.residual(r, step.x)
            drifted = actual > DRIFT * step.residual
            if spent or drifted:
                return (checked if drifted and actual > checked.residual else step).x, lowest, ""
            checked = step


def _budget_ended(budget: int) -> str:
    return f"the budget of {budget} products ended; raise `max_products`, or `damping` for fewer steps"


def _conjugate_gradients(system: _System, r: Tensor) -> Iterator[_Step]:
    x, p = torch.zeros_like(r), r
    square, scale = float(dot(r, r)), 0.0
    best = _Step(x, math.sqrt(square))
    while True:
        image = system.apply(p)
        form, length = system.form(p, image), float(norm(p))
        curvature, scale = form / length**2, max(scale, float(norm(image)) / length)
        if curvature <= system.eps * scale:
            enough = system.damping + max(-curvature, 0.0)
            end = f"the curvature along a search direction is {curvature:.3g}, not positive"
            end += f": take method='minres', or `damping` above {enough:.3g} at least"
            yield _Step(best.x, best.residual, NegativeCurvature(p / length, curvature), end)
            return
        x = x + (square / form) * p
        r = r - (square / form) * image
        before, square = square, float(dot(r, r))
        if math.sqrt(square) < best.residual:
            best = _Step(x, math.sqrt(square))
        yield best
        p = r + (square / before) * p


def _minres(system: _System, r: Tensor) -> Iterator[_Step]:
    """Lanczos, with reflections (c, s) of its tridiagonal matrix; letters as in the source.

    Before a step is taken it is known that ‖r‖ = φ, rᵀ A r = −c γ φ² and ‖A r‖ = φ √(γ² + (c β)²). When A r is as
    good as zero, r is at an end: either x is a least-squares solution, or r lies along eigenvalues so small that many
    steps are needed. So as many steps again are allowed for φ to fall.

    Source: Choi, Paige and Saunders, MINRES-QLP: A Krylov Subspace Method for Indefinite or Singular Symmetric
    Systems, 2011; curvature: Liu and Roosta 2022.
    """
    phi = float(norm(r))
    v, v_before = r / phi, torch.zeros_like(r)
    x, d, d_before = torch.zeros_like(r), torch.zeros_like(r), torch.zeros_like(r)
    c, s, beta, delta, epsilon, scale = -1.0, 0.0, 0.0, 0.0, 0.0, 0.0
    stalled: tuple[_Step, int] | None = None
    for count in itertools.count(1):
        image = system.apply(v)
        alpha = system.form(v, image)
        image = image - alpha * v - beta * v_before
        beta_next = float(norm(image))
        scale = max(scale, math.hypot(alpha, beta, beta_next))
        delta_now, gamma = c * delta + s * alpha, s * delta - c * alpha
        curvature = NegativeCurvature(r / phi, -c * gamma) if c * gamma > ROUNDING_EPS * system.eps * scale else None
        size = math.hypot(gamma, beta_next)
        if math.hypot(gamma, c * beta_next) <= math.sqrt(system.eps) * scale and stalled is None:
            stalled = _Step(x, phi), count
        exhausted = size <= system.eps * scale
        if stalled is not None and (exhausted or count >= 2 * stalled[1] + 10):
            end = "`b` is not in the range of A + damping I, or nearly so: x is a least-squares solution"
            yield _Step(stalled[0].x, stalled[0].residual, curvature, f"{end}; raise `damping` for another")
            return
        delta, epsilon_next = -c * beta_next, s * beta_next
        c, s = gamma / size, beta_next / size
        d, d_before = (v - delta_now * d - epsilon * d_before) / size, d
        epsilon, beta = epsilon_next, beta_next
        x = x + (c * phi) * d
        phi = s * phi
        if stalled is not None and phi <= WORTHWHILE * stalled[0].residual:
            stalled = None
        yield _Step(x, phi, curvature)
        v, v_before = image / beta_next, v
        r = s**2 * r - (phi * c) * v


METHODS: dict[str, Method] = {"cg": _conjugate_gradients, "minres": _minres}
