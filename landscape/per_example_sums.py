"""Sums over examples that per-example gradients leave behind: mean, second moments, norms; and rows to be kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .per_example_rows import GradientRows

# Entries of per-example gradients that exist at one time: few enough to stay in a CPU's cache.
CPU_ENTRIES, GPU_ENTRIES = 1 << 18, 1 << 24


class Part(Protocol):
    """What one use of a parameter adds to the examples' gradients of the chunk's loss h_i = s_i g_i.

    `entries` is how many entries it needs per example besides the gradient itself.
    """

    entries: int

    def write(self, out: Tensor, first: int, *, add: bool) -> None:
        """Puts (or adds) the rows of the examples from `first` on into `out` [b, entries of the parameter]."""

    def moments(self, sums: ChunkSums, k: int) -> bool:
        """Adds its sums without forming the rows, where it knows how; it is the only part of parameter k."""
        ...


class ExampleSums:
    """Σ w_i g_i and Σ w_i g_i² by parameter, ‖g_i‖ by example, over all chunks.

    Args:
        theta: The parameters as they are evaluated.
        dtype: Of the sums.
        chunk_size: Examples whose gradients exist at one time; None takes as many as stay in the cache.
        rows: Where each example's gradient is kept, or None.
        entries: Of gradients that exist at one time, at most; None takes what suits the device.
    """

    def __init__(
        self,
        theta: Sequence[Tensor],
        dtype: torch.dtype,
        chunk_size: int | None,
        rows: GradientRows | None = None,
        entries: int | None = None,
    ) -> None:
        self.dtype, self.chunk_size, self.rows, self.entries = dtype, chunk_size, rows, entries
        self.mean, self.second = _uninitialised(theta, dtype), _uninitialised(theta, dtype)
        self._empty = set(range(len(theta)))  # parameters to which nothing was added yet
        self.norms: list[Tensor] = []  # of each chunk, float64
        self.weights: list[Tensor] = []
        self.filled = 0

    def begin(self, k: int) -> bool:
        """Whether the sums of parameter k hold nothing that counts; from now on they do."""
        first = k in self._empty
        self._empty.discard(k)
        return first

    def zero(self, k: int) -> None:
        """Sets the sums of parameter k to zero if nothing was added yet."""
        if self.begin(k):
            self.mean[k].zero_()
            self.second[k].zero_()

    def close(self) -> None:
        """Everything has been added."""
        for k in list(self._empty):
            self.zero(k)
        if self.rows is not None:
            self.rows.close(self.filled)


def _uninitialised(theta: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Flat tensors as long as the parameters and where they are, on one device pieces of one tensor."""
    if len({t.device for t in theta}) > 1:
        return [torch.empty(t.numel(), dtype=dtype, device=t.device) for t in theta]
    sizes = [t.numel() for t in theta]
    return list(torch.empty(sum(sizes), dtype=dtype, device=theta[0].device).split(sizes))


