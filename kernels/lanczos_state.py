"""What the vector work of batched Lanczos is done on, whichever path does it.

Every path module has a class `VectorWork(state)` with `begin(start)`, which normalises the starts [n] into row 0 of the
basis, and `step(product, j)`, which takes the product [n] with row j, orthogonalises it, ends the step and makes row
j + 1. Neither writes to its argument, which is contiguous.

Sizes: B recurrences, n entries of all together, m steps at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .rounded_rows import unit_of

# A remainder below this many roundings of the largest ‖A q‖ is noise: the space is invariant.
BREAKDOWN_EPS = 8


@dataclass(frozen=True)
class State:
    """The tensors of a run, on one device.

    Attributes:
        bounds: Where the recurrences begin and end [B + 1], on the CPU; `offsets` is the same on the device.
        basis: Row j holds q_j of every recurrence [m, n], times its `unit`; zeros once a recurrence has ended.
        recent: The two latest rows as they are [2, n], row j in entry j % 2, where the basis is rounded; else None.
        unit: Power of two with which a recurrence's rows are stored [B], float64, on the CPU; 1 unless rounded.
        alpha: Diagonals [B, m], float64.
        remainder: Norms left by every step [B, m], float64; beside the diagonals once the next step is made.
        scale: Largest ‖A q‖ seen [B], float64.
        steps: Steps made [B], int64.
        open: 1 where the next step is to be made [B], int32.
    """

    bounds: np.ndarray
    offsets: Tensor
    basis: Tensor
    recent: Tensor | None
    unit: Tensor
    alpha: Tensor
    remainder: Tensor
    scale: Tensor
    steps: Tensor
    open: Tensor

    @classmethod
    def empty(
        cls,
        bounds: np.ndarray,
        num_steps: int,
        dtype: torch.dtype,
        device: torch.device,
        basis_dtype: torch.dtype | None = None,
    ) -> State:
        """For a run in `dtype`, whose basis is kept in `basis_dtype`."""
        count, n = len(bounds) - 1, int(bounds[-1])
        rounded = basis_dtype not in (None, dtype)
        units = [unit_of(length) if rounded else 1.0 for length in np.diff(bounds).tolist()]

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            bounds=bounds,
            offsets=torch.from_numpy(bounds).to(device),
            basis=torch.empty(num_steps, n, dtype=basis_dtype if rounded else dtype, device=device),
            recent=torch.empty(2, n, dtype=dtype, device=device) if rounded else None,
            unit=torch.tensor(units, dtype=torch.float64),
            alpha=zeros(count, num_steps),
            remainder=zeros(count, num_steps),
            scale=zeros(count),
            steps=zeros(count, dtype=torch.int64),
            open=torch.ones(count, dtype=torch.int32, device=device),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the run: that of starts and products."""
        return self.basis.dtype if self.recent is None else self.recent.dtype

    @property
    def noise(self) -> float:
        """Share of the largest ‖A q‖ that a remainder must exceed."""
        return BREAKDOWN_EPS * torch.finfo(self.dtype).eps

    def row(self, j: int) -> Tensor:
        """q_j of every recurrence [n], unrounded; j is the latest made or the one before."""
        return self.basis[j] if self.recent is None else self.recent[j % 2]


@dataclass(frozen=True)
class Tiles:
    """Ranges of entries that cross no border between recurrences and are placed from the start of each.

    Attributes:
        owner: Recurrence of a tile [T]; first, last: its entries [T]; tiles_of: the tiles of a recurrence [B + 1].
            All int64.
    """

    owner: Tensor
    first: Tensor
    last: Tensor
    tiles_of: Tensor

    @classmethod
    def of(cls, bounds: np.ndarray, lengths: np.ndarray, device: torch.device) -> Tiles:
        """Tiles of `lengths` [B] entries, the last of each recurrence shorter."""
        counts = -(-np.diff(bounds) // lengths)
        tiles_of = np.concatenate([[0], np.cumsum(counts)])
        owner = np.repeat(np.arange(len(counts)), counts)
        first = bounds[owner] + (np.arange(len(owner)) - tiles_of[owner]) * lengths[owner]
        last = np.minimum(first + lengths[owner], bounds[owner + 1])
        return cls(*(torch.from_numpy(x.astype(np.int64)).to(device) for x in (owner, first, last, tiles_of)))

    def __len__(self) -> int:
        return len(self.owner)
