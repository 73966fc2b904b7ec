"""Ways to hold the rows of one parameter: formed, as factors of outer products, or a few of their entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Entries of a row whose products are added in the rows' own type; beyond it in float64.
SLICE = 4096


@dataclass
class Dense:
    """The rows themselves: `matrix` [N, width]."""

    matrix: Tensor

    def put(self, rows: Tensor, places: Tensor) -> None:
        self.matrix[places.to(rows.device)] = rows

    def cut(self, filled: int) -> None:
        self.matrix = self.matrix[:filled]

    def inner_products(self, first: slice, second: slice) -> Tensor:
        return product(self.matrix[first], self.matrix[second])

    def times(self, v: Tensor) -> Tensor:
        return product(self.matrix, v.unsqueeze(0))[:, 0]

    def combined(self, coefficients: Tensor) -> Tensor:
        return coefficients @ self.matrix

    def rows(self, which: slice) -> Tensor:
        return self.matrix[which]

    def columns(self, drawn: Tensor) -> Tensor:
        return self.matrix[:, drawn]


@dataclass
class Outer:
    """Rows left_iᵀ right_i of a matrix [p, q]: `left` [N, p] and `right` [N, q]."""

    left: Tensor
    right: Tensor

    @classmethod
    def empty(cls, num: int, left: Tensor, right: Tensor) -> Outer:
        return cls(left.new_zeros(num, left.shape[1]), right.new_zeros(num, right.shape[1]))

    def put(self, left: Tensor, right: Tensor, places: Tensor) -> None:
        self.left[places.to(left.device)] = left
        self.right[places.to(right.device)] = right

    def cut(self, filled: int) -> None:
        self.left, self.right = self.left[:filled], self.right[:filled]

    def inner_products(self, first: slice, second: slice) -> Tensor:
        return product(self.left[first], self.left[second]) * product(self.right[first], self.right[second])

    def times(self, v: Tensor) -> Tensor:
        through = self.left @ v.view(self.left.shape[1], -1)
        return through.mul_(self.right).sum(1, dtype=torch.float64)

    def combined(self, coefficients: Tensor) -> Tensor:
        return ((self.left * coefficients.unsqueeze(1)).mT @ self.right).reshape(-1)

    def rows(self, which: slice) -> Tensor:
        return (self.left[which].unsqueeze(2) * self.right[which].unsqueeze(1)).flatten(1)

    def columns(self, drawn: Tensor) -> Tensor:
        width = self.right.shape[1]
        return self.left[:, drawn // width] * self.right[:, drawn % width]


@dataclass
class Sampled:
    """The entries numbered `drawn` [c] of every row: `matrix` [N, c]."""

    matrix: Tensor
    drawn: Tensor

    def cut(self, filled: int) -> None:
        self.matrix = self.matrix[:filled]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ [i, j] in float64 of a [i, w] and b [j, w]."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for first in range(0, a.shape[1], SLICE):
        total += a[:, first : first + SLICE] @ b[:, first : first + SLICE].mT
    return total
