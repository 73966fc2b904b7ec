"""Differences of gradients, with a calibrated step and an error estimate: for what has no second derivative in code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..landscape.objective import Objective
from .engines import Engine, NotTwiceDifferentiable

# Steps tried by the calibration, relative to max(1, ‖θ‖): truncation rules at the top, rounding at the bottom.
STEPS = tuple(10.0**-k for k in (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5))
SAFETY = 4.0


class FiniteDifference(Engine):
    """H v ≈ (4 D(h/2) − D(h)) / 3 with D(h) = (∇L(θ + h v) − ∇L(θ − h v)) / 2h, for unit v.

    Richardson's extrapolation of the central difference: error O(h⁴) + O(eps/h). The step is chosen at the first
    product, along the gradient and a random direction, where two neighbouring steps agree best; their disagreement is
    the stated error. It needs only first derivatives; four gradients a product. Networks with kinks (ReLU) keep an
    error of some per cent at any step, and it is stated.
    """

    name = "finite-difference"

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        if objective.coarsest_eps > torch.finfo(torch.float32).eps:
            raise NotTwiceDifferentiable(
                "differences of gradients drown in the rounding of half precision; pass dtype=torch.float32 to the "
                "Objective"
            )
        self._token: tuple | None = None
        self._step = 0.0
        self._error = 0.0

    def verify(self) -> None:
        """First derivatives need no check."""

    @property
    def relative_error(self) -> float:
        self._calibrate()
        return self._error

    @property
    def step(self) -> float:
        """Length of the step h along a unit vector."""
        self._calibrate()
        return self._step

    def local_matmat(self, V: Tensor, subset: Sequence[int]) -> Tensor:
        self._calibrate()
        columns = [self._product(V[:, j], subset, self._step) for j in range(V.shape[1])]
        return torch.stack(columns, dim=1)

    def _product(self, v: Tensor, subset: Sequence[int], step: float) -> Tensor:
        length = float(v.double().norm())
        if length == 0:
            return torch.zeros_like(v)
        unit = v / length
        coarse = self._central(unit, subset, step)
        fine = self._central(unit, subset, step / 2)
        return (4 * fine - coarse) * (length / 3)

    def _central(self, unit: Tensor, subset: Sequence[int], step: float) -> Tensor:
        return (self._gradient(unit, subset, step) - self._gradient(unit, subset, -step)) / (2 * step)

    def _gradient(self, unit: Tensor, subset: Sequence[int], step: float) -> Tensor:
        """∇L(θ + step · unit) on the subset, from copies: the live weights are not touched."""
        objective = self.objective
        with objective.evaluation() as theta:
            own = [theta[i] for i in subset]
            moved = list(theta)
            for i, direction in zip(subset, objective.split(unit, own), strict=True):
                moved[i] = (theta[i].detach() + step * direction).requires_grad_()
            points = [moved[i] for i in subset]
            total = torch.zeros_like(unit)
            with objective.replaced(moved):
                for chunk in objective.chunks():
                    loss = objective.chunk_loss(chunk, moved)
                    gradients = torch.autograd.grad(loss, points, allow_unused=True)
                    total += chunk.weight * objective.join(gradients, points)
        return total

    def _calibrate(self) -> None:
        token = self.objective.state_token()
        if token == self._token:
            return
        objective = self.objective
        everything = range(len(objective.layout.names))
        squares = sum(float(p.detach().double().square().sum()) for p in objective.parameters.values())
        scale = max(1.0, squares**0.5)
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(objective.num_parameters, generator=generator, dtype=torch.float64)
        random = random.to(objective.device, objective.dtype)
        gradient = objective.gradient()
        probes = [p / p.double().norm().to(p.dtype) for p in (gradient, random) if float(p.norm()) > 0]
        spread = [[] for _ in probes]
        for disagreements, probe in zip(spread, probes, strict=True):
            before = None
            for step in STEPS:
                product = self._trial(probe, everything, step * scale)
                if before is not None:
                    disagreements.append(_disagreement(before, product))
                before = product
        # The gradient comes first: along it the product is large, as it is for the vectors an eigensolver asks for.
        leading = spread[0]
        # Rounding swallows the smallest steps whole, and zeros agree perfectly: they count only if all are zero.
        best = min(range(len(leading)), key=lambda i: leading[i] if leading[i] > 0 else float("inf"))
        if not leading[best] < 1:
            raise NotTwiceDifferentiable("no step gives differences of gradients that agree with the next one")
        self._step = STEPS[best + 1] * scale
        self._error = SAFETY * max(leading[best], objective.coarsest_eps)
        self._token = token

    def _trial(self, probe: Tensor, everything: Sequence[int], step: float) -> Tensor:
        """A product at one step of the calibration; NaN where the step leaves the loss's domain."""
        try:
            return self.objective.all_reduce(self._product(probe, everything, step))
        except ValueError:
            return torch.full_like(probe, torch.nan)


def _disagreement(first: Tensor, second: Tensor) -> float:
    """‖first − second‖ relative to the smaller of them; two zeros agree, since a step below rounding is caught by its
    neighbour."""
    sizes = [float(product.double().norm()) for product in (first, second)]
    difference = float((first - second).double().norm())
    if difference == 0 and min(sizes) == 0:
        return 0.0
    ratio = difference / min(sizes) if min(sizes) > 0 else float("inf")
    return ratio if ratio == ratio else float("inf")
