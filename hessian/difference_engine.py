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
    product of every block of parameters, where two neighbouring steps agree best along several directions; their
    disagreement is the stated error. It needs only first derivatives; four gradients a product. Networks with kinks
    (ReLU) keep an error of some per cent at any step, and it is stated.
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
        self._calibrations: dict[tuple[int, ...], tuple[float, float]] = {}

    def verify(self) -> None:
        """First derivatives need no check."""

    @property
    def relative_error(self) -> float:
        return self.relative_error_of(range(len(self.objective.layout.names)))

    def relative_error_of(self, subset: Sequence[int]) -> float:
        return self._calibrated(subset)[1]

    @property
    def step(self) -> float:
        """Length of the step h along a unit vector over all parameters."""
        return self._calibrated(range(len(self.objective.layout.names)))[0]

    def local_matmat(self, V: Tensor, subset: Sequence[int]) -> Tensor:
        step, _ = self._calibrated(subset)
        columns = [self._product(V[:, j], subset, step) for j in range(V.shape[1])]
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

    def _calibrated(self, subset: Sequence[int]) -> tuple[float, float]:
        """Step and relative error for a block of parameters at the current weights."""
        token = self.objective.state_token()
        if token != self._token:
            self._calibrations, self._token = {}, token
        key = tuple(subset)
        if key not in self._calibrations:
            self._calibrations[key] = self._calibrate(key)
        return self._calibrations[key]

    def _calibrate(self, subset: tuple[int, ...]) -> tuple[float, float]:
        """The step at which products along three directions change least to the next step, and by how much.

        The directions: the gradient, random, and the product with the gradient, where stiff directions show.
        """
        objective = self.objective
        names = [objective.layout.names[i] for i in subset]
        tensors = objective.parameters
        squares = sum(float(tensors[name].detach().double().square().sum()) for name in names)
        steps = [step * max(1.0, squares**0.5) for step in STEPS]
        by_name = objective.unflatten(objective.gradient())
        gradient = torch.cat([by_name[name].reshape(-1) for name in names])
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(len(gradient), generator=generator, dtype=torch.float64).to(gradient)
        trials = [self._trials(probe, subset, steps) for probe in (gradient, random)]
        middle = trials[0][len(steps) // 2]
        trials.append(self._trials(torch.nan_to_num(middle), subset, steps))
        errors = [_disagreement([t[i] for t in trials], [t[i + 1] for t in trials]) for i in range(len(steps) - 1)]
        # Rounding swallows the smallest steps whole, and zeros agree perfectly: they count only if all are zero.
        best = min(range(len(errors)), key=lambda i: errors[i] if errors[i] > 0 else float("inf"))
        if not errors[best] < 1:
            raise NotTwiceDifferentiable("no step gives differences of gradients that agree with the next one")
        return steps[best + 1], SAFETY * max(errors[best], objective.coarsest_eps)

    def _trials(self, probe: Tensor, subset: Sequence[int], steps: Sequence[float]) -> list[Tensor]:
        """Products with the unit vector along `probe` at every step; zeros for a zero vector."""
        length = float(probe.double().norm())
        unit = probe / length if length > 0 else probe
        return [self._trial(unit, subset, step) for step in steps]

    def _trial(self, unit: Tensor, subset: Sequence[int], step: float) -> Tensor:
        """A product at one step; NaN where the step leaves the loss's domain."""
        try:
            return self.objective.all_reduce(self._product(unit, subset, step))
        except ValueError:
            return torch.full_like(unit, torch.nan)


def _disagreement(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The largest ‖first − second‖ over the largest of the products."""
    difference = max(float((b - a).double().norm()) for a, b in zip(first, second, strict=True))
    size = max(min(float(a.double().norm()), float(b.double().norm())) for a, b in zip(first, second, strict=True))
    if difference == 0:
        return 0.0
    ratio = difference / size if size > 0 else float("inf")
    return ratio if ratio == ratio else float("inf")
