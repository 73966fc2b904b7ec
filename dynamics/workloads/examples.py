"""Labelled examples as two tensors, and their division into a part to train on and a part held out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Examples(NamedTuple):
    """`inputs` and `targets` with the same number of rows; a batch as every objective reads it."""

    inputs: Tensor
    targets: Tensor

    @property
    def num(self) -> int:
        return self.inputs.shape[0]

    def chosen(self, numbers: Tensor | None) -> Examples:
        """The examples with these numbers [b]; None takes all."""
        if numbers is None:
            return self
        numbers = numbers.to(self.inputs.device)
        return Examples(self.inputs[numbers], self.targets[numbers])


class Dataset(NamedTuple):
    """What to train on and what to hold out, with a line that says where it came from."""

    train: Examples
    held_out: Examples
    source: str


def num_to_train_on(asked: int | None, available: int, default: int | None = None) -> int:
    """`asked` when there are as many; for None the default, or what there is."""
    if asked is None:
        return available if default is None else min(default, available)
    if not 1 <= asked <= available:
        raise ValueError(f"`num_examples` is {asked}; this data has {available} to train on: ask for 1 to {available}")
    return asked
