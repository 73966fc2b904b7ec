"""Operators of the form Σ Jᵀ M J: Gauss-Newton, Fisher and gradient covariance share one product."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.accurate import dot
from ..landscape.evaluation import Chunk
from ..landscape.objective import Objective
from .engines import NotTwiceDifferentiable, normal_tensors
from .kept import KeptChunks
from .linearised import Linearisations, Mistraced
from .loss_hessians import Metric
from .operator import LinearOperator
from .second_derivatives import ShortSecondDerivatives
from .tracing import Linear


class PulledTwice:
    """v -> J v as the derivative by u of Jᵀ u, which is linear in u: two reverse passes stand for one forward pass."""

    def __init__(self, outputs: Tensor, theta: tuple[Tensor, ...]) -> None:
        self._dummy = torch.zeros_like(outputs, requires_grad=True)  # u, shaped like the outputs
        self._pulled: tuple[Tensor | None, ...] = tuple(None for _ in theta)  # Jᵀ u as a graph over u
        if outputs.requires_grad:
            with ShortSecondDerivatives():
                self._pulled = torch.autograd.grad(outputs, theta, self._dummy, create_graph=True, allow_unused=True)

    def __call__(self, *tangents: Tensor) -> tuple[Tensor, ...]:
        pairs = [(p, t) for p, t in zip(self._pulled, tangents, strict=True) if p is not None and p.requires_grad]
        if not pairs:
            return (torch.zeros_like(self._dummy),)
        with ShortSecondDerivatives():  # activation checkpointing runs the model again here
            (result,) = torch.autograd.grad(
                [p for p, _ in pairs], [self._dummy], [t for _, t in pairs], retain_graph=True, allow_unused=True
            )
        return (torch.zeros_like(self._dummy) if result is None else result,)


@dataclass
class Factor:
    """Outputs z(θ) of one chunk with their graph, ready for J v and Jᵀ w."""

    chunk: Chunk
    weight: float
    theta: tuple[Tensor, ...]
    outputs: Tensor
    metric: Metric
    jacobian: PulledTwice | Linear | None = None
    checked: bool = False  # that J v and Jᵀ w are transposes of each other
    runs_code: bool = True  # a pass backward through the outputs' graph runs code of the user's

    @property
    def needs_model(self) -> bool:
        """Jᵀ w runs code of the user's, or J v may be traced yet."""
        return self.runs_code or not isinstance(self.jacobian, Linear)

    def push(self, tangents: Sequence[Tensor]) -> Tensor:
        """J v, shaped like the outputs."""
        if self.jacobian is None:
            self.jacobian = PulledTwice(self.outputs, self.theta)
        return self.jacobian(*tangents)[0]

    def pull(self, w: Tensor) -> tuple[Tensor | None, ...]:
        """Jᵀ w."""
        if not self.outputs.requires_grad:
            return tuple(None for _ in self.theta)
        with ShortSecondDerivatives():
            return torch.autograd.grad(self.outputs, self.theta, w, retain_graph=True, allow_unused=True)

    @property
    def held_bytes(self) -> int:
        """Memory of a linearisation, which autograd does not see."""
        return self.jacobian.num_bytes(self.theta) if isinstance(self.jacobian, Linear) else 0

    def verify(self, tolerance: float, custom: tuple[str, ...]) -> None:
        """Checks uᵀ(J v) = vᵀ(Jᵀ u): a custom function that cannot be differentiated twice breaks J v alone.

        Raises:
            NotTwiceDifferentiable: the identity does not hold.
        """
        v = [torch.sin(torch.arange(t.numel(), dtype=t.dtype, device=t.device)).reshape(t.shape) for t in self.theta]
        u = torch.cos(torch.arange(self.outputs.numel(), dtype=self.outputs.dtype, device=self.outputs.device))
        u = u.reshape(self.outputs.shape)
        if not are_transposed(self.push(v), u, v, self.pull(u), 1e2 * tolerance):
            raise NotTwiceDifferentiable(
                f"J v is wrong through the custom autograd functions {list(custom)}: their backward cannot be "
                "differentiated (once_differentiable, or tensors detached in it)"
            )


