"""Roots of inverse preconditioners side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...hessian.preconditioned import Root


@dataclass(frozen=True)
class Block:
    """A part of a `BlockDiagonalRoot`: its columns, in its own order; the root; the dtype it works in; a factor."""

    columns: Sequence[slice]
    root: Root
    dtype: torch.dtype
    factor: float = 1.0


class BlockDiagonalRoot(Root):
    """Roots of disjoint groups of coordinates, the rows of one below those of the other.

    Args:
        n: Number of columns; those in no block are zero.
        blocks: In the order of their rows.
    """

    def __init__(self, n: int, blocks: Sequence[Block]) -> None:
        self._n, self._blocks = n, tuple(blocks)
        self._rows = [block.root.shape[0] for block in self._blocks]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((sum(self._rows), self._n))

    def apply(self, V: Tensor) -> Tensor:
        parts = []
        for block in self._blocks:
            columns = torch.cat([V[s] for s in block.columns]).to(block.dtype)
            parts.append(block.factor * block.root.apply(columns).to(V.dtype))
        return torch.cat(parts)

    def transposed(self, V: Tensor) -> Tensor:
        result = V.new_zeros(self._n, V.shape[1])
        for block, part in zip(self._blocks, V.split(self._rows), strict=True):
            found = block.factor * block.root.transposed(part.to(block.dtype)).to(V.dtype)
            for s, piece in zip(block.columns, found.split([s.stop - s.start for s in block.columns]), strict=True):
                result[s] = piece
        return result
