"""Which examples each step trains on, as a function of seed and step alone: nothing to save, nothing to lose."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


class DataOrder:
    """Epochs that go through all examples once, each in a random order of its own.

    Args:
        num_examples: How many there are.
        batch_size: Examples per step; the last batch of an epoch may be smaller. None takes all at once.
        seed: Of the orders.
    """

    def __init__(self, num_examples: int, batch_size: int | None, seed: int) -> None:
        if batch_size is not None and not 1 <= batch_size <= num_examples:
            raise ValueError(
                f"`batch_size` is {batch_size}; there are {num_examples} examples: ask for 1 to {num_examples}, "
                "or 'full'"
            )
        self.num_examples, self.seed = num_examples, seed
        self.batch_size = num_examples if batch_size is None else batch_size
        self.steps_per_epoch = math.ceil(num_examples / self.batch_size)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def at(self, step: int) -> Tensor | None:
        """Numbers [b] of the examples of a step; None means all of them, in their own order."""
        if self.steps_per_epoch == 1:
            return None
        epoch, number = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            # torch's CPU generator reads only 32 bits of its seed; SeedSequence mixes both numbers into them.
            mixed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
            generator = torch.Generator().manual_seed(mixed)
            self._epoch, self._order = epoch, torch.randperm(self.num_examples, generator=generator)
        return self._order[number * self.batch_size : (number + 1) * self.batch_size]
