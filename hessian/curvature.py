"""The Hessian of an objective as an operator."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch import Tensor

from ..landscape.objective import Objective
from .engine_choice import make_engine
from .engines import Engine
from .hessian_block import HessianBlock
from .operator import LinearOperator

if TYPE_CHECKING:
    from ..landscape.blocks import Block

# Share of the examples behind `coarse`.
COARSE_SHARE = 1 / 8


class Hessian(LinearOperator):
    r"""∇²L(θ) [n, n] of an objective, at the weights the model has when a product is asked for.

    Weights, buffers and data are looked at before every product, or once for a run (`fixed`). Plain Python values that
    the loss or the model reads, such as an annealed coefficient, are not: after changing one, make a new Hessian.

    Args:
        objective: What is differentiated twice.
        engine: "auto", or "double-backward", "forward-over-reverse", "finite-difference", "compiled". "auto" takes the
            first of the first three that can differentiate the loss, and the compiled one when `expect` announces a
            run long enough for it. `.engine.reason` says why one is in use.

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
        self.engine: Engine = make_engine(objective, engine)

    @property
    def relative_error(self) -> float:
        return self.engine.relative_error

    def expect(self, products: int) -> None:
        self.engine.expect(products)

    def fixed(self) -> AbstractContextManager[None]:
        return self.objective.fixed()

    def matmat(self, V: Tensor) -> Tensor:
        return self.engine.matmat(V)

    def start_vector(self) -> Tensor:
        """The gradient: it lies mostly in the top eigenspace once training has begun."""
        return self.engine.gradient()

    def coarse(self) -> Hessian | None:
        """The Hessian on an eighth of the examples, the same ones at every call; None where there are too few."""
        part = self.objective.subset(COARSE_SHARE)
        # A few cheap products do not repay compiling.
        return None if part is None else Hessian(part, engine="auto" if self._asked == "compiled" else self._asked)

    def block(self, block: Block) -> LinearOperator:
        """∇²L restricted to a block of coordinates; products run only through the block's part of the graph."""
        return HessianBlock(self, block)