def are_transposed(
    pushed: Tensor, u: Tensor, v: Sequence[Tensor], pulled: Sequence[Tensor | None], tolerance: float
) -> bool:
    """Whether ⟨u, J v⟩ = ⟨Jᵀ u, v⟩, up to `tolerance` of the sum of the terms' sizes."""
    pairs = [(a.reshape(-1), b.reshape(-1)) for a, b in zip(v, pulled, strict=True) if b is not None]
    forward = float(dot(u.reshape(-1), pushed.reshape(-1)))
    reverse = sum(float(dot(a, b)) for a, b in pairs)
    scale = sum(float(dot(a.abs(), b.abs())) for a, b in pairs)
    return abs(forward - reverse) <= tolerance * scale


class FactorOperator(LinearOperator):
    """Σ_chunks weight · Jᵀ M J with J = ∂z/∂θ, for outputs z and a symmetric metric M on them.

    Subclasses write `factor`. Graphs are kept between products as far as the objective's memory budget goes. Where
    the outputs are the model's prediction, J v is a traced program once a run of products is long enough for the
    trace to pay (`expect` announces one); `reason` says what is in use and why.

    Args:
        predicts: Whether `factor` has the prediction itself as its outputs.
    """

    def __init__(self, objective: Objective, *, predicts: bool) -> None:
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
        self._linearisations = Linearisations(objective)
        if not predicts:
            self._linearisations.refuse("the outputs are the losses of single examples: J v by double backward")
        self._factors = KeptChunks(objective, self._ready_factor, self.weights_changed)

    @abstractmethod
    def factor(self, chunk: Chunk, theta: tuple[Tensor, ...]) -> Factor:
        """Outputs and metric of one chunk; called inside the objective's evaluation."""

    @property
    def reason(self) -> str:
        """Why J v is made the way it is."""
        return self._linearisations.reason

    def expect(self, products: int) -> None:
        self._linearisations.expect(products)

    def fixed(self) -> AbstractContextManager[None]:
        return self.objective.fixed()

    def matmat(self, V: Tensor) -> Tensor:
        if V.shape[1] == 0:
            return V.clone()
        with normal_tensors(V) as V:
            try:
                total = self._sum(V)
            except Mistraced as error:
                self._linearisations.refuse(str(error))
                self._factors = KeptChunks(self.objective, self._ready_factor, self.weights_changed)
                total = self._sum(V)
            total = self.objective.all_reduce(total)
        if not all(math.isfinite(end) for end in torch.aminmax(total)):
            raise ValueError(f"a product with {type(self).__name__} is not finite; check the vector and the model")
        return total

    def _sum(self, V: Tensor) -> Tensor:
        columns: list[Tensor] = []
        for factor in self._factors:
            if not isinstance(factor.jacobian, Linear):
                factor.jacobian = self._linearised(factor) or factor.jacobian
            for column in range(V.shape[1]):
                tangents = self.objective.split(V[:, column], factor.theta)
                pushed = factor.push(tangents)
                weighted = factor.metric(pushed).to(pushed.dtype)
                pulled = factor.pull(weighted)
                if isinstance(factor.jacobian, Linear) and not factor.checked:
                    if not are_transposed(pushed, weighted, tangents, pulled, 1e2 * self.relative_error):
                        raise Mistraced("a traced J v is not the transpose of the model's own Jᵀ w")
                    factor.checked = True
                product = self.objective.join(pulled, factor.theta)
                if len(columns) == column:
                    columns.append(product if factor.weight == 1.0 else product.mul_(factor.weight))
                else:
                    columns[column].add_(product, alpha=factor.weight)
            if not isinstance(factor.jacobian, Linear):
                self._linearisations.count(factor.chunk, factor.theta, factor.outputs, V.shape[1])
        if not columns:
            return torch.zeros_like(V)
        return columns[0].unsqueeze(1) if len(columns) == 1 else torch.stack(columns, dim=1)

    def _linearised(self, factor: Factor) -> Linear | None:
        return self._linearisations.linearise(factor.chunk, factor.theta, factor.outputs)

    def _ready_factor(self, chunk: Chunk, theta: tuple[Tensor, ...]) -> Factor:
        with ShortSecondDerivatives(not self.objective.differentiates_inside) as short:
            factor = self.factor(chunk, theta)
        factor.runs_code = short.needs_model or bool(self.objective.custom_functions)
        factor.jacobian = self._linearised(factor) or PulledTwice(factor.outputs, theta)
        if self.objective.custom_functions:
            factor.verify(self.relative_error, self.objective.custom_functions)
        return factor

    def weights_changed(self) -> None:
        """Called when everything derived from the weights is stale."""

    def start_vector(self) -> Tensor | None:
        return self.objective.gradient()
