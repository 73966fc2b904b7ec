"""Traps in the parameters: tied, frozen, unused, flat, of unusual type."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import oracle
from .adapter import Adapter
from .checks import (
    matrix_of,
    right_eigenvalues,
    right_empirical_fisher,
    right_gauss_newton,
    right_hessian,
    same_matrix,
)
from .models import TiedLanguageModel, classification, cut, labelled, mlp
from .outcome import trap
from .problem import Problem


@trap("tied parameters", "parameters")
def tied_parameters(tool: Adapter) -> str:
    """An output layer tied to the embedding: the shared tensor counts once and both paths contribute."""
    generator = torch.Generator().manual_seed(6)
    whole = tuple(torch.randint(0, 6, (8, 5), generator=generator) for _ in range(2))
    return right_hessian(tool, Problem(TiedLanguageModel(), nn.CrossEntropyLoss(), [whole], whole))


@trap("frozen parameters", "parameters")
def frozen_parameters(tool: Adapter) -> str:
    """The first layer does not require grad: the Hessian is that of the other 18 parameters."""
    model = mlp()
    model[0].requires_grad_(False)
    return right_hessian(tool, classification(model, batches=cut(labelled())))


class _WithSpare(nn.Module):
    """Has a layer that its forward pass never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@trap("unused parameters", "parameters")
def unused_parameters(tool: Adapter) -> str:
    """A layer that requires grad but is never used has rows of zeros."""
    return right_hessian(tool, classification(_WithSpare()))


@trap("unused parameters, Gauss-Newton", "parameters")
def unused_parameters_gauss_newton(tool: Adapter) -> str:
    """The same for the generalised Gauss-Newton matrix."""
    return right_gauss_newton(tool, classification(_WithSpare()))


@trap("unused parameters, empirical Fisher", "parameters")
def unused_parameters_empirical_fisher(tool: Adapter) -> str:
    """The same for the mean outer product of per-example gradients."""
    return right_empirical_fisher(tool, classification(_WithSpare()))


class _Experts(nn.Module):
    """Every batch is routed to one of two experts by its first input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.low, self.high = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if bool((x[:, 0] > 0).all()):
            return self.high(x)
        if bool((x[:, 0] <= 0).all()):
            return self.low(x)
        return torch.where(x[:, :1] > 0, self.high(x), self.low(x))


@trap("parameters used in some batches", "parameters")
def parameters_used_in_some_batches(tool: Adapter) -> str:
    """Each batch reaches another expert: no batch uses all parameters, all together do."""
    x, y = labelled()
    order = torch.argsort((x[:, 0] > 0).long())
    x, y = x[order], y[order]
    low = int((x[:, 0] <= 0).sum())
    return right_hessian(tool, classification(_Experts(), batches=cut((x, y), (low, len(y) - low))))


class _Scaled(nn.Module):
    """Has a 0-dimensional parameter: a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.temperature


@trap("scalar parameter", "parameters")
def scalar_parameter(tool: Adapter) -> str:
    """A parameter of shape [] is one row and column."""
    return right_hessian(tool, classification(_Scaled()))


def _regression(model: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor]) -> Problem:
    x, _ = labelled()
    whole = (x, x[:, :1] ** 2)
    return Problem(model, criterion, [whole], whole)


class _MeanOutput(nn.Module):
    """The mean prediction itself as the loss: linear in the last layer."""

    reduction = "mean"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).mean()


@trap("linear loss", "parameters")
def linear_loss(tool: Adapter) -> str:
    """A loss linear in all parameters: no gradient requires grad, and the Hessian is zero."""
    torch.manual_seed(9)
    problem = _regression(nn.Linear(4, 1), _MeanOutput())
    matrix = matrix_of(tool, tool.hessian(problem), problem)
    return same_matrix(matrix, torch.zeros(5, 5, dtype=torch.float64))


@trap("loss linear in some parameters", "parameters")
def loss_linear_in_some_parameters(tool: Adapter) -> str:
    """The gradient of the last bias is a constant that does not require grad: its row is zero, the others are not."""
    torch.manual_seed(9)
    return right_hessian(tool, _regression(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)), _MeanOutput()))


@trap("float64 model", "parameters")
def float64_model(tool: Adapter) -> str:
    """A model and data in float64: products are right to 1e-10, and the eigenvalue solver takes them."""
    data = labelled(dtype=torch.float64)
    problem = Problem(mlp(torch.float64), nn.CrossEntropyLoss(), cut(data), data)
    truth = oracle.hessian(problem)
    operator = tool.hessian(problem)
    said = same_matrix(matrix_of(tool, operator, problem), truth, tolerance=1e-10)
    found = tool.top_eigenvalues(operator, 1, tol=1e-6, max_products=40)
    top = float(torch.linalg.eigvalsh(truth)[-1])
    return f"{said}; top eigenvalue {right_eigenvalues(found, [top], tolerance=1e-4)}"