class ChunkSums:
    """One chunk's part of the sums.

    Args:
        weights: w_i of its examples in the objective [b], float64 on the CPU; 0 leaves an example out.
        share: w_c of the chunk, whose loss is Σ_i s_i ℓ_i with s_i = w_i / w_c.
    """

    def __init__(self, sums: ExampleSums, weights: Tensor, share: float) -> None:
        self._sums = sums
        self.share = share
        self.size = len(weights)
        self.kept = weights > 0
        self._weights = weights
        self._inverse = torch.where(self.kept, share / weights, 0.0)
        # 1 / s where all are equal.
        least, most = (float(end) for end in self._inverse.aminmax())
        self.uniform = most if least == most else None
        # ‖h_i‖² of every parameter.
        self._squares = torch.zeros(len(sums.mean), self.size, dtype=torch.float64)
        self._by_place: dict[torch.device, Tensor] = {}
        self._rooms: dict[tuple[int, torch.device], Tensor] = {}

    def inverse(self, like: Tensor) -> Tensor:
        """1 / s_i [b], 0 for examples left out, where and as the sums of `like` are kept."""
        if like.device not in self._by_place:
            self._by_place[like.device] = self._inverse.to(like.device, self._sums.dtype)
        return self._by_place[like.device]

    def cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._sums.dtype)

    def width(self, k: int) -> int:
        """Entries of parameter k."""
        return self._sums.mean[k].numel()

    def of(self, k: int) -> tuple[Tensor, Tensor]:
        """Σ w_i g_i and Σ w_i g_i² of parameter k, to be added to."""
        self._sums.zero(k)
        return self._sums.mean[k], self._sums.second[k]

    def held(self, k: int) -> tuple[Tensor, Tensor, int]:
        """The same, with the factor of what they hold: 0 where that is memory as it was found."""
        return self._sums.mean[k], self._sums.second[k], 1 - self._sums.begin(k)

    def add(self, k: int, parts: Sequence[Part]) -> None:
        """All that the uses of parameter k contribute: their gradients add up before they are squared."""
        if len(parts) == 1 and parts[0].moments(self, k):
            return
        width, device = self.width(k), self._sums.mean[k].device
        step = self.step(width + max(part.entries for part in parts), device)
        for first in range(0, self.size, step):
            rows = self.room(0, min(step, self.size - first), width, device)
            for number, part in enumerate(parts):
                part.write(rows, first, add=number > 0)
            examples = slice(first, first + len(rows))
            self._add(k, rows, self.inverse(rows)[examples], examples)

    def add_examples(self, k: int, gradients: Tensor, numbers: Sequence[int]) -> None:
        """The gradients g_i [m, entries of parameter k] of the examples with these numbers."""
        which = torch.tensor(numbers)
        inverse = self.inverse(gradients)[which.to(gradients.device)]
        self._add(k, self.cast(gradients) / inverse.unsqueeze(1), inverse, which)

    def close(self) -> None:
        """Everything of the chunk has been added."""
        squares = self._squares.sum(0) * self._inverse.square()
        self._sums.norms.append(squares[self.kept].sqrt())
        self._sums.weights.append(self._weights[self.kept])
        self._sums.filled += int(self.kept.sum())

    def norms_of(self, i: int) -> Tensor:
        """‖g_i‖ by parameter."""
        return self._squares[:, i].sqrt() * self._inverse[i]

    def add_squares(self, k: int, squares: Tensor, which: slice | Tensor = slice(None)) -> None:
        """Adds ‖h_i‖² of the chosen examples by parameter k."""
        if isinstance(which, slice):
            self._squares[k][which].add_(squares.cpu())
        else:
            self._squares[k].index_add_(0, which, squares.double().cpu())

    def _add(self, k: int, rows: Tensor, inverse: Tensor, which: slice | Tensor) -> None:
        """Rows h_i of the chosen examples, which are overwritten."""
        mean, second = self.of(k)
        mean.add_(rows.sum(0), alpha=self.share)
        if self._sums.rows is not None:
            self._keep(k, rows, inverse, which)
        rows.square_()
        self.add_squares(k, rows.sum(1), which)
        if self.uniform is not None:
            second.add_(rows.sum(0), alpha=self.share * self.uniform)
        else:
            second.addmv_(rows.mT, inverse, alpha=self.share)

    @property
    def keeps_rows(self) -> bool:
        """Whether the gradients themselves are kept, not only their sums."""
        return self._sums.rows is not None

    def keeps_outer(self, k: int, left: Tensor, right: Tensor) -> bool:
        """Keeps h_i = left_iᵀ right_i of parameter k, from [b, p] and [b, q]; False where they have to be formed."""
        if self._sums.rows is None:
            return True
        kept = self.kept.to(left.device)
        scaled = (left * self.inverse(left).unsqueeze(1))[kept]
        return self._sums.rows.put_outer(k, scaled, right[kept], self._row_numbers()[self.kept])

    def _keep(self, k: int, rows: Tensor, inverse: Tensor, which: slice | Tensor) -> None:
        assert self._sums.rows is not None
        kept, numbers = self.kept[which], self._row_numbers()[which]
        gradients = rows * inverse.unsqueeze(1)
        if not bool(kept.all()):
            gradients, numbers = gradients[kept.to(rows.device)], numbers[kept]
        self._sums.rows.put(k, gradients, numbers)

    def _row_numbers(self) -> Tensor:
        """Where each example of the chunk stands among all that are kept [b]."""
        return self._sums.filled + self.kept.cumsum(0) - 1

    def at_most(self, entries: int) -> int:
        """So many entries, or as many as the pass allows to exist at one time."""
        return entries if self._sums.entries is None else min(entries, self._sums.entries)

    def step(self, entries: int, device: torch.device) -> int:
        """How many examples are worked on at a time when each takes so many entries."""
        if self._sums.chunk_size is not None:
            return min(self.size, self._sums.chunk_size)
        budget = self.at_most(CPU_ENTRIES if device.type == "cpu" else GPU_ENTRIES)
        return max(1, min(self.size, budget // entries))

    def room(self, number: int, count: int, width: int, device: torch.device) -> Tensor:
        """An uninitialised matrix [count, width], in the same memory for all parameters."""
        found = self._rooms.get((number, device))
        if found is None or found.numel() < count * width:
            found = torch.empty(count * width, dtype=self._sums.dtype, device=device)
            self._rooms[number, device] = found
        return found[: count * width].view(count, width)
