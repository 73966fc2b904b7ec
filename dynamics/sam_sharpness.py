"""Measurements of the curvature that sharpness-aware minimization feels."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

from ..kernels.accurate import norm
from ..landscape.sharpness import average_sharpness, sam_sharpness
from .optimizers.sam import SAM, sam_edge
from .optimizers.thresholds import stability_threshold_of
from .point import Point
from .row import Row


@dataclass(frozen=True)
class SAMSharpness:
    """L(θ + ε) − L(θ) along the gradient at radius ρ, over the objective's data; see `sam_sharpness`.

    The gradient is that of the point; beyond it each ascent step but the first takes another one, and one loss.

    Args:
        every: Period in steps.
        rho: Radius, in units of the weights.
        adaptive: Measure it in units of each weight.
        ascent_steps: Gradient steps to the radius.
    """

    every: int | None = None
    rho: float = 0.05
    adaptive: bool = False
    _: KW_ONLY
    ascent_steps: int = 1
    name: str = "sam_sharpness"

    def measure(self, point: Point) -> Iterator[Row]:
        loss, gradient = point.loss(), point.gradient()
        start = time.perf_counter()
        value = sam_sharpness(point.objective, self.rho, self.adaptive, self.ascent_steps, loss=loss, gradient=gradient)
        yield Row(self.name, value, seconds=time.perf_counter() - start)


@dataclass(frozen=True)
class AverageSharpness:
    """E L(θ + σz) − L(θ) over normal z with its standard error; see `average_sharpness`.

    Args:
        every: Period in steps.
        sigma: σ, in units of the weights.
        num_pairs: Pairs ±z, the same at every point.
        seed: Of z.
    """

    every: int | None = None
    sigma: float = 0.01
    num_pairs: int = 8
    _: KW_ONLY
    seed: int = 0
    name: str = "average_sharpness"

    def measure(self, point: Point) -> Iterator[Row]:
        loss = point.loss()
        start = time.perf_counter()
        result = average_sharpness(point.objective, self.sigma, self.num_pairs, seed=self.seed, loss=loss)
        yield Row(self.name, result.estimate, result.stderr, seconds=time.perf_counter() - start)


@dataclass(frozen=True)
class SAMEdge:
    """The curvature at which a step of the run's normalised SAM stops to reduce a quadratic; see `sam_edge`.

    With the gradient of the objective's data. No row where the optimizer is another one, is switched off, is
    unnormalised or adaptive, has groups that differ, or has a base without a threshold.
    """

    every: int | None = None
    _: KW_ONLY
    name: str = "sam_edge"

    def measure(self, point: Point) -> Iterator[Row]:
        optimizer = point.optimizer
        if not isinstance(optimizer, SAM) or not optimizer.moves_along_gradients:
            return
        options = {tuple(group[key] for key in optimizer.options) for group in optimizer.param_groups}
        threshold = stability_threshold_of(optimizer.base)
        if len(options) != 1 or threshold is None or not optimizer.perturbs:
            return
        group = optimizer.param_groups[0]
        if group["normalize"] and not group["adaptive"]:
            yield Row(self.name, sam_edge(threshold, group["rho"], float(norm(point.gradient()))))
