"""Operators of the form Σ Jᵀ M J: Gauss-Newton, Fisher and gradient covariance share one product."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..landscape.evaluation import Chunk
from ..landscape.objective import Objective
from .engines import NotTwiceDifferentiable, normal_tensors
from .kept import KeptChunks
from .operator import LinearOperator

Metric = Callable[[Tensor], Tensor]


@dataclass
class Factor:
    """Outputs z(θ) of one chunk with their graph, ready for J v and Jᵀ w.

    J v is the derivative by u of Jᵀ u, which is linear in u: two reverse passes stand for one forward pass.
    """

    weight: float
    theta: tuple[Tensor, ...]
    outputs: Tensor
    dummy: Tensor  # u, shaped like the outputs
    pulled: tuple[Tensor | None, ...]  # Jᵀ u as a graph over u
    metric: Metric

    @classmethod
    def of(cls, weight: float, theta: tuple[Tensor, ...], outputs: Tensor, metric: Metric) -> Factor:
        dummy = torch.zeros_like(outputs, requires_grad=True)
        if outputs.requires_grad:
            pulled = torch.autograd.grad(outputs, theta, dummy, create_graph=True, allow_unused=True)
        else:
            pulled = tuple(None for _ in theta)
        return cls(weight, theta, outputs, dummy, pulled, metric)

    def push(self, tangents: list[Tensor]) -> Tensor:
        """J v, shaped like the outputs."""
        pairs = [(p, t) for p, t in zip(self.pulled, tangents, strict=True) if p is not None and p.requires_grad]
        if not pairs:
            return torch.zeros_like(self.outputs)
        (result,) = torch.autograd.grad(
            [p for p, _ in pairs], [self.dummy], [t for _, t in pairs], retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(self.outputs) if result is None else result

    def verify(self, tolerance: float, custom: tuple[str, ...]) -> None:
        """Checks uᵀ(J v) = vᵀ(Jᵀ u): a custom function that cannot be differentiated twice breaks J v alone.

        Raises:
            NotTwiceDifferentiable: the identity does not hold.
        """
        v = [torch.sin(torch.arange(t.numel(), dtype=t.dtype, device=t.device)).reshape(t.shape) for t in self.theta]
        u = torch.cos(torch.arange(self.outputs.numel(), dtype=self.outputs.dtype, device=self.outputs.device))
        u = u.reshape(self.outputs.shape)
        pulled = [torch.zeros_like(t) if p is None else p for p, t in zip(self.pull(u), self.theta, strict=True)]
        forward = float((u * self.push(v)).sum())
        reverse = sum(float((a * b).sum()) for a, b in zip(v, pulled, strict=True))
        scale = sum(float((a * b).abs().sum()) for a, b in zip(v, pulled, strict=True))
        if abs(forward - reverse) > 1e2 * tolerance * scale:
            raise NotTwiceDifferentiable(
                f"J v is wrong through the custom autograd functions {list(custom)}: their backward cannot be "
                "differentiated (once_differentiable, or tensors detached in it)"
            )

    def pull(self, w: Tensor) -> tuple[Tensor | None, ...]:
        """Jᵀ w."""
        if not self.outputs.requires_grad:
            return tuple(None for _ in self.theta)
        return torch.autograd.grad(self.outputs, self.theta, w, retain_graph=True, allow_unused=True)


class FactorOperator(LinearOperator):
    """Σ_chunks weight · Jᵀ M J with J = ∂z/∂θ, for outputs z and a symmetric metric M on them.

    Subclasses write `factor`. Graphs are kept between products as far as the objective's memory budget goes.
    """

    def __init__(self, objective: Objective) -> None:
        if not isinstance(objective, Objective):
            raise TypeError(f"`objective` is a {type(objective).__name__}; make one with Objective(model, loss, data)")
        super().__init__(
            objective.num_parameters,
            dtype=objective.dtype,
            device=objective.device,
            layout=objective.layout,
            relative_error=64 * objective.coarsest_eps,
        )
        self.objective = objective
        self._factors = KeptChunks(objective, self._verified_factor, self.weights_changed)

    @abstractmethod
    def factor(self, chunk: Chunk, theta: tuple[Tensor, ...]) -> Factor:
        """Outputs and metric of one chunk; called inside the objective's evaluation."""

    def matmat(self, V: Tensor) -> Tensor:
        with normal_tensors(V) as V:
            total = torch.zeros_like(V)
            for factor in self._factors:
                for column in range(V.shape[1]):
                    pushed = factor.push(self.objective.split(V[:, column], factor.theta))
                    pulled = factor.pull(factor.metric(pushed).to(pushed.dtype))
                    total[:, column] += factor.weight * self.objective.join(pulled)
            total = self.objective.all_reduce(total)
        if not bool(torch.isfinite(total).all()):
            raise ValueError(f"a product with {type(self).__name__} is not finite; check the vector and the model")
        return total

    def _verified_factor(self, chunk: Chunk, theta: tuple[Tensor, ...]) -> Factor:
        factor = self.factor(chunk, theta)
        if self.objective.custom_functions:
            factor.verify(self.relative_error, self.objective.custom_functions)
        return factor

    def weights_changed(self) -> None:
        """Called when everything derived from the weights is stale."""

    def start_vector(self) -> Tensor | None:
        return self.objective.gradient()
