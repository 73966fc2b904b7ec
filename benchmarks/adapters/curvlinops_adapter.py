"""curvlinops 3.0.1 for the trap suite; eigenvalues through SciPy, as in its examples."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from curvature_traps import Adapter, Eigenvalues, Problem, Solved
from curvlinops import (
    CGInverseLinearOperator,
    EFLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    hutchinson_trace,
    lanczos_approximate_spectrum,
)
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from torch import Tensor


class Curvlinops(Adapter):
    name = "curvlinops"
    version = version("curvlinops-for-pytorch")
    packages = ("curvlinops", "scipy")

    def _operator(self, kind: Any, problem: Problem) -> Any:
        options = {}
        if isinstance(problem.split(problem.whole)[0], Mapping):
            options["batch_size_fn"] = lambda inputs: len(next(iter(inputs.values())))
        return kind(problem.model, problem.criterion, problem.parameters, problem.pairs(), **options)

    def hessian(self, problem: Problem, engine: str | None = None) -> Any:
        return self._operator(HessianLinearOperator, problem)

    def products(self, operator: Any, V: Tensor) -> Tensor:
        return operator @ V

    def ggn(self, problem: Problem) -> Any:
        return self._operator(GGNLinearOperator, problem)

    def empirical_fisher(self, problem: Problem) -> Any:
        return self._operator(EFLinearOperator, problem)

    def top_eigenvalues(
        self, operator: Any, num: int, *, which: str = "LM", tol: float = 1e-3, max_products: int | None = None
    ) -> Eigenvalues:
        budget = {}
        if max_products is not None:
            # SciPy counts restarts: each costs what the basis gains.
            basis = min(operator.shape[0], max_products, max(2 * num + 1, 20))
            budget = {"ncv": basis, "maxiter": 1 + max(0, max_products - basis) // max(1, basis - num)}
        converged = True
        try:
            values = eigsh(operator.to_scipy(), k=num, which=which, tol=tol, return_eigenvectors=False, **budget)
        except ArpackNoConvergence as error:
            values, converged = error.eigenvalues, False
            values = list(values) + [float("nan")] * (num - len(values))
        key = abs if which == "LM" else float
        return Eigenvalues(sorted(values, key=key, reverse=which != "SA"), converged)

    def trace(self, operator: Any, num_products: int) -> float:
        return float(hutchinson_trace(operator, num_products))

    def density(self, operator: Any, num_steps: int, num_probes: int) -> list[tuple[Tensor, Tensor]]:
        return [lanczos_approximate_spectrum(operator, num_steps, num_repeats=num_probes)]

    def solve(self, operator: Any, b: Tensor, tol: float) -> Solved:
        return Solved(CGInverseLinearOperator(operator, tolerance=tol) @ b)


adapter = Curvlinops()
