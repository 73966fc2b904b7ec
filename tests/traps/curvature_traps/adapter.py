"""What a tool has to provide so that the traps can be sprung on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .problem import Problem


class NotOffered(Exception):
    """The tool has no such feature: no verdict on this trap."""


@dataclass(frozen=True)
class Eigenvalues:
    """What a tool says about the wanted end of the spectrum.

    Args:
        values: In the order of the request: LA and LM descending (LM by size), SA ascending.
        converged: What the tool itself states: one flag, one per value, or None when it states nothing.
        residuals: The tool's own error bounds, if it gives any.
    """

    values: Sequence[float]
    converged: bool | Sequence[bool] | None = None
    residuals: Sequence[float] | None = None

    @property
    def claimed(self) -> list[bool]:
        """Per value: may a user take it for an answer? A tool that states nothing returns it as one."""
        if self.converged is None or isinstance(self.converged, bool):
            return [self.converged is not False] * len(self.values)
        return list(self.converged)


@dataclass(frozen=True)
class Solved:
    """x [n] with what the tool says about it: `reliable` is False when it reports failure, None when it is silent."""

    x: Tensor
    reliable: bool | None = None


class Adapter:
    """One tool. Write the methods that the tool has a feature for; the others stay and say so.

    An operator is whatever `hessian` returns: only this adapter looks inside it. Vectors are flat, in the order of
    the parameters that require grad, in the dtype of the model. Use the tool as its documentation says, with its
    defaults, and let its errors through: the suite tells a refusal of the tool's own from a crash by where it was
    raised, for which `packages` names the tool's import packages.
    """

    name: str = ""
    version: str = ""
    packages: tuple[str, ...] = ()

    def engines(self) -> tuple[str, ...]:
        """Names of the tool's ways to compute a Hessian product, the default one first."""
        return ("default",)

    def hessian(self, problem: Problem, engine: str | None = None) -> Any:
        """The operator of ∇²L for the problem, by the default engine or the named one."""
        raise NotOffered("no Hessian")

    def product(self, operator: Any, v: Tensor) -> Tensor:
        """A v [n] for v [n]."""
        return operator @ v

    def products(self, operator: Any, V: Tensor) -> Tensor:
        """A V [n, m] for V [n, m], at once where the tool can do that."""
        return torch.stack([self.product(operator, v) for v in V.unbind(dim=1)], dim=1)

    def ggn(self, problem: Problem) -> Any:
        """The operator of the generalised Gauss-Newton matrix (1/N) Σ Jᵢᵀ ∇²ℓᵢ Jᵢ."""
        raise NotOffered("no Gauss-Newton matrix")

    def empirical_fisher(self, problem: Problem) -> Any:
        """The operator of (1/N) Σ gᵢ gᵢᵀ."""
        raise NotOffered("no empirical Fisher")

    def gradient_covariance(self, problem: Problem) -> Any:
        """The operator of (1/N) Σ (gᵢ − ḡ)(gᵢ − ḡ)ᵀ."""
        raise NotOffered("no centred gradient covariance")

    def top_eigenvalues(
        self, operator: Any, num: int, *, which: str = "LM", tol: float = 1e-3, max_products: int | None = None
    ) -> Eigenvalues:
        """`num` eigenvalues: LM largest by size, LA largest, SA smallest. No budget means the tool's default."""
        raise NotOffered("no eigenvalues")

    def trace(self, operator: Any, num_products: int) -> float:
        """Hutchinson's estimate of the trace from Rademacher probes."""
        raise NotOffered("no trace")

    def density(self, operator: Any, num_steps: int, num_probes: int) -> list[tuple[Tensor, Tensor]]:
        """Spectral density as weighted points, (points [k], weights [k]) for each probe or once for all."""
        raise NotOffered("no spectral density")

    def solve(self, operator: Any, b: Tensor, tol: float) -> Solved:
        """A x = b by conjugate gradients."""
        raise NotOffered("no linear solver")

    def replay(self, problem: Problem, checkpoints: Sequence[Mapping[str, Tensor]]) -> list[float]:
        """The largest eigenvalue at each of the given state dicts."""
        raise NotOffered("no replay over checkpoints")
