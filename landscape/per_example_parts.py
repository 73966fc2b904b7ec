r"""Per-example gradients of one use of a parameter, from what went into an operation and the gradient of what came out.

Sizes: b examples; k rows of an input per example (tokens, positions of flattened batches; 1 without a sequence).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .per_example_sums import ChunkSums

# Entries of an input that are squared at one time.
SQUARED_ENTRIES = 1 << 20


class Squares:
    """The squares of one tensor [b, e] and their sums by row, made once for all that use them."""

    def __init__(self) -> None:
        self._made: tuple[Tensor, Tensor] | None = None

    def of(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        if self._made is None:
            squares = tensor.square()
            self._made = squares, squares.sum(1).double()
        return self._made


@dataclass
class Rows:
    """The gradients themselves [b, entries], where they are small: biases, scales, shifts."""

    rows: Tensor
    squares: Squares = field(default_factory=Squares)
    entries: int = 0

    def write(self, out: Tensor, first: int, *, add: bool) -> None:
        rows = self.rows[first : first + len(out)]
        out.add_(rows) if add else out.copy_(rows)

    def moments(self, sums: ChunkSums, k: int) -> bool:
        if sums.keeps_rows or self.rows.numel() > SQUARED_ENTRIES:
            return False
        mean, second = sums.of(k)
        mean.add_(self.rows.sum(0), alpha=sums.share)
        squares, lengths = self.squares.of(self.rows)
        sums.add_squares(k, lengths)
        second.addmv_(squares.mT, sums.inverse(squares), alpha=sums.share)
        return True


@dataclass
class OuterProducts:
    """h_i = L_iᵀ R_i of a matrix [p, q], from `left` [b, k, p] and `right` [b, k, q].

    A linear layer has output gradients on the left and inputs on the right. With k = 1, (h_i)² is the product of the
    squares, so that all sums are products of two matrices.
    """

    left: Tensor
    right: Tensor
    squares: Squares = field(default_factory=Squares)  # of `left`, for k = 1
    entries: int = 0

    def write(self, out: Tensor, first: int, *, add: bool) -> None:
        left, right = self.left[first : first + len(out)].mT, self.right[first : first + len(out)]
        target = out.view(len(out), left.shape[1], right.shape[2])
        if add:
            target.baddbmm_(left, right)
        else:
            torch.bmm(left, right, out=target)

    def moments(self, sums: ChunkSums, k: int) -> bool:
        if self.left.shape[1] != 1 or not sums.keeps_outer(k, self.left[:, 0], self.right[:, 0]):
            return False
        shape = self.left.shape[2], self.right.shape[2]
        mean, second, held = sums.held(k)
        mean, second = mean.view(shape), second.view(shape)
        left, right = self.left[:, 0], self.right[:, 0]
        mean.addmm_(left.mT, right, beta=held, alpha=sums.share)
        left, lengths = self.squares.of(left)
        others = torch.empty_like(lengths)
        step = min(sums.size, max(1, sums.at_most(SQUARED_ENTRIES) // shape[1]))
        for first in range(0, sums.size, step):
            rows = slice(first, min(first + step, sums.size))
            squares = torch.square(right[rows], out=sums.room(0, rows.stop - first, shape[1], mean.device))
            others[rows] = squares.sum(1)
            if sums.uniform is None:
                squares.mul_(sums.inverse(mean)[rows].unsqueeze(1))
            factor = sums.share * (sums.uniform or 1.0)
            second.addmm_(left[rows].mT, squares, beta=held if first == 0 else 1, alpha=factor)
        sums.add_squares(k, others.mul_(lengths))
        return True


@dataclass
class Lookups:
    """Rows of a table [v, e]: `indices` [b, k] were read, `gradients` [b, k, e] came back."""

    indices: Tensor
    gradients: Tensor
    num_rows: int
    entries: int = 0

    def write(self, out: Tensor, first: int, *, add: bool) -> None:
        if not add:
            out.zero_()
        indices, gradients = self.indices[first : first + len(out)], self.gradients[first : first + len(out)]
        places = torch.arange(len(out), device=out.device).unsqueeze(1) * self.num_rows + indices
        width = gradients.shape[2]
        out.view(-1, width).index_add_(0, places.reshape(-1), gradients.reshape(-1, width))

    def moments(self, sums: ChunkSums, k: int) -> bool:
        """Only the rows that an example reads are formed."""
        if sums.keeps_rows:
            return False
        b, width = len(self.indices), self.gradients.shape[2]
        places = torch.arange(b, device=self.indices.device).unsqueeze(1) * self.num_rows + self.indices
        places, inverse = places.unique(return_inverse=True)
        rows = self.gradients.new_zeros(len(places), width)
        rows.index_add_(0, inverse.reshape(-1), self.gradients.reshape(-1, width))
        owners, indices = places // self.num_rows, places % self.num_rows
        mean, second = sums.of(k)
        mean.view(-1, width).index_add_(0, indices, rows, alpha=sums.share)
        rows.square_()
        lengths = torch.zeros(b, dtype=torch.float64, device=rows.device)
        sums.add_squares(k, lengths.index_add_(0, owners, rows.sum(1).double()))
        rows.mul_(sums.inverse(rows)[owners].unsqueeze(1))
        second.view(-1, width).index_add_(0, indices, rows, alpha=sums.share)
        return True


@dataclass
class Convolutions:
    """h_i of a kernel [o, c / groups, *kernel], from inputs [b·k, c, *] and output gradients [b·k, o, *]."""

    inputs: Tensor
    gradients: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # before and after, by axis
    dilation: tuple[int, ...]
    groups: int
    rows_per_example: int

    @cached_property
    def entries(self) -> int:
        """Of the patches of one example."""
        positions = self.gradients.shape[2:].numel()
        return self.rows_per_example * self.groups * self.shape[1:].numel() * positions

    def write(self, out: Tensor, first: int, *, add: bool) -> None:
        k, g = self.rows_per_example, self.groups
        rows = slice(first * k, (first + len(out)) * k)
        gradients = self.gradients[rows]
        b = len(gradients)
        positions = gradients.shape[2:].numel()
        patches = self._patches(self.inputs[rows]).reshape(b * g, -1, positions)
        gradients = gradients.reshape(b * g, -1, positions)
        target = out.view(len(out) * g, gradients.shape[1], patches.shape[1])
        if k > 1:
            products = torch.bmm(gradients, patches.mT).view(len(out), k, -1).sum(1)
            out.add_(products) if add else out.copy_(products)
        elif add:
            target.baddbmm_(gradients, patches.mT)
        else:
            torch.bmm(gradients, patches.mT, out=target)

    def moments(self, sums: ChunkSums, k: int) -> bool:
        return False

    def _patches(self, inputs: Tensor) -> Tensor:
        """What the kernel sees at every position [b, groups, c / groups · kernel, positions]."""
        if any(side for sides in self.padding for side in sides):
            inputs = F.pad(inputs, [side for sides in reversed(self.padding) for side in sides])
        kernel, positions = self.shape[2:], self.gradients.shape[2:]
        steps = inputs.stride()[2:]
        return inputs.as_strided(
            (*inputs.shape[:2], *kernel, *positions),
            (
                *inputs.stride()[:2],
                *(step * self.dilation[i] for i, step in enumerate(steps)),
                *(step * self.stride[i] for i, step in enumerate(steps)),
            ),
            inputs.storage_offset(),
        ).reshape(inputs.shape[0], self.groups, -1, positions.numel())


def reduced(tensor: Tensor, b: int, shape: torch.Size) -> Tensor:
    """The entries of `tensor` [b·k, ...] summed over each example's rows and over what `shape` was broadcast along."""
    k = tensor.shape[0] // b
    if k == 1 and tensor.shape[1:] == shape:
        return tensor.reshape(b, shape.numel())
    padded = (1,) * (tensor.ndim - len(shape)) + tuple(shape)
    grouped = tensor.reshape(b, k, *tensor.shape[1:])
    axes = [1, *(axis + 1 for axis in range(1, tensor.ndim) if padded[axis] == 1)]
    return grouped.sum(axes).reshape(b, shape.numel())


def sides(padding: object, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Padding of a convolution before and after each axis."""
    if padding == "valid":
        return tuple((0, 0) for _ in kernel)
    if padding == "same":
        totals = [d * (size - 1) for d, size in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in each(padding, len(kernel)))


def each(value: Any, axes: int) -> tuple[int, ...]:
    """A setting of a convolution, one number for all axes or one for each."""
    numbers = tuple(value) if isinstance(value, tuple | list) else (value,)
    return tuple(int(n) for n in (numbers * axes if len(numbers) == 1 else numbers))
