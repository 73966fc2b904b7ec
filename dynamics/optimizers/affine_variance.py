"""How much minibatch gradients differ: the constants of the affine variance condition.

Source: Zhang, Chen, Shi, Sun, Luo, Adam Can Converge Without Any Modification On Update Rules, NeurIPS 2022,
assumption on the affine variance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ...landscape.objective import Objective
from .schedules import Values


@dataclass(frozen=True)
class AffineVariance:
    """Σ_i ‖∇ℓ_i‖² <= D1 ‖∇ℓ‖² + D0 at all points looked at.

    Attributes:
        D1, D0: The tightest such line: least Σ of its distances above the points. Elsewhere it may be exceeded.
        n: Number of minibatches.
        full: ‖∇ℓ‖² at each point.
        sums: Σ_i ‖∇ℓ_i‖² at each point.
    """

    D1: float
    D0: float
    n: int
    full: Values
    sums: Values

    @property
    def noise_ratio(self) -> Values:
        """Mean of ‖∇ℓ_i‖² over ‖∇ℓ‖² at each point; 1 where all minibatches agree."""
        return self.sums / (self.n * self.full)


def affine_variance(full: ArrayLike, sums: ArrayLike, n: int) -> AffineVariance:
    """The tightest line D1 x + D0 above points (x = ‖∇ℓ‖², y = Σ‖∇ℓ_i‖²), D1 and D0 not negative.

    A linear programme in two unknowns, solved at its vertices: the upper convex hull of the points, and the two axes.
    """
    x, y = np.atleast_1d(np.asarray(full, np.float64)), np.atleast_1d(np.asarray(sums, np.float64))
    if x.shape != y.shape or x.ndim != 1 or not (np.isfinite(x).all() and np.isfinite(y).all() and (x >= 0).all()):
        raise ValueError("`full` and `sums` must be finite, as many of one as of the other, `full` not negative")
    lines = [(0.0, float(y.max()))]
    if (x > 0).all():
        lines.append((float((y / x).max()), 0.0))
    hull = _upper_hull(x, y)
    for (x1, y1), (x2, y2) in pairwise(hull):
        slope = (y2 - y1) / (x2 - x1)
        lines.append((slope, y1 - slope * x1))
    allowed = [(d1, d0) for d1, d0 in lines if d1 >= 0 and d0 >= 0]
    D1, D0 = min(allowed, key=lambda line: line[0] * float(x.mean()) + line[1])
    return AffineVariance(D1, D0, n, x, y)


def estimate_D1_D0(
    objective: Objective, points: int | Iterable[Tensor] = 8, *, spread: float = 0.1, seed: int = 0
) -> AffineVariance:
    """D1 and D0 of a loss from its minibatch gradients at several points; ℓ_i is the loss of the i-th batch.

    The weights of the model are left as they are. Costs one gradient of the whole data for each point.

    Args:
        objective: Its data in the batches of training, several of them.
        points: Flat weight vectors [n], for example along a training run; or a number, for the present weights and
            Gaussian steps from them.
        spread: Length of such a step over that of the weights.
        seed: Of the steps.
    """
    n = objective.num_batches
    if n < 2:
        raise ValueError(f"`objective` has {n} batch; give the data in the minibatches of training, at least 2")
    full, sums = [], []
    for theta in _points(objective, points, spread, seed):
        mean, total = torch.zeros_like(theta, dtype=torch.float64), 0.0
        for gradient in batch_gradients(objective, theta):
            mean += gradient.double() / n
            total += float(gradient.double().square().sum())
        full.append(float(mean.square().sum()))
        sums.append(total)
    return affine_variance(full, sums, n)


def batch_gradients(objective: Objective, theta: Tensor) -> Iterator[Tensor]:
    """∇ℓ_i [n] at flat weights θ for each batch i, where the mean of all ℓ_i is the objective."""
    n = objective.num_batches
    tensors = [t.requires_grad_() for t in objective.unflatten(theta.detach().clone()).values()]
    with objective.evaluation(tensors) as leaves:
        total, number = torch.zeros_like(theta), 0
        for chunk in objective.chunks():
            if chunk.number != number:
                yield total
                total, number = torch.zeros_like(theta), chunk.number
            parts = torch.autograd.grad(objective.chunk_loss(chunk, leaves), leaves, allow_unused=True)
            total = total + n * chunk.weight * objective.join(parts)
        yield total


def _points(objective: Objective, points: int | Iterable[Tensor], spread: float, seed: int) -> Iterator[Tensor]:
    if not isinstance(points, int):
        yield from points
        return
    here = objective.flatten(objective.parameters).detach()
    stream = torch.Generator().manual_seed(seed)
    for i in range(points):
        step = torch.randn(here.shape, generator=stream, dtype=torch.float64).to(here)
        yield here + (spread * here.norm() / step.norm() * step if i else 0.0)


def _upper_hull(x: Values, y: Values) -> list[tuple[float, float]]:
    """Corners from left to right; of several points at one x the highest."""
    order = np.lexsort((-y, x))
    hull: list[tuple[float, float]] = []
    for i in order:
        point = (float(x[i]), float(y[i]))
        if hull and point[0] == hull[-1][0]:
            continue
        while len(hull) >= 2 and _turns_up(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _turns_up(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[0] - a[0]) * (c[1] - a[1]) >= (c[0] - a[0]) * (b[1] - a[1])
