"""The examples of a chunk one by one: as chunks of their own, and as rows that vectorised functions take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..landscape.batches import map_tensors
from ..landscape.checks import BATCH_STATISTICS
from ..landscape.evaluation import Chunk
from ..landscape.objective import Objective
from ..landscape.per_example_weights import example_weights


class ExampleChunk:
    """The examples of one chunk that have a weight; for use inside the objective's evaluation.

    Attributes:
        rows: Every tensor of the batch that has examples [b, rows of an example, ...].
        numbers: Of the examples within the chunk, those without any term left out.
        weights: w_i of each of `numbers` in the objective, in float64.
    """

    def __init__(self, objective: Objective, chunk: Chunk, *, flattened: bool) -> None:
        self._chunk = chunk
        self._flattened = flattened
        self.rows: list[Tensor] = []
        map_tensors(chunk.batch, self._note)
        weights, _ = example_weights(objective, chunk)
        self.numbers = torch.nonzero(weights).reshape(-1).tolist()
        self.weights = weights[self.numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def of(self, rows: Sequence[Tensor]) -> Chunk:
        """The chunk of one example, from its rows of every tensor."""
        left = iter(rows)
        batch = map_tensors(self._chunk.batch, lambda t: next(left) if self._has_examples(t) else t)
        return replace(self._chunk, batch=batch, size=1, batch_size=1)

    def single(self, i: int) -> Chunk:
        """The chunk of the i-th of `numbers`."""
        return self.of([t[self.numbers[i]] for t in self.rows])

    def several(self, first: int, last: int) -> list[Tensor]:
        """Rows of the examples `numbers[first:last]`."""
        return [t[self.numbers[first:last]] for t in self.rows]

    def loss(self, objective: Objective, theta: Sequence[Tensor]) -> float:
        """Weighted loss of the chunk."""
        return self._chunk.weight * float(objective.chunk_loss(self._chunk, theta).detach())

    def _has_examples(self, tensor: Tensor) -> bool:
        if tensor.ndim == 0 or not tensor.shape[0]:
            return False
        size = self._chunk.size
        return tensor.shape[0] % size == 0 if self._flattened else tensor.shape[0] == size

    def _note(self, tensor: Tensor) -> Tensor:
        if self._has_examples(tensor):
            self.rows.append(tensor.reshape(self._chunk.size, -1, *tensor.shape[1:]))
        return tensor


@contextmanager
def example_chunks(objective: Objective) -> Iterator[tuple[tuple[Tensor, ...], list[ExampleChunk]]]:
    """The objective's evaluation with its examples cut, after a check that their losses add up to the objective's.

    Raises:
        ValueError: a closure, data on several ranks, batch statistics, or a loss that is not the examples' mean.
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"`objective` is a {type(objective).__name__}; make one with Objective(model, loss, data)")
    if objective.model is None:
        raise ValueError("a closure has no examples; make the objective with Objective or Objective.supervised")
    if objective.group is not None:
        raise ValueError("the examples are spread over several ranks; make an objective with those of one rank")
    with objective.evaluation() as theta:
        _refuse_batch_statistics(objective.model)
        chunks = list(objective.chunks())
        for flattened in (False, True):
            cut = [ExampleChunk(objective, chunk, flattened=flattened) for chunk in chunks]
            try:
                for part in cut:
                    _check(objective, part, theta)
                break
            except Exception:  # what the user's loss raises on a wrongly cut batch may be anything
                if flattened:
                    raise
        yield theta, cut


def _check(objective: Objective, part: ExampleChunk, theta: Sequence[Tensor]) -> None:
    """The examples' losses must add up to the chunk's; seen beside the weights, since at a fit all of them are zero."""
    beside = [_moved(t) for t in theta]
    with objective.replaced(beside):
        # With gradients on: a loss may differentiate inside itself.
        values = [float(objective.raw_loss(part.single(i), beside).detach()) for i in range(len(part))]
        whole = part.loss(objective, beside)
    losses = torch.tensor(values, dtype=torch.float64)
    total = float(part.weights @ losses)
    share = float(part.weights.sum()) * float(losses.abs().max())
    if not abs(total - whole) <= 1e3 * objective.coarsest_eps * max(share, 1e-30):
        raise ValueError(
            f"beside the weights, the losses of the single examples add up to {total:.6g}, that of their batch to "
            f"{whole:.6g}: the loss mixes examples or is not their mean, so that examples have no Hessians of their own"
        )


def _moved(tensor: Tensor) -> Tensor:
    """The tensor with every entry moved by up to a tenth of their size."""
    size = tensor.detach().square().mean().sqrt()
    size = torch.where(size > 0, size, torch.full_like(size, 0.1))
    turns = torch.arange(1, tensor.numel() + 1, device=tensor.device, dtype=torch.float64).sin().to(tensor.dtype)
    return (tensor.detach() + 0.1 * size * turns.reshape(tensor.shape)).requires_grad_()


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, BATCH_STATISTICS) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{name or 'the model'} takes its statistics from each batch and so mixes examples, which then have no "
                "Hessians of their own; use mode='eval' and running statistics"
            )
