"""sharpscope for the trap suite."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from curvature_traps import Adapter, Eigenvalues, Problem, Solved
from sharpscope import (
    GGN,
    Fisher,
    GradientCovariance,
    Hessian,
    NotConvergedWarning,
    Objective,
    Sharpness,
    Trajectory,
    replay,
    solve,
    spectral_density,
    top_eigenvalues,
    trace,
)
from torch import Tensor


class Sharpscope(Adapter):
    name = "sharpscope"
    version = version("sharpscope")
    packages = ("sharpscope",)

    def __init__(self, engine: str = "auto") -> None:
        self.engine = engine  # of the operators that a trap asks for without naming one

    def engines(self) -> tuple[str, ...]:
        return ("auto", "double-backward", "forward-over-reverse", "finite-difference", "compiled")

    def _objective(self, problem: Problem) -> Objective:
        split = None if problem.paired else problem.split
        return Objective.supervised(problem.model, problem.criterion, problem.batches, split=split, mode=problem.mode)

    def hessian(self, problem: Problem, engine: str | None = None) -> Hessian:
        return Hessian(self._objective(problem), engine=engine or self.engine)

    def products(self, operator: Any, V: Tensor) -> Tensor:
        return operator @ V

    def ggn(self, problem: Problem) -> GGN:
        return GGN(self._objective(problem))

    def empirical_fisher(self, problem: Problem) -> Fisher:
        return Fisher(self._objective(problem), kind="empirical")

    def gradient_covariance(self, problem: Problem) -> GradientCovariance:
        return GradientCovariance(self._objective(problem))

    def top_eigenvalues(
        self, operator: Any, num: int, *, which: str = "LM", tol: float = 1e-3, max_products: int | None = None
    ) -> Eigenvalues:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            found = top_eigenvalues(operator, num, which=which, tol=tol, max_products=max_products)
        return Eigenvalues(found.values.tolist(), found.converged, found.residuals.tolist())

    def trace(self, operator: Any, num_products: int) -> float:
        return trace(operator, method="hutchinson", num_probes=num_products).estimate

    def density(self, operator: Any, num_steps: int, num_probes: int) -> list[tuple[Tensor, Tensor]]:
        found = spectral_density(operator, num_steps=num_steps, num_probes=num_probes)
        return list(zip(found.nodes, found.weights, strict=True))

    def solve(self, operator: Any, b: Tensor, tol: float) -> Solved:
        found = solve(operator, b, method="cg", tol=tol)
        return Solved(found.x, found.converged)

    def replay(self, problem: Problem, checkpoints: Sequence[Mapping[str, Tensor]]) -> list[float]:
        with TemporaryDirectory() as folder, Trajectory.open(Path(folder) / "replay") as trajectory:
            replay(self._objective(problem), list(enumerate(checkpoints)), [Sharpness(every=1)], trajectory)
            _, values, _ = trajectory.series("sharpness")
        return values.tolist()


adapter = Sharpscope()
