r"""The gradients of all examples, kept as rows, as factors where they are outer products, or as a sketch.

The gradient of a dense layer is δ aᵀ for one example, so that p + q numbers stand for p · q and inner products are
(δ_i · δ_j)(a_i · a_j). What does not fit is sketched: a random signed fold into s numbers whose inner products are
those of the rows on average, with variance at most (‖a‖²‖b‖² + (a · b)²) / s.

Source of the sketch: Charikar, Chen and Farach-Colton, Finding Frequent Items in Data Streams, 2002 (CountSketch);
here with equal buckets for each parameter, for which the bound is derived.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .per_example_storage import Dense, Outer, Sampled

# Entries of each parameter that are kept even where its rows are not.
SAMPLED_COLUMNS = 64
# Numbers in a sketch.
LEAST_SKETCH, MOST_SKETCH = 16, 1024
# Entries of a row that are folded at one time.
FOLDED_COLUMNS = 4096


class GradientRows:
    """g_i of N examples, filled parameter by parameter and chunk by chunk.

    Args:
        theta: The parameters as they are evaluated.
        dtype: Of what is kept.
        num_examples: Rows to make room for.
        memory: Bytes that may be kept.
        seed: Of the sketch and of the sampled entries.
    """

    def __init__(
        self, theta: Sequence[Tensor], dtype: torch.dtype, num_examples: int, memory: int, seed: int = 0
    ) -> None:
        self.num_examples, self._dtype, self._seed = num_examples, dtype, seed
        self._widths = [t.numel() for t in theta]
        self._offsets = [0, *accumulate(self._widths)]
        self._places = [t.device for t in theta]
        self._kept: list[Dense | Outer | Sampled | None] = [None] * len(self._widths)
        itemsize = dtype.itemsize
        self._row_bytes = max(1, num_examples) * itemsize
        self._free, self._sketch, self._columns = memory, None, SAMPLED_COLUMNS
        if self._row_bytes * self._offsets[-1] > memory:
            size = max(LEAST_SKETCH, min(MOST_SKETCH, memory // (3 * max(1, num_examples) * 8)))
            self._sketch = torch.zeros(num_examples, size, dtype=torch.float64, device=self._places[0])
            self._columns = max(1, min(SAMPLED_COLUMNS, memory // (6 * self._row_bytes * len(self._widths))))
            self._free = memory // 2
        self._sketched_squares = torch.zeros(num_examples, dtype=torch.float64)
        # Parameter, shift, order and signs of the last fold: the next is mostly of the same parameter.
        self._folding: tuple[int, int, Tensor, Tensor] = (-1, 0, torch.empty(0), torch.empty(0))

    @property
    def exact(self) -> bool:
        """Whether nothing was sketched."""
        return not any(isinstance(kept, Sampled) for kept in self._kept)

    @property
    def needed_bytes(self) -> int:
        """What keeping all rows takes."""
        return self._row_bytes * self._offsets[-1]

    def put(self, k: int, rows: Tensor, places: Tensor) -> None:
        """Rows [m, entries of parameter k] of the examples numbered `places` [m]."""
        kept = self._kept[k]
        if kept is None or isinstance(kept, Outer):
            self._kept[k] = self._room(k) if kept is None else self._room_for_factors(k, kept)
        self._store(k, rows, places)

    def put_outer(self, k: int, left: Tensor, right: Tensor, places: Tensor) -> bool:
        """The rows left_iᵀ right_i of parameter k from [m, p] and [m, q]; False where they are to be put formed."""
        kept = self._kept[k]
        if kept is None:
            numbers = left.shape[1] + right.shape[1]
            if numbers >= self._widths[k] or not self._reserve(numbers):
                return False
            kept = Outer.empty(self.num_examples, left, right)
            self._kept[k] = kept
        if not isinstance(kept, Outer):
            return False
        kept.put(left, right, places)
        return True

    def close(self, filled: int) -> None:
        """The first `filled` rows hold everything."""
        self.num_examples = filled
        for kept in self._kept:
            if kept is not None:
                kept.cut(filled)
        self._sketched_squares = self._sketched_squares[:filled]
        self._sketch = None if self._sketch is None or self.exact else self._sketch[:filled]

    def inner_products(self, first: slice, second: slice) -> Tensor:
        """g_i · g_j [i, j] in float64 on the CPU; of what is sketched, estimates."""
        total = torch.zeros(_length(first, self.num_examples), _length(second, self.num_examples), dtype=torch.float64)
        for kept in self._kept:
            if isinstance(kept, Dense | Outer):
                total += kept.inner_products(first, second).cpu()
        if self._sketch is not None:
            total += (self._sketch[first] @ self._sketch[second].mT).cpu()
        return total

    def variances(self, first: slice, second: slice) -> Tensor:
        """Variance [i, j] of the entries of `inner_products` from the sketch, at most; 0 without one."""
        a, b = self._sketched_squares[first], self._sketched_squares[second]
        if self._sketch is None:
            return torch.zeros(len(a), len(b), dtype=torch.float64)
        inner = (self._sketch[first] @ self._sketch[second].mT).cpu()
        return (a.unsqueeze(1) * b + inner.square()) / self._sketch.shape[1]

    def pair_sum_error(self, c: Tensor) -> float:
        """Standard error of Σ_(i≠j) c_i c_j g_i · g_j from the sketch, at most: √(2 ‖A‖²_F / s) for the matrix A of
        this quadratic form, estimated by its sketch."""
        if self._sketch is None:
            return 0.0
        scaled = self._sketch * c.to(self._sketch).unsqueeze(1)
        A = torch.outer(scaled.sum(0), scaled.sum(0)) - scaled.mT @ scaled
        return float(A.norm()) * (2 / self._sketch.shape[1]) ** 0.5

    def times(self, v: Tensor) -> Tensor:
        """g_i · v [N] for v [n], in float64 on the CPU; of what is sketched, an estimate."""
        total = torch.zeros(self.num_examples, dtype=torch.float64)
        for k, kept in enumerate(self._kept):
            piece = v[self._offsets[k] : self._offsets[k + 1]]
            if isinstance(kept, Dense | Outer):
                total += kept.times(piece.to(self._places[k], self._dtype)).cpu()
            elif isinstance(kept, Sampled):
                assert self._sketch is not None
                folded = self._fold(k, piece.unsqueeze(0).to(self._sketch.device, torch.float64))[0]
                total += (self._sketch @ folded).cpu()
        return total

    def combined(self, coefficients: Tensor) -> Tensor:
        """Σ_i c_i g_i [n] for c [N]; needs exact rows."""
        out = coefficients.new_zeros(self._offsets[-1], dtype=self._dtype, device=self._places[0])
        for k, kept in enumerate(self._kept):
            if isinstance(kept, Dense | Outer):
                piece = kept.combined(coefficients.to(self._places[k], self._dtype))
                out[self._offsets[k] : self._offsets[k + 1]] = piece.to(out.device)
        return out

    def rows(self, which: slice) -> Tensor:
        """g_i [i, n]; needs exact rows."""
        out = torch.zeros(
            _length(which, self.num_examples), self._offsets[-1], dtype=self._dtype, device=self._places[0]
        )
        for k, kept in enumerate(self._kept):
            if isinstance(kept, Dense | Outer):
                out[:, self._offsets[k] : self._offsets[k + 1]] = kept.rows(which).to(out.device)
        return out

    def columns(self, k: int, count: int) -> Tensor:
        """At most `count` entries of parameter k, drawn at random, of all examples [N, c]."""
        kept = self._kept[k]
        if kept is None:
            return torch.zeros(self.num_examples, min(count, self._widths[k]), dtype=self._dtype)
        if isinstance(kept, Sampled):
            return kept.matrix[:, :count]
        return kept.columns(self._drawn(k, count))

    def _reserve(self, numbers: int) -> bool:
        """Takes room for so many numbers per example, if there is."""
        if numbers * self._row_bytes > self._free:
            return False
        self._free -= numbers * self._row_bytes
        return True

    def _room(self, k: int) -> Dense | Sampled:
        if self._reserve(self._widths[k]):
            return Dense(torch.zeros(self.num_examples, self._widths[k], dtype=self._dtype, device=self._places[k]))
        drawn = self._drawn(k, self._columns)
        empty = torch.zeros(self.num_examples, len(drawn), dtype=self._dtype, device=self._places[k])
        return Sampled(empty, drawn)

    def _room_for_factors(self, k: int, factors: Outer) -> Dense | Sampled:
        """Room for the rows of a parameter whose factors were kept so far, with these in it."""
        self._free += (factors.left.shape[1] + factors.right.shape[1]) * self._row_bytes
        self._kept[k] = room = self._room(k)
        for i in range(self.num_examples):
            self._store(k, factors.rows(slice(i, i + 1)), torch.tensor([i]))
        return room

    def _store(self, k: int, rows: Tensor, places: Tensor) -> None:
        kept = self._kept[k]
        if isinstance(kept, Sampled):
            self._fold_in(k, kept, rows, places)
        elif isinstance(kept, Dense):
            kept.put(rows, places)

    def _drawn(self, k: int, count: int) -> Tensor:
        """Positions of at most `count` entries of parameter k, always the same ones first."""
        random = torch.Generator().manual_seed(self._seed * 1_000_003 + k)
        return torch.randperm(self._widths[k], generator=random)[:count].clone().to(self._places[k])

    def _fold_in(self, k: int, kept: Sampled, rows: Tensor, places: Tensor) -> None:
        assert self._sketch is not None
        kept.matrix[places.to(rows.device)] = rows[:, kept.drawn]
        self._sketched_squares[places] += rows.square().sum(1, dtype=torch.float64).cpu()
        folded = self._fold(k, rows).to(self._sketch.device, torch.float64)
        self._sketch[places.to(self._sketch.device)] += folded

    def _fold(self, k: int, rows: Tensor) -> Tensor:
        """Rows [m, width] with random signs, in a random order, added up into as many buckets as the sketch has."""
        assert self._sketch is not None
        size, width = self._sketch.shape[1], rows.shape[1]
        if self._folding[0] != k:
            random = torch.Generator().manual_seed(self._seed * 1_000_003 + k + 500_000)
            shift = int(torch.randint(0, size, (), generator=random))
            order = torch.randperm(width, generator=random).to(rows.device)
            signs = torch.randint(0, 2, (width,), generator=random, dtype=torch.int8).to(rows.device)
            self._folding = k, shift, order, signs
        _, shift, order, signs = self._folding
        out = rows.new_zeros(len(rows), size)
        step = size * max(1, FOLDED_COLUMNS // size)
        for first in range(0, width, step):
            some = slice(first, min(first + step, width))
            signed = rows[:, order[some]] * (2 * signs[some].to(rows.dtype) - 1)
            whole = signed.shape[1] // size * size
            out += signed[:, :whole].reshape(len(rows), -1, size).sum(1)
            out[:, : signed.shape[1] - whole] += signed[:, whole:]
        return out.roll(shift, 1)


def _length(part: slice, size: int) -> int:
    return len(range(*part.indices(size)))
