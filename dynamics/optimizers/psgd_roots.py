"""Columns of PSGD's factors as a root of the inverse preconditioner."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...hessian.preconditioned import Root


class RestrictedRoot(Root):
    """Of a block-diagonal Q the columns of some tensors, in their order.

    Args:
        blocks: Square factors, each with the tensors whose coordinates it acts on.
        params: The tensors whose columns are kept; those in no block have zero columns.
    """

    def __init__(self, blocks: Sequence[tuple[Root, Sequence[Tensor]]], params: Sequence[Tensor]) -> None:
        self._roots = [root for root, _ in blocks]
        places, offset = {}, 0
        for p in params:
            places[p] = offset
            offset += p.numel()
        self._num_columns = offset
        # Where coordinates are in a block, and among the columns: (first, first, how many).
        self._slices: list[list[tuple[int, int, int]]] = []
        for _, tensors in blocks:
            first, slices = 0, []
            for p in tensors:
                if p in places:
                    slices.append((first, places[p], p.numel()))
                first += p.numel()
            self._slices.append(slices)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((sum(root.shape[0] for root in self._roots), self._num_columns))

    def apply(self, V: Tensor) -> Tensor:
        rows = []
        for root, slices in zip(self._roots, self._slices, strict=True):
            whole = V.new_zeros(root.shape[1], V.shape[1])
            for first, column, size in slices:
                whole[first : first + size] = V[column : column + size]
            rows.append(root.apply(whole))
        return torch.cat(rows)

    def transposed(self, V: Tensor) -> Tensor:
        result = V.new_zeros(self._num_columns, V.shape[1])
        parts = V.split([root.shape[0] for root in self._roots])
        for root, slices, part in zip(self._roots, self._slices, parts, strict=True):
            whole = root.transposed(part)
            for first, column, size in slices:
                result[column : column + size] = whole[first : first + size]
        return result
