"""hessian-eigenthings 1.0.0a5 for the trap suite, used as in its README."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from curvature_traps import Adapter, Eigenvalues, Problem
from hessian_eigenthings import (
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
    lanczos,
    spectral_density,
    supervised_per_sample_loss,
    trace,
)
from torch import Tensor


class HessianEigenthings(Adapter):
    name = "hessian-eigenthings"
    version = version("hessian-eigenthings")
    packages = ("hessian_eigenthings",)

    def engines(self) -> tuple[str, ...]:
        return ("autograd", "finite_difference")

    def hessian(self, problem: Problem, engine: str | None = None) -> Any:
        return HessianOperator(problem.model, problem.batches, problem.loss, method=engine or "autograd")

    def ggn(self, problem: Problem) -> Any:
        return GGNOperator(
            problem.model,
            problem.batches,
            lambda model, batch: model(problem.split(batch)[0]),
            lambda output, batch: problem.criterion(output, problem.split(batch)[1]),
        )

    def empirical_fisher(self, problem: Problem) -> Any:
        return EmpiricalFisherOperator(problem.model, problem.batches, supervised_per_sample_loss(problem.criterion))

    def top_eigenvalues(
        self, operator: Any, num: int, *, which: str = "LM", tol: float = 1e-3, max_products: int | None = None
    ) -> Eigenvalues:
        budget = {} if max_products is None else {"max_iter": min(max_products, operator.size)}
        found = lanczos(operator, k=num, tol=tol, which=which, **budget)
        return Eigenvalues(found.eigenvalues.tolist(), found.converged.tolist(), found.residuals.tolist())

    def trace(self, operator: Any, num_products: int) -> float:
        return trace(operator, num_matvecs=num_products, method="hutchinson").estimate

    def density(self, operator: Any, num_steps: int, num_probes: int) -> list[tuple[Tensor, Tensor]]:
        found = spectral_density(operator, num_runs=num_probes, lanczos_steps=num_steps)
        return list(zip(found.raw_eigenvalues, found.raw_weights, strict=True))


adapter = HessianEigenthings()
