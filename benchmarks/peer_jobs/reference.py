"""What the results are judged by: float64, by double backward through torch alone, and eigenvalues by SciPy.

sharpscope's own float64 eigenvalues must agree, or nothing is certified.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from .cases import Case

# SciPy and sharpscope must agree to this share of the largest eigenvalue.
AGREEMENT = 1e-7
# Eigenvalues more than are asked for, so that one that was passed over is recognised.
SPARE = 3


class Exact:
    """Products in float64 with graphs kept, one for each batch."""

    def __init__(self, case: Case) -> None:
        self.case = case.double()
        self._weight = 1 / len(self.case.batches)
        self._gradients: list[tuple[Tensor, ...]] = []

    def _kept(self) -> list[tuple[Tensor, ...]]:
        if not self._gradients:
            case = self.case
            self._gradients = [
                torch.autograd.grad(case.criterion(case.model(x), y), case.parameters, create_graph=True)
                for x, y in case.batches
            ]
        return self._gradients

    def hvp(self, v: Tensor) -> Tensor:
        """H v [n]."""
        parts, total = self.case.split(v.double()), torch.zeros(len(v), dtype=torch.float64)
        for gradient in self._kept():
            found = torch.autograd.grad(
                gradient, self.case.parameters, parts, retain_graph=True, materialize_grads=True
            )
            total += self._weight * flat(found)
        return total

    def ggn(self, v: Tensor) -> Tensor:
        """J^T (Hessian of the criterion) J v [n]; J v by differentiating the backward pass by its input."""
        case, parts, total = self.case, self.case.split(v.double()), torch.zeros(len(v), dtype=torch.float64)
        for x, y in case.batches:
            z = case.model(x)
            dual = torch.zeros_like(z, requires_grad=True)
            pulled = torch.autograd.grad(z, case.parameters, dual, create_graph=True)
            (moved,) = torch.autograd.grad(pulled, dual, parts)
            by_output = torch.autograd.grad(case.criterion(z, y), z, create_graph=True)[0]
            (curved,) = torch.autograd.grad(by_output, z, moved, retain_graph=True)
            total += self._weight * flat(torch.autograd.grad(z, case.parameters, curved))
        return total

    def blocks(self, v: Tensor) -> Tensor:
        """The diagonal block of each parameter tensor times its part of v, all in one vector [n]."""
        parts, total = self.case.split(v.double()), torch.zeros(len(v), dtype=torch.float64)
        for gradient in self._kept():
            found = [
                torch.autograd.grad(g, p, part, retain_graph=True, materialize_grads=True)[0]
                for g, p, part in zip(gradient, self.case.parameters, parts, strict=True)
            ]
            total += self._weight * flat(found)
        return total


class ScipyHessian(LinearOperator):
    """The exact Hessian for SciPy."""

    def __init__(self, case: Case) -> None:
        super().__init__(np.float64, (case.num_parameters, case.num_parameters))
        self._exact = Exact(case)

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._exact.hvp(torch.from_numpy(np.ravel(x))).numpy()


def flat(result: Any) -> Tensor:
    """A result, flat or as a list of tensors, as one float64 vector."""
    parts = [result] if isinstance(result, Tensor) else list(result)
    return torch.cat([torch.as_tensor(part).detach().reshape(-1).double() for part in parts])


def relative_error(result: Any, exact: Tensor) -> float:
    """|result - exact| / |exact|."""
    return float((flat(result) - exact).norm() / exact.norm())


def eigenvalue_error(found: Tensor, exact: Tensor) -> float:
    """Largest error of the eigenvalues of largest modulus, over the largest modulus.

    Two demands: the j-th largest modulus is that of the j-th largest exact one, and every value lies at an exact
    eigenvalue of its own, `exact` being longer than `found`. Together they ask for the right values but let two of
    equal modulus and unlike sign change places.
    """
    if len(found) == 0 or not bool(torch.isfinite(found).all()):
        return float("inf")
    found, exact = found.double(), exact[exact.abs().argsort(descending=True)]
    moduli = (found.abs().sort(descending=True).values - exact[: len(found)].abs()).abs().max()
    distances = (found[:, None] - exact[None, :]).abs().numpy()
    rows, columns = linear_sum_assignment(distances)
    return float(max(moduli, distances[rows, columns].max()) / exact[0].abs())


def eigenvalue_reference(case: Case, k: int, folder: Path) -> Tensor:
    """The k + SPARE eigenvalues of largest modulus, descending in it; kept in `folder` for the same weights and data.

    Raises:
        RuntimeError: SciPy's eigenvalues and sharpscope's are not the same.
    """
    file = folder / f"eigenvalues-{case.name}-{k}-{case.fingerprint()}.json"
    if file.exists():
        return torch.tensor(json.loads(file.read_text()), dtype=torch.float64)
    values, theirs = by_scipy(case, k + SPARE), by_sharpscope(case, k)
    if (apart := eigenvalue_error(theirs, values)) > AGREEMENT:
        raise RuntimeError(f"{case.name}: SciPy and sharpscope differ by {apart:.1e} of the largest eigenvalue")
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(values.tolist()))
    partial.replace(file)
    return values


def by_scipy(case: Case, count: int) -> Tensor:
    """Eigenvalues of largest modulus by ARPACK on double backward in float64."""
    start = np.random.default_rng(0).standard_normal(case.num_parameters)
    options: dict[str, Any] = {"which": "LM", "ncv": 3 * count, "tol": 1e-6, "v0": start}
    values = torch.from_numpy(eigsh(ScipyHessian(case), k=count, return_eigenvectors=False, **options))
    return values[values.abs().argsort(descending=True)]


def by_sharpscope(case: Case, count: int) -> Tensor:
    from sharpscope import Hessian, Objective, top_eigenvalues

    double = case.double()
    data = double.batches[0] if len(double.batches) == 1 else double.batches
    objective = Objective.supervised(double.model, double.criterion, data)
    return top_eigenvalues(Hessian(objective), count, which="LM", tol=1e-8).values
