"""What each example weighs in an objective, and a check that its loss is the weighted mean of the examples' losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batches import examples
from .counting import LABELLED, LABELLED_FUNCTIONS, target_count
from .evaluation import Chunk, Evaluation


def example_weights(objective: Evaluation, chunk: Chunk) -> tuple[Tensor, bool]:
    """w_i of a chunk's examples [b] in float64, and whether a known criterion makes them certain.

    An example with nothing but ignored labels weighs 0.

    Raises:
        ValueError: the user's `count` of the chunk is not the sum over its examples.
    """
    look = objective._first_look()
    counts = None
    if objective._criterion is not None and not objective._count_given:
        counts = _target_counts(objective._criterion, objective._split(chunk.batch)[1], chunk.size)
    if objective._reduction == "sum":
        return torch.ones(chunk.size, dtype=torch.float64), counts is not None
    whole = chunk.weight * look.total
    if counts is not None and abs(float(counts.sum()) - whole) <= 1e-6 * whole:
        return counts / look.total, True
    if not objective.knows_count(chunk.batch):
        return torch.full((chunk.size,), chunk.weight / chunk.size, dtype=torch.float64), False
    pieces = (examples(chunk.batch, i, i + 1, chunk.size) for i in range(chunk.size))
    counts = torch.tensor([objective._terms(piece, chunk.number) for piece in pieces], dtype=torch.float64)
    if abs(float(counts.sum()) - whole) > 1e-6 * whole:
        raise ValueError(
            f"`count` of a batch is not the sum over its examples (batch {chunk.number}); per-example quantities "
            "need a count that can be cut: count=lambda batch: number of terms in the tensors it is given"
        )
    return counts / look.total, False


def _target_counts(criterion: Any, target: Any, size: int) -> Tensor | None:
    """Terms of each example [b] behind a known criterion's mean, or None."""
    if not isinstance(target, Tensor) or target.ndim == 0 or target.shape[0] % size:
        return None
    labelled = isinstance(criterion, LABELLED) or criterion in LABELLED_FUNCTIONS
    if not labelled or target.is_floating_point():
        total = target_count(criterion, target)
        return None if total is None else torch.full((size,), total / size, dtype=torch.float64)
    kept = target != getattr(criterion, "ignore_index", -100)
    weight = getattr(criterion, "weight", None)
    terms = kept if weight is None else kept * weight.double()[target.where(kept, 0).to(weight.device)]
    return terms.reshape(size, -1).sum(1).double().cpu()
