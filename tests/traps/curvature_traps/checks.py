"""Comparisons with the truth that several traps share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import oracle
from .adapter import Adapter, Eigenvalues
from .outcome import NoAnswer, WrongAnswer
from .problem import Problem

# Rounding of a float32 product of a small network stays below 1e-5 of ‖A‖; a wrong weight or row is above 1e-2.
MATRIX_TOLERANCE = 1e-3


def matrix_of(tool: Adapter, operator: Any, problem: Problem) -> Tensor:
    """The tool's operator as a float64 matrix [n, n], column by column."""
    dtype = problem.parameters[0].dtype
    columns = []
    for i in range(problem.num_parameters):
        v = torch.zeros(problem.num_parameters, dtype=dtype)
        v[i] = 1.0
        columns.append(tool.product(operator, v).detach().double().reshape(-1))
    return torch.stack(columns, dim=1)


def same_matrix(matrix: Tensor, truth: Tensor, what: str = "", *, tolerance: float = MATRIX_TOLERANCE) -> str:
    """Compares two symmetric matrices; says λ_max of both and how far they are apart."""
    if matrix.shape != truth.shape:
        raise WrongAnswer(f"{what}the matrix is {list(matrix.shape)}, the truth {list(truth.shape)}")
    bad = int((~torch.isfinite(matrix)).sum())
    if bad:
        raise WrongAnswer(f"{what}{bad} of {matrix.numel()} entries are NaN or infinite")
    error = float((matrix - truth).norm() / truth.norm().clamp_min(1e-12))
    top = float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[-1])
    true_top = float(torch.linalg.eigvalsh(truth)[-1])
    detail = f"{what}λ_max {top:.4f}, truth {true_top:.4f}; matrix off by {error:.1g}"
    if error > tolerance:
        raise WrongAnswer(detail)
    return detail


def right_hessian(tool: Adapter, problem: Problem) -> str:
    """Every column of the tool's Hessian against the oracle."""
    operator = tool.hessian(problem)
    return same_matrix(matrix_of(tool, operator, problem), oracle.hessian(problem))


def right_gauss_newton(tool: Adapter, problem: Problem) -> str:
    """Every column of the tool's generalised Gauss-Newton matrix against the oracle."""
    operator = tool.ggn(problem)
    return same_matrix(matrix_of(tool, operator, problem), oracle.gauss_newton(problem))


def right_empirical_fisher(tool: Adapter, problem: Problem) -> str:
    """Every column of the tool's empirical Fisher matrix against the oracle."""
    operator = tool.empirical_fisher(problem)
    gradients = oracle.example_gradients(problem)
    return same_matrix(matrix_of(tool, operator, problem), gradients.T @ gradients / len(gradients))


def right_gradient_covariance(tool: Adapter, problem: Problem) -> str:
    """Every column of the tool's centred gradient covariance against the oracle."""
    operator = tool.gradient_covariance(problem)
    gradients = oracle.example_gradients(problem)
    centred = gradients - gradients.mean(dim=0)
    return same_matrix(matrix_of(tool, operator, problem), centred.T @ centred / len(centred))


def shown(values: Any) -> str:
    """A few numbers for a message."""
    return "[" + ", ".join(f"{float(v):.5g}" for v in values) + "]"


def right_eigenvalues(found: Eigenvalues, truth: list[float], *, tolerance: float, flags_suffice: bool = False) -> str:
    """Each value that the tool offers as an answer lies within tolerance · max |λ| of the true one at its place.

    Args:
        flags_suffice: Whether values that the tool itself flags as not converged are all that can be asked.
    """
    scale = max(abs(t) for t in truth)
    values = [float(v) for v in found.values]
    detail = f"{shown(values)}, truth {shown(truth)}"
    if len(values) != len(truth):
        raise WrongAnswer(f"{len(values)} values: {detail}")
    for value, true, claimed in zip(values, truth, found.claimed, strict=True):
        if claimed and not math.isclose(value, true, rel_tol=0.0, abs_tol=tolerance * scale):
            said = "without a flag" if found.converged is None else "flagged converged"
            raise WrongAnswer(f"{detail}, {said}")
    if not all(found.claimed):
        detail += f"; {found.claimed.count(False)} flagged as not converged"
        if not flags_suffice:
            raise NoAnswer(detail)
    return detail
