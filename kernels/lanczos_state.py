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

# A remainder below this many roundings of the largest ‖A q‖ is noise: the space is invariant.
BREAKDOWN_EPS = 8


@dataclass(frozen=True)
class State:
    """The tensors of a run, on one device.

    Attributes:
        bounds: Where the recurrences begin and end [B + 1], on the CPU; `offsets` is the same on the device.
        basis: Row j holds q_j of every recurrence [m, n]; zeros once a recurrence has ended.
        alpha: Diagonals [B, m], float64.
        remainder: Norms left by every step [B, m], float64; beside the diagonals once the next step is made.
        scale: Largest ‖A q‖ seen [B], float64.
        steps: Steps made [B], int64.
        open: 1 where the next step is to be made [B], int32.
    """

    bounds: np.ndarray
    offsets: Tensor
    basis: Tensor
    alpha: Tensor
    remainder: Tensor
    scale: Tensor
    steps: Tensor
    open: Tensor

    @classmethod
    def empty(cls, bounds: np.ndarray, num_steps: int, dtype: torch.dtype, device: torch.device) -> State:
        count = len(bounds) - 1

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            bounds=bounds,
            offsets=torch.from_numpy(bounds).to(device),
            basis=torch.empty(num_steps, int(bounds[-1]), dtype=dtype, device=device),
            alpha=zeros(count, num_steps),
            remainder=zeros(count, num_steps),
            scale=zeros(count),
            steps=zeros(count, dtype=torch.int64),
            open=torch.ones(count, dtype=torch.int32, device=device),
        )

    @property
    def noise(self) -> float:
        """Share of the largest ‖A q‖ that a remainder must exceed."""
        return BREAKDOWN_EPS * torch.finfo(self.basis.dtype).eps


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
