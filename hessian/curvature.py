"""The Hessian of an objective as an operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..landscape.objective import Objective
from .engines import Engine, make_engine
from .operator import LinearOperator

if TYPE_CHECKING:
    from ..landscape.blocks import Block


class Hessian(LinearOperator):
    r"""∇²L(θ) [n, n] of an objective, at the weights the model has when a product is asked for.

    Args:
        objective: What is differentiated twice.
        engine: "auto", or "double-backward", "forward-over-reverse", "finite-difference". `.engine.reason` says why
            one was chosen.

    Source: Pearlmutter, Fast Exact Multiplication by the Hessian, 1994.
    """

    def __init__(self, objective: Objective, *, engine: str = "auto") -> None:
        if not isinstance(objective, Objective):
            raise TypeError(f"`objective` is a {type(objective).__name__}; make one with Objective(model, loss, data)")
        super().__init__(
            objective.num_parameters, dtype=objective.dtype, device=objective.device, layout=objective.layout
        )
        self.objective = objective
        self._asked = engine
        self._engine: Engine | None = None if engine == "auto" else make_engine(objective, engine)

    @property
    def engine(self) -> Engine:
        """The engine in use; with "auto" the first use decides."""
        if self._engine is None:
            self._engine = make_engine(self.objective, self._asked)
        return self._engine

    @property
    def relative_error(self) -> float:
        return self.engine.relative_error

    def matmat(self, V: Tensor) -> Tensor:
        return self.engine.matmat(V)

    def start_vector(self) -> Tensor:
        """The gradient: it lies mostly in the top eigenspace once training has begun."""
        return self.objective.gradient()

    def block(self, block: Block) -> LinearOperator:
        """∇²L restricted to a block of coordinates; products run only through the block's part of the graph."""
        return HessianBlock(self, block)


class HessianBlock(LinearOperator):
    """The principal submatrix of a Hessian on one block [b, b]."""

    def __init__(self, hessian: Hessian, block: Block) -> None:
        layout = hessian.objective.layout
        numbers = {name: i for i, name in enumerate(layout.names)}
        self._subset = sorted(numbers[name] for name in block.parameters)
        positions = block.indices(layout)
        self._indices = positions.to(hessian.device)
        # Flat positions in the whole vector -> positions among the block's parameters alone.
        offsets, start = {}, 0
        for i in self._subset:
            offsets[i] = start - layout.offsets[i]
            start += layout.sizes[i]
        owner = torch.bucketize(positions, torch.tensor(layout.offsets[1:]), right=True)
        shift = torch.tensor([offsets.get(i, 0) for i in range(len(layout.names))])
        self._positions = (positions + shift[owner]).to(hessian.device)
        self._width = start
        self._whole = len(positions) == start and bool((self._positions.cpu() == torch.arange(start)).all())
        super().__init__(len(positions), dtype=hessian.dtype, device=hessian.device)
        self._hessian = hessian

    @property
    def relative_error(self) -> float:
        return self._hessian.engine.relative_error_of(self._subset)

    def matmat(self, V: Tensor) -> Tensor:
        if self._whole:
            return self._hessian.engine.matmat(V, self._subset)
        embedded = V.new_zeros(self._width, V.shape[1])
        embedded[self._positions] = V
        return self._hessian.engine.matmat(embedded, self._subset)[self._positions]

    def start_vector(self) -> Tensor:
        return self._hessian.start_vector()[self._indices]
