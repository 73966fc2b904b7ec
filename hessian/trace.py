"""The trace of a symmetric operator from products with random vectors, with its standard error."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.accurate import dot
from .deflation import leading_subspace, products_for
from .estimate import Estimate, NotConvergedWarning
from .lanczos import plain_tensors
from .operator import LinearOperator
from .plan import planned
from .planners import plan_trace
from .probes import (
    ProbeMoments,
    check_method,
    check_num_probes,
    checked_finite,
    exact_columns,
    exact_rounding,
    probe_groups,
    products,
    rademacher,
    random_generator,
    rounding,
)
from .sketch import RangeSketch, new_direction, remainder

# Methods, and the fewest products from which each can give an error.
FEWEST_PRODUCTS = {"hutchinson": 1, "hutch++": 4, "xtrace": 4, "exact": 1}

# No tolerance counts as met early before this many probes were compared.
FEWEST_PROBES = 4


@planned(plan_trace)
def trace(
    op: LinearOperator,
    *,
    method: str = "hutchinson",
    num_probes: int = 100,
    tol: float | None = None,
    deflate: int = 0,
    seed: int = 0,
) -> Estimate:
    r"""tr A = Σ_i a_ii, the sum of the eigenvalues.

    - "hutchinson": the mean of zᵀ A z over random signs z. Error √(2/m) ‖A − diag A‖_F; holds a few vectors. With
      `deflate` exact on the leading eigenvectors, or what a Lanczos run has for them, and the mean over signs projected
      off these: unbiased however well they have converged. It pays where few eigenvalues are large, and costs where the
      mean eigenvalue is not small beside them; holds their vectors and those of the run.
    - "hutch++": exact on a sketch of the range from m/3 products, Hutchinson on what is left. Error O(1/m) for a
      semidefinite A; holds m/3 vectors.
    - "xtrace": each of m/2 Gaussian probes tested on the sketch of the others. The most accurate where eigenvalues
      decay, as in trained networks; holds 3m/2 vectors.
    - "exact": n products, as every method when `num_probes` is n or more.

    The standard errors of the first two come from the spread of the vectors z∘(A z), those of XTrace from a
    jackknife that errs on the large side; the truth lies within three of them in more than 95 of 100 runs, with a
    dozen products already. Each contains the error of the products (`op.relative_error` times ‖A‖_F).

    Args:
        op: Symmetric, shape [n, n].
        method: As above.
        num_probes: Most products to spend, m.
        tol: Stop as soon as the standard error is at most tol · |tr A|. With "hutch++" the sketch is made for
            `num_probes` before that.
        deflate: With "hutchinson", eigenpairs of largest |λ| to take out first, with about two products for each and
            at most half of `num_probes`.
        seed: Of the probes; the global random state is not touched.

    Returns:
        An `Estimate`. `converged` is False, with a `NotConvergedWarning`, if `tol` was not reached. The samples of
        "xtrace" are not independent.

    Source: Hutchinson, A Stochastic Estimator of the Trace of the Influence Matrix, 1990; Meyer, Musco, Musco and
    Woodruff, Hutch++: Optimal Stochastic Trace Estimation, 2021, algorithm 1; Epperly, Tropp and Webber, XTrace:
    Making the Most of Every Sample in Stochastic Trace Estimation, 2024.

    >>> from sharpscope.hessian.operator import DiagonalOperator
    >>> float(trace(DiagonalOperator(torch.arange(1.0, 11.0)), num_probes=4))
    55.0
    """
    check_method(method, FEWEST_PRODUCTS)
    check_num_probes(num_probes, 1)
    if tol is not None and not tol > 0:
        raise ValueError(f"`tol` is {tol}; a relative standard error must be positive, or None to spend `num_probes`")
    if deflate and method != "hutchinson":
        raise ValueError(f"`deflate` is {deflate} with method {method!r}; it goes with 'hutchinson' only: leave it out")
    op.expect(min(num_probes, op.shape[0]) if method != "exact" else op.shape[0])
    with plain_tensors(), op.fixed():
        if method == "exact" or num_probes >= op.shape[0]:
            return _exact(op)
        check_num_probes(num_probes, FEWEST_PRODUCTS[method], method)
        if deflate:
            result = _deflated(op, num_probes, tol, deflate, seed)
        else:
            estimator = {"hutchinson": _hutchinson, "hutch++": _hutch_plus_plus, "xtrace": _xtrace}[method]
            result = estimator(op, num_probes, tol, seed)
    if not result.converged:
        warnings.warn(
            f"the trace has a standard error of {result.stderr:.2g} after {result.products} products, more than `tol` "
            f"= {tol:g} times |{result.estimate:.3g}|: raise `num_probes`, or try method='xtrace'",
            NotConvergedWarning,
            stacklevel=2,
        )
    return result


def _estimate(samples: Tensor, stderr: float, rounding_error: float, num_products: int, tol: float | None) -> Estimate:
    value, stderr = float(samples.mean()), math.hypot(stderr, rounding_error)
    return Estimate(value, stderr, samples, num_products, tol is None or stderr <= tol * abs(value))


def _exact(op: LinearOperator) -> Estimate:
    diagonal, squares = exact_columns(op)
    value = diagonal.sum()
    error = exact_rounding(op, math.sqrt(float(squares.sum())))
    return Estimate(float(value), error, value.cpu().reshape(1), op.shape[0])


class _Sketch(NamedTuple):
    """What is known exactly of A: orthonormal rows Q [r, n], tr(Q A Qᵀ), ‖A Qᵀ‖_F², and the products that took."""

    Q: Tensor
    trace: float
    square: float
    products: int


def _hutchinson(op: LinearOperator, num_probes: int, tol: float | None, seed: int) -> Estimate:
    nothing = _Sketch(torch.empty(0, op.shape[0], dtype=op.dtype, device=op.device), 0.0, 0.0, 0)
    return _residual_trace(op, nothing, num_probes, tol, random_generator(op, seed))


def _deflated(op: LinearOperator, num_probes: int, tol: float | None, deflate: int, seed: int) -> Estimate:
    most = min(products_for(deflate, op.shape[0]), num_probes // 2)
    if most < deflate:
        raise ValueError(
            f"`deflate` is {deflate}, more than half of `num_probes` = {num_probes}: deflate fewer, or spend more"
        )
    known = leading_subspace(op, deflate, seed=seed, max_products=most)
    inside = checked_finite(known.values.sum(), op, known.products)
    sketch = _Sketch(known.vectors, inside, known.square, known.products)
    return _residual_trace(op, sketch, num_probes, tol, random_generator(op, seed))


def _hutch_plus_plus(op: LinearOperator, num_probes: int, tol: float | None, seed: int) -> Estimate:
    generator = random_generator(op, seed)
    width, r, spent = num_probes // 3, 0, 0
    Q = torch.empty(width, op.shape[0], dtype=op.dtype, device=op.device)
    for size in probe_groups(op, width):
        for image in products(op, rademacher(op, size, generator)):
            spent += 1
            checked_finite(dot(image, image), op, spent)
            direction = new_direction(Q[:r], image)
            if direction is not None:
                Q[r] = direction
                r += 1
    inside = square = 0.0
    for q in Q[:r]:
        (image,) = products(op, q.unsqueeze(0))
        spent += 1
        inside += checked_finite(dot(q, image), op, spent)
        square += float(dot(image, image))
    return _residual_trace(op, _Sketch(Q[:r], inside, square, spent), num_probes, tol, generator)


def _residual_trace(
    op: LinearOperator, sketch: _Sketch, num_probes: int, tol: float | None, generator: torch.Generator
) -> Estimate:
    """tr(Q A Qᵀ) and Hutchinson's estimate of tr(P A P), P = I − Qᵀ Q, from what is left of `num_probes`.

    The variance is that of P A P, whose products are z -> P A P z.
    """
    moments = ProbeMoments(op)
    for size in probe_groups(op, num_probes - sketch.products):
        Z = rademacher(op, size, generator)
        deflated = torch.stack([remainder(sketch.Q, z) for z in Z]) if len(sketch.Q) else Z
        for z, image in zip(Z, products(op, deflated), strict=True):
            moments.add(z, remainder(sketch.Q, image), product=sketch.products + moments.count + 1)
        if (
            tol is not None
            and moments.count >= FEWEST_PROBES
            and _residual_estimate(op, sketch, moments, tol).converged
        ):
            break
    return _residual_estimate(op, sketch, moments, tol)


def _residual_estimate(op: LinearOperator, sketch: _Sketch, moments: ProbeMoments, tol: float | None) -> Estimate:
    rounding_error = rounding(op, math.sqrt(sketch.square + moments.mean_square))
    spent = sketch.products + moments.count
    return _estimate(sketch.trace + moments.samples, moments.stderr(), rounding_error, spent, tol)


def _xtrace(op: LinearOperator, num_probes: int, tol: float | None, seed: int) -> Estimate:
    most = num_probes // 2
    sketch = RangeSketch(op, most, seed)
    target = most if tol is None else min(most, FEWEST_PROBES)
    while True:
        sketch.grow(target - sketch.num_probes)
        gram = sketch.gram()
        mean = gram.trace()
        result = _estimate(mean.samples, mean.stderr, rounding(op, gram.frobenius()), sketch.products, tol)
        if target == most or (tol is not None and result.converged):
            return result
        target = min(most, target + max(1, target // 2))
