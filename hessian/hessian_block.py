"""The Hessian restricted to a block of coordinates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .deflation import Complement
from .operator import LinearOperator

if TYPE_CHECKING:
    from ..landscape.blocks import Block
    from .curvature import Hessian


class HessianBlock(LinearOperator):
    """The principal submatrix of a Hessian on one block [b, b].

    Attributes:
        hessian: The whole.
        subset: Numbers of the parameters that the block touches.
    """

    def __init__(self, hessian: Hessian, block: Block) -> None:
        layout = hessian.objective.layout
        numbers = {name: i for i, name in enumerate(layout.names)}
        self.subset = sorted(numbers[name] for name in block.parameters)
        positions = block.indices(layout)
        self._indices = positions.to(hessian.device)
        # Flat positions in the whole vector -> positions among the block's parameters alone.
        offsets, start = {}, 0
        for i in self.subset:
            offsets[i] = start - layout.offsets[i]
            start += layout.sizes[i]
        owner = torch.bucketize(positions, torch.tensor(layout.offsets[1:]), right=True)
        shift = torch.tensor([offsets.get(i, 0) for i in range(len(layout.names))])
        self._positions = (positions + shift[owner]).to(hessian.device)
        self._width = start
        self._whole = len(positions) == start and bool((self._positions.cpu() == torch.arange(start)).all())
        super().__init__(len(positions), dtype=hessian.dtype, device=hessian.device)
        self.hessian = hessian

    @property
    def relative_error(self) -> float:
        return self.hessian.engine.relative_error_of(self.subset)

    def fixed(self) -> AbstractContextManager[None]:
        return self.hessian.fixed()

    def matmat(self, V: Tensor) -> Tensor:
        return self.select(self.hessian.engine.matmat(self.embed(V), self.subset))

    def embed(self, V: Tensor) -> Tensor:
        """V [b, m] as columns over all coordinates of the block's parameters."""
        if self._whole:
            return V
        embedded = V.new_zeros(self._width, V.shape[1])
        embedded[self._positions] = V
        return embedded

    def select(self, V: Tensor) -> Tensor:
        """The block's rows of columns over all coordinates of its parameters."""
        return V if self._whole else V[self._positions]

    def start_vector(self) -> Tensor:
        return self.hessian.start_vector()[self._indices]


def products(
    ops: Sequence[LinearOperator], Vs: Sequence[Tensor], clock: Callable[[], float] = time.perf_counter
) -> tuple[list[Tensor], list[float]]:
    """A_i V_i for several operators, and the seconds by `clock` that each took.

    Blocks of one Hessian go through its data together, which enters the model once and builds what is not kept once;
    they share the time by their columns.
    """
    found: dict[int, tuple[Tensor, float]] = {}
    together: dict[int, list[int]] = {}
    inner = [op.op if isinstance(op, Complement) else op for op in ops]
    for i, op in enumerate(ops):
        if isinstance(block := inner[i], HessianBlock):
            together.setdefault(id(block.hessian), []).append(i)
            continue
        began = clock()
        image = op.matmat(Vs[i])
        found[i] = image, clock() - began
    for numbers in together.values():
        blocks = [op for i in numbers if isinstance(op := inner[i], HessianBlock)]
        began = clock()
        parts = [(block.embed(Vs[i]), block.subset) for i, block in zip(numbers, blocks, strict=True)]
        images = blocks[0].hessian.engine.products(parts)
        each = (clock() - began) / max(1, sum(Vs[i].shape[1] for i in numbers))
        for i, block, image in zip(numbers, blocks, images, strict=True):
            image, op = block.select(image), ops[i]
            found[i] = op.project(image) if isinstance(op, Complement) else image, each * Vs[i].shape[1]
    return [found[i][0] for i in range(len(ops))], [found[i][1] for i in range(len(ops))]
