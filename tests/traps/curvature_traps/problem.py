"""A model, a loss and data, as a trap hands them to a tool."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


def as_pair(batch: Any) -> tuple[Any, Any]:
    """(inputs, targets) of a batch that is such a pair."""
    inputs, targets = batch
    return inputs, targets


@dataclass
class Problem:
    """The mean loss of `criterion(model(inputs), targets)` over the examples of all batches.

    Args:
        model: As the user has it, in the mode that is asked for.
        criterion: `criterion(prediction, targets)` -> scalar.
        batches: What the user hands over: a list of batches or a DataLoader.
        whole: The same examples as one batch; it defines the truth.
        split: batch -> (inputs, targets).
        mode: "eval" or "train": whose curvature is asked for. The model is in this mode already.
        reference: A plainly written model with the same parameters, for the truth; None takes `model`.
    """

    model: nn.Module
    criterion: Callable[[Any, Any], Tensor]
    batches: Iterable[Any]
    whole: Any
    split: Callable[[Any], tuple[Any, Any]] = as_pair
    mode: str = "eval"
    reference: nn.Module | None = None

    def __post_init__(self) -> None:
        self.model.train(self.mode == "train")

    @property
    def paired(self) -> bool:
        """Whether batches are (tensor, tensor), which some tools ask for."""
        return self.split is as_pair

    @property
    def parameters(self) -> list[Tensor]:
        """The analysed tensors: those that require grad, in the order of the model."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of one batch."""
        inputs, targets = self.split(batch)
        return self.criterion(model(inputs), targets)

    def pairs(self) -> Iterable[tuple[Any, Any]]:
        """The batches as (inputs, targets), for tools that ask for this form; may be read many times."""
        if self.paired:
            return self.batches
        return [self.split(batch) for batch in self.batches] if isinstance(self.batches, list) else _Pairs(self)


class _Pairs:
    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return (self._problem.split(batch) for batch in self._problem.batches)
