"""The truth: dense float64 curvature by plain loops, from torch.autograd alone and from no tool under test."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .problem import Problem


def _double(problem: Problem) -> tuple[nn.Module, list[Tensor], Any, Any]:
    """A float64 copy of the reference model, its analysed parameters, and the whole data as (inputs, targets)."""
    wanted = [p.requires_grad for p in problem.model.parameters()]
    source = problem.reference if problem.reference is not None else problem.model
    model = copy.deepcopy(source).double().train(problem.mode == "train")
    if problem.reference is not None:
        with torch.no_grad():
            for mine, live in zip(model.parameters(), problem.model.parameters(), strict=True):
                mine.copy_(live)
    parameters: list[Tensor] = [p for p, flag in zip(model.parameters(), wanted, strict=True) if flag]
    for p in parameters:
        p.requires_grad_()
    inputs, targets = problem.split(problem.whole)
    return model, parameters, _as_double(inputs), _as_double(targets)


def _as_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return {key: _as_double(item) for key, item in value.items()}


def _criterion(problem: Problem) -> Any:
    criterion = problem.criterion
    return copy.deepcopy(criterion).double() if isinstance(criterion, nn.Module) else criterion


def _flat(tensors: Any, like: list[Tensor]) -> Tensor:
    """One vector; a gradient that does not exist is zero."""
    return torch.cat(
        [(torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in zip(tensors, like, strict=True)]
    )


def _rows(values: Tensor, parameters: list[Tensor]) -> Tensor:
    """The Jacobian [m, n] of values [m], row by row."""
    n = sum(p.numel() for p in parameters)
    rows = []
    for value in values.reshape(-1):
        if value.requires_grad:
            gradient = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            rows.append(_flat(gradient, parameters).detach())
        else:
            rows.append(torch.zeros(n, dtype=torch.float64))
    return torch.stack(rows)


def hessian(problem: Problem) -> Tensor:
    """∇²L [n, n] at the model's present weights."""
    with torch.enable_grad(), torch.inference_mode(False):
        model, parameters, inputs, targets = _double(problem)
        loss = _criterion(problem)(model(inputs), targets)
        gradient = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        matrix = _rows(_flat(gradient, parameters), parameters)
    return (matrix + matrix.T) / 2


def example_gradients(problem: Problem) -> Tensor:
    """∇ℓᵢ [N, n] of every example by itself."""
    model, parameters, inputs, targets = _double(problem)
    criterion = _criterion(problem)
    losses = [criterion(model(inputs[i : i + 1]), targets[i : i + 1]) for i in range(len(targets))]
    return _rows(torch.stack(losses), parameters)


def gauss_newton(problem: Problem) -> Tensor:
    """(1/N) Σ Jᵢᵀ ∇²ℓᵢ Jᵢ [n, n]."""
    model, parameters, inputs, targets = _double(problem)
    criterion = _criterion(problem)
    total: Tensor | float = 0.0
    for i in range(len(targets)):
        prediction = model(inputs[i : i + 1])
        jacobian = _rows(prediction, parameters)
        leaf = prediction.detach().requires_grad_()
        (slope,) = torch.autograd.grad(criterion(leaf, targets[i : i + 1]), leaf, create_graph=True)
        total = total + jacobian.T @ _rows(slope, [leaf]) @ jacobian
    assert isinstance(total, Tensor)
    return total / len(targets)
