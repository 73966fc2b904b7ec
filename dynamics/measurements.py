"""Measurements of one number at a point: loss, gradient, curvature along a direction, what the optimizer allows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from torch import Tensor

from ..kernels.accurate import dot, norm
from .optimizers.thresholds import sharpness_threshold_of
from .point import Point
from .row import Row


@dataclass(frozen=True)
class Loss:
    """Mean loss over the objective's data."""

    every: int | None = None
    _: KW_ONLY
    name: str = "loss"

    def measure(self, point: Point) -> Iterator[Row]:
        yield Row(self.name, point.loss())


@dataclass(frozen=True)
class GradientNorm:
    """‖g‖ for the gradient g of the objective, which the optimizer's minibatch gradient only estimates."""

    every: int | None = None
    _: KW_ONLY
    name: str = "gradient_norm"

    def measure(self, point: Point) -> Iterator[Row]:
        yield Row(self.name, float(norm(point.gradient())))


@dataclass(frozen=True)
class GradientCurvature:
    """gᵀHg / gᵀg: curvature along the gradient. NaN where the gradient is zero."""

    every: int | None = None
    _: KW_ONLY
    name: str = "gradient_curvature"

    def measure(self, point: Point) -> Iterator[Row]:
        yield _curvature_along(point.gradient(), point, self.name)


@dataclass(frozen=True)
class UpdateCurvature:
    """uᵀHu / uᵀu for the last parameter change u = θ_t − θ_(t−1), at θ_t.

    No row at the first step, nor where only weights are known (`replay`); NaN where nothing moved.
    """

    every: int | None = None
    _: KW_ONLY
    name: str = "update_curvature"

    needs_update: ClassVar[bool] = True

    def measure(self, point: Point) -> Iterator[Row]:
        if point.update is not None:
            yield _curvature_along(point.update, point, self.name)


@dataclass(frozen=True)
class StabilityThreshold:
    """The sharpness at which the optimizer's next step becomes unstable, e.g. 2/η; see `stability_threshold_of`.

    No row, and one warning, where there is no single threshold of the sharpness: for adaptive optimizers it lies in
    their own geometry; see `ThresholdRatio`.
    """

    every: int | None = None
    _: KW_ONLY
    name: str = "stability_threshold"

    def measure(self, point: Point) -> Iterator[Row]:
        threshold = None if point.optimizer is None else sharpness_threshold_of(point.optimizer)
        if threshold is not None:
            yield Row(self.name, threshold, error=0.0)
        elif point.optimizer is not None:
            warnings.warn(
                f"no single stability threshold of the sharpness is known for {type(point.optimizer).__name__} with "
                "these settings (it is for SGD with equal groups); measurement 'stability_threshold' records nothing; "
                "'threshold_ratio' may",
                stacklevel=2,
            )


def _curvature_along(direction: Tensor, point: Point, name: str) -> Row:
    """vᵀHv / vᵀv with the error of one product, which is at most relative_error · ‖H‖ and at least this much."""
    length = float(norm(direction))
    if length == 0.0 or not math.isfinite(length):
        return Row(name, math.nan, converged=False)
    op = point.hessian()
    v = (direction / length).to(op.device, op.dtype)  # unit: an update may be tiny
    product = op @ v
    return Row(name, float(dot(v, product) / dot(v, v)), error=op.relative_error * float(norm(product)), products=1)
