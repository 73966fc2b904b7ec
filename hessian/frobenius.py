"""The Frobenius norm of a symmetric operator from products with random vectors, with its standard error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.accurate import dot, project
from .estimate import Estimate
from .lanczos import plain_tensors
from .operator import LinearOperator
from .plan import planned
from .planners import plan_frobenius
from .probes import (
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
from .sketch import RangeSketch

# Methods, and the fewest products from which each can give an error.
FEWEST_PRODUCTS = {"hutchinson": 2, "xtrace": 4, "exact": 1}


@planned(plan_frobenius)
def frobenius_norm(op: LinearOperator, *, method: str = "xtrace", num_probes: int = 30, seed: int = 0) -> Estimate:
    r"""‖A‖_F = √(Σ_ij a_ij²) = √(Σ_i λ_i²).

    - "xtrace": ‖A Qᵀ‖_F² exactly on a sketch Q, the rest from probes that the sketch has not seen, each of m/2 probes
      in turn. Far more accurate where eigenvalues decay; holds 3m/2 vectors.
    - "hutchinson": √ of the mean of ‖A z‖² over random signs z; holds a few vectors.
    - "exact": n products, as every method when `num_probes` is n or more.

    The truth lies within three standard errors in more than 95 of 100 runs from eight products on.

    Args:
        op: Symmetric, shape [n, n].
        method: As above.
        num_probes: Products to spend, m.
        seed: Of the probes; the global random state is not touched.

    Returns:
        An `Estimate` of the norm, whose `samples` are those of its square.

    Source: Epperly, Tropp and Webber, XTrace, 2024, whose samples for the trace of A²
    need products with A only.
    """
    check_method(method, FEWEST_PRODUCTS)
    check_num_probes(num_probes, 1)
    op.expect(op.shape[0] if method == "exact" else min(num_probes, op.shape[0]))
    with plain_tensors(), op.fixed():
        if method == "exact" or num_probes >= op.shape[0]:
            _, squares = exact_columns(op)
            value = math.sqrt(float(squares.sum()))
            return Estimate(value, exact_rounding(op, value), squares.sum().cpu().reshape(1), op.shape[0])
        check_num_probes(num_probes, FEWEST_PRODUCTS[method], method)
        if method == "hutchinson":
            samples, variance, spent = _plain_squares(op, num_probes, seed)
        else:
            sketch = RangeSketch(op, num_probes // 2, seed)
            sketch.grow(num_probes // 2)
            mean = sketch.gram().squared_norm()
            samples, variance, spent = mean.samples, mean.stderr**2, sketch.products
    value = math.sqrt(float(samples.mean()))
    stderr = math.sqrt(variance) / (2 * value) if value > 0 else 0.0  # of a square root
    return Estimate(value, math.hypot(stderr, rounding(op, value)), samples, spent)


def _plain_squares(op: LinearOperator, num_probes: int, seed: int) -> tuple[Tensor, float, int]:
    """Samples ‖A z‖² [m], the variance of their mean, products.

    Var ‖A z‖² is at most 2 ‖A²‖_F², which E (A z · A z')² equals for two probes: a group of g probes has g (g − 1) / 2
    such pairs. With a few heavy-tailed samples their own variance is too often too small, so the larger one is taken.
    """
    generator = random_generator(op, seed)
    samples, pairs = [], []
    for size in probe_groups(op, num_probes):
        images = products(op, rademacher(op, size, generator))
        for i, image in enumerate(images):
            samples.append(checked_finite(dot(image, image), op, len(samples) + 1))
            pairs.append(project(images[:i], image).cpu())
    squares = torch.tensor(samples, dtype=torch.float64)
    own = float(squares.var())
    crossed = torch.cat(pairs)
    variance = max(own, 2 * float(crossed.square().mean())) if len(crossed) else own
    return squares, variance / num_probes, num_probes
