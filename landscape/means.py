"""Whether the loss of a batch is the mean over what is counted: else batches and chunks would be weighted wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .batches import examples, map_tensors, tensors_of

if TYPE_CHECKING:
    from .evaluation import Evaluation


def check_mean(objective: Evaluation, sizes: Sequence[int], batches: Sequence[tuple[int, Any]]) -> None:
    """Cuts batches in halves and joins parts of two, and compares the losses, wherever weights depend on it.

    Whole batches with a count that the user gave, or that a known criterion determines, need no check; chunks always
    do.

    Args:
        sizes: Examples of every batch.
        batches: The first batches with their numbers.

    Raises:
        ValueError: the loss is no such mean, or nothing tells what it is a mean of.
    """
    cuts = objective._chunk_size is not None
    counted = bool(batches) and objective.knows_count(batches[0][1])
    several = (len(sizes) > 1 or objective.group is not None) and not counted
    if objective._reduction == "sum":
        several = False
    if not cuts and not several:
        return
    for number, batch in batches:
        if sizes[number] > 1:
            half = sizes[number] // 2
            parts = [examples(batch, 0, half, sizes[number]), examples(batch, half, sizes[number], sizes[number])]
            _compare(objective, batch, parts, number, cuts)
    if several:
        first_number, first = batches[0]
        for number, batch in batches[1:]:
            few = [min(2, sizes[first_number]), min(2, sizes[number])]
            parts = [
                examples(first, 0, few[0], sizes[first_number]),
                examples(batch, 0, few[1], sizes[number]),
            ]
            joined = _joined(parts[0], parts[1], few[0], few[1])
            if joined is None:
                raise ValueError(
                    f"batches {first_number} and {number} hold tensors of different shapes, so nothing tells whether "
                    "the loss is a mean over examples or over tokens; pass count=lambda batch: number of terms behind "
                    "the batch's mean"
                )
            _compare(objective, joined, parts, number, cuts)


def _joined(first: Any, second: Any, size1: int, size2: int) -> Any:
    """The examples of both in one batch, or None where shapes do not allow it."""
    others = iter(tensors_of(second))
    fits = [len(tensors_of(first)) == len(tensors_of(second))]

    def join(a: Tensor) -> Tensor:
        b = next(others, a)
        by_example = a.ndim > 0 and b.ndim > 0 and a.shape[0] == size1 and b.shape[0] == size2
        if not by_example:
            fits.append(a.shape == b.shape)
            return a
        fits.append(a.shape[1:] == b.shape[1:])
        return torch.cat([a, b]) if fits[-1] else a

    joined = map_tensors(first, join)
    return joined if all(fits) else None


def _compare(objective: Evaluation, whole: Any, parts: Sequence[Any], number: int, cuts: bool) -> None:
    cure = (
        "use chunk_size=None"
        if cuts
        else "pass count=lambda batch: ... with the number of terms behind each batch's mean (or reduction='sum')"
    )
    counts = [objective._terms(part, number) for part in parts]
    count = objective._terms(whole, number)
    if abs(sum(counts) - count) > 1e-6 * count:
        raise ValueError(
            f"`count` gives {count:g} for a batch and {counts[0]:g} + {counts[1]:g} for its parts (batch {number}); "
            f"count what is in the tensors it is given, or {cure}"
        )
    try:
        with objective.evaluation() as theta:
            value = _value(objective, whole, theta)
            values = [_value(objective, p, theta) if c > 0 else 0.0 for p, c in zip(parts, counts, strict=True)]
    except Exception as error:
        raise ValueError(
            f"batch {number} cannot be cut or joined: the loss fails on part of it with {type(error).__name__}: "
            f"{error}; {cure}"
        ) from error
    if objective._reduction == "sum":
        expected = sum(values)
    else:
        expected = sum(v * c for v, c in zip(values, counts, strict=True)) / max(sum(counts), 1e-300)
    spread = max(abs(value), *(abs(v) for v in values))
    if abs(value - expected) <= 64 * objective.coarsest_eps * spread:
        return
    modules = () if objective.model is None else objective.model.modules()
    statistics = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules)
    cause = (
        "BatchNorm takes the statistics of each batch"
        if statistics and objective._mode != "eval"
        else "it is a sum, skips some terms (padding, ignored labels), or mixes examples"
    )
    what = "sum" if objective._reduction == "sum" else "mean"
    raise ValueError(
        f"the loss of a batch ({value:.6g}) is not the {what} over its examples (parts of it give {expected:.6g}, "
        f"batch {number}): {cause}; {cure}"
    )


def _value(objective: Evaluation, batch: Any, theta: Sequence[Tensor]) -> float:
    return float(objective._evaluate(map_tensors(batch, torch.clone), theta).detach())
