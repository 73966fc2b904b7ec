"""What the optimizers of torch.optim do to a gradient: the common part, and the rules that leave it as it is."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...hessian.preconditioned import Root
from .base import Group, group_of, missing_gradient
from .recurrences import recurrence_threshold


class NoPreconditionerError(ValueError):
    """A step is not P⁻¹ times a momentum, or what P was cannot be told any more."""


@runtime_checkable
class Geometry(Protocol):
    """The step of an optimizer as θ ← θ − η P⁻¹ m, with a momentum m; `BaseOptimizer` is one."""

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor | Root | None:
        """P of a parameter: its diagonal, or a root R with P⁻¹ = Rᵀ R. `gradient` is what the next step will see, and
        P that of the next step; without it P is that of the last one. None where there is no such P."""
        ...

    def threshold_of_group(self, group: Group) -> float | None:
        """Largest stable eigenvalue of P⁻¹ (H + coupled weight decay) with P held fixed; None where there is none."""
        ...

    def coupled_weight_decay(self, group: Group) -> float:
        """λ where weight decay is part of the gradient, else 0."""
        ...


class TorchGeometry:
    """The geometry of an optimizer of torch.optim, read from its options and its state, of which nothing changes."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor | Root | None:
        return torch.ones_like(p, dtype=working_dtype(p, gradient))

    def is_idle(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        """Where the second moment behind P is exactly zero, so that P is nothing but eps; bool, the shape of p."""
        return torch.zeros_like(p, dtype=torch.bool)

    def threshold_of_group(self, group: Group) -> float | None:
        return None

    def coupled_weight_decay(self, group: Group) -> float:
        return 0.0 if group.get("decoupled_weight_decay") else float(group.get("weight_decay", 0.0))

    def group_of(self, p: Tensor) -> Group:
        return group_of(self.optimizer, p)

    def state_of(self, p: Tensor) -> dict[str, Any]:
        """Without making one, as indexing would."""
        return self.optimizer.state.get(p, {})

    def steps_of(self, p: Tensor, gradient: Tensor | None) -> int:
        """The number of the step that P belongs to, from 1."""
        taken = int(self.state_of(p).get("step", 0))
        if gradient is not None:
            return taken + 1
        if taken == 0:
            raise missing_gradient(self.optimizer)
        return taken

    def seen(self, p: Tensor, gradient: Tensor) -> Tensor:
        """The gradient as the rule sees it: its sign turned for maximization, coupled weight decay added."""
        group = self.group_of(p)
        dtype = working_dtype(p, gradient)
        g = -gradient.detach().to(dtype) if group.get("maximize") else gradient.detach().to(dtype)
        return g + self.coupled_weight_decay(group) * p.detach().to(dtype)

    def average_of_squares(self, p: Tensor, gradient: Tensor | None, key: str, beta: float) -> Tensor:
        """state[key] as the step in question uses it: v ← β v + (1 − β) g²."""
        state = self.state_of(p)
        if gradient is None:
            if not int(state.get("step", 0)):
                raise missing_gradient(self.optimizer)
            return state[key].to(working_dtype(p, None))
        square = self.seen(p, gradient).square()
        return (1 - beta) * square + (beta * state[key].to(square.dtype) if key in state else 0.0)


class SGDGeometry(TorchGeometry):
    """P = I. Momentum is heavy ball, m ← μ m + (1 − τ) g, or Nesterov's form of it."""

    def threshold_of_group(self, group: Group) -> float | None:
        lr, momentum = float(group["lr"]), float(group["momentum"])
        if group["maximize"]:
            return None
        if momentum == 0:  # torch then ignores dampening and nesterov
            return recurrence_threshold(lr, along_gradient=1.0, along_momentum=0.0)
        if group["nesterov"]:  # torch then insists on zero dampening
            return recurrence_threshold(lr, beta=momentum, along_gradient=1.0, along_momentum=momentum)
        return recurrence_threshold(lr, beta=momentum, gain=1 - float(group["dampening"]))


class ASGDGeometry(TorchGeometry):
    """P = η / η_t for the learning rate η_t = η / (1 + λ η t)^α that the steps really have.

    The decay term (1 − λ η_t) θ is the gradient step of λ ‖θ‖² / 2, so `lambd` counts as coupled weight decay.
    Averaging does not act back on the steps.
    """

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        group, state = self.group_of(p), self.state_of(p)
        lr, steps = float(group["lr"]), self.steps_of(p, gradient)
        if gradient is not None and "eta" in state:
            eta = float(state["eta"])
        else:
            exact = lr if steps == 1 else lr / (1 + float(group["lambd"]) * lr * (steps - 1)) ** float(group["alpha"])
            eta = float(torch.as_tensor(exact))  # torch keeps it in its default precision
        return torch.full_like(p, lr / eta if eta else 1.0, dtype=working_dtype(p, gradient))

    def coupled_weight_decay(self, group: Group) -> float:
        return float(group["weight_decay"]) + float(group["lambd"])

    def threshold_of_group(self, group: Group) -> float | None:
        if group["maximize"]:
            return None
        return recurrence_threshold(float(group["lr"]), along_gradient=1.0, along_momentum=0.0)


class NoGeometry(TorchGeometry):
    """No P that could be held fixed: Rprop takes signs, LBFGS searches along a line, SparseAdam skips coordinates."""

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> None:
        return None

    def coupled_weight_decay(self, group: Group) -> float:
        return 0.0


def working_dtype(p: Tensor, gradient: Tensor | None) -> torch.dtype:
    """Of P: that of the gradient or the parameter, at least float32."""
    return torch.promote_types(p.dtype if gradient is None else gradient.dtype, torch.float32)
