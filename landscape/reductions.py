"""Blocks of one tensor as a mean: how a tensor becomes one number per block, and such numbers a tensor again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .index import Part


class Piece(NamedTuple):
    """Indices [start, stop) along the axis of a reduction, seen in the shape `view` and averaged over its `dims`."""

    start: int
    stop: int
    view: tuple[int, ...]
    dims: tuple[int, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """`view` with ones where it is averaged."""
        kept = list(self.view)
        for d in self.dims:
            kept[d] = 1
        return tuple(kept)


class Reduction(NamedTuple):
    """Blocks of a tensor of shape `shape`.

    Most partitions are averages: the tensor is cut along `axis` into pieces, each is reshaped and averaged over some
    dimensions, and every remaining index is a block. The others have `labels` [*shape], the number of the block of each
    entry, and no pieces.

    It holds tuples, integers and at most one tensor, so that `tuple(reduction)` can stand in a state dict.
    """

    shape: tuple[int, ...]
    axis: int
    pieces: tuple[Piece, ...]
    labels: Tensor | None = None

    @classmethod
    def over(cls, shape: Sequence[int], dims: Sequence[int]) -> Reduction:
        """Mean over dimensions: (1,) of a matrix gives one block per row, () one per entry, (0, 1) a single one."""
        view = tuple(shape) or (1,)
        return cls(tuple(shape), 0, (Piece(0, view[0], view, tuple(sorted(dims))),))

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Reduction:
        """One block."""
        return cls.over(shape, range(max(1, len(shape))))

    @classmethod
    def entries(cls, shape: Sequence[int]) -> Reduction:
        """One block per entry."""
        return cls.over(shape, ())

    @classmethod
    def outputs(cls, shape: Sequence[int], axis: int) -> Reduction:
        """One block per index along `axis`."""
        return cls.over(shape, [d for d in range(len(shape)) if d != axis])

    @classmethod
    def joined(cls, shape: Sequence[int], axis: int, pieces: Sequence[Piece]) -> Reduction:
        """Pieces that follow each other along `axis` and cover it."""
        ends = [0, *(piece.stop for piece in pieces)]
        if [piece.start for piece in pieces] != ends[:-1] or ends[-1] != shape[axis]:
            raise ValueError(
                f"`pieces` {list(pieces)} do not cover axis {axis} of shape {list(shape)} one after another"
            )
        return cls(tuple(shape), axis, tuple(pieces))

    @classmethod
    def labelled(cls, labels: Tensor) -> Reduction:
        """Any blocks, from the number of each entry's block [*shape], counted from 0 without gaps."""
        compact = _compact(labels)
        return cls(tuple(labels.shape), 0, (), labels.to(torch.int32)) if compact is None else compact

    @classmethod
    def read(cls, plain: Any) -> Reduction:
        """From `tuple(reduction)`, also where lists have taken the place of tuples."""
        shape, axis, pieces, labels = plain
        made = tuple(Piece(start, stop, tuple(view), tuple(dims)) for start, stop, view, dims in pieces)
        return cls(tuple(shape), axis, made, labels)

    @property
    def plain(self) -> tuple[Any, ...]:
        """Nested tuples, for a state dict."""
        return self.shape, self.axis, tuple(tuple(piece) for piece in self.pieces), self.labels

    @property
    def num_blocks(self) -> int:
        if self.labels is not None:
            return int(self.labels.max()) + 1
        return sum(math.prod(piece.kept) for piece in self.pieces)

    @property
    def is_identity(self) -> bool:
        """Whether every entry is a block of its own, in order."""
        return self.labels is None and len(self.pieces) == 1 and not self.pieces[0].dims

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean of every block [num_blocks]."""
        if self.labels is not None:
            labels = self.labels.to(tensor.device).reshape(-1).long()
            zeros = tensor.new_zeros(self.num_blocks)
            count = zeros.index_add(0, labels, torch.ones_like(tensor).reshape(-1))
            return zeros.index_add(0, labels, tensor.reshape(-1)) / count
        if len(self.pieces) == 1:
            return _mean(tensor, self.pieces[0])
        parts = [_mean(tensor.narrow(self.axis, p.start, p.stop - p.start), p) for p in self.pieces]
        return torch.cat(parts)

    def expand(self, values: Tensor) -> Tensor:
        """Of values [num_blocks], that of its block everywhere: a tensor [*shape], or one that broadcasts to it."""
        if self.labels is not None:
            return values[self.labels.to(values.device).long()]
        if len(self.pieces) == 1 and self.pieces[0].view == (self.shape or (1,)):
            kept = self.pieces[0].kept
            return values.view(kept if self.shape else ())
        parts, start = [], 0
        for piece in self.pieces:
            size = math.prod(piece.kept)
            shape = list(self.shape)
            shape[self.axis] = piece.stop - piece.start
            parts.append(values[start : start + size].view(piece.kept).expand(piece.view).reshape(shape))
            start += size
        return torch.cat(parts, self.axis) if len(parts) > 1 else parts[0]

    def block_labels(self) -> Tensor:
        """Number of the block of every entry [*shape], int64."""
        numbers = torch.arange(self.num_blocks)
        return self.expand(numbers).expand(self.shape)


def indices_of(reduction: Reduction, name: str) -> list[tuple[Part, ...]]:
    """Flat positions of every block of the tensor `name`, in the order of the block numbers."""
    labels = reduction.block_labels().reshape(-1)
    order = labels.argsort(stable=True)
    sizes = labels.bincount(minlength=reduction.num_blocks).tolist()
    return [((name, positions),) for positions in order.split(sizes)]


def _mean(tensor: Tensor, piece: Piece) -> Tensor:
    seen = tensor.reshape(piece.view)
    return (seen.mean(piece.dims) if piece.dims else seen).reshape(-1)


def _compact(labels: Tensor) -> Reduction | None:
    """The same blocks without labels, where they are equal runs along one axis or the whole."""
    if int(labels.max()) == 0:
        return Reduction.whole(labels.shape)
    for axis in range(labels.ndim):
        length = labels.shape[axis]
        lines = labels.movedim(axis, 0).reshape(length, -1)
        line = lines[:, 0]
        num = int(line.max()) + 1
        if length % num or not bool((lines == line.unsqueeze(1)).all()):
            continue
        run = length // num
        if torch.equal(line, torch.arange(num, device=line.device).repeat_interleave(run)):
            before, after = tuple(labels.shape[:axis]), tuple(labels.shape[axis + 1 :])
            view = (*before, num, run, *after)
            dims = tuple(d for d in range(len(view)) if d != axis)
            return Reduction(tuple(labels.shape), axis, (Piece(0, length, view, dims),))
    flat = labels.reshape(-1)
    return (
        Reduction.entries(labels.shape) if torch.equal(flat, torch.arange(flat.numel(), device=flat.device)) else None
    )
