"""How the memory of a pass over per-example gradients is shared out: graphs, gradients at work, what is kept."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakSet

from .batches import examples
from .checks import VERIFIED_BATCHES
from .means import check_mean
from .memory import InsufficientMemory, saved_bytes
from .objective import Objective
from .per_example_rows import LEAST_SKETCH

# Bytes kept where no budget is given.
KEPT_BYTES = 1 << 30
# A chunk's activations, their gradients and copies of both, in units of what its graph saves.
GRAPH_FACTOR = 4
# Matrices as large as the gradients at work: rows, scaled rows, squares; order and signs of a sketch.
COPIES = 6
# Examples of a batch that are evaluated to see what they take, and whether batches may be cut: into 2 and 3.
FEW = 5

# Objectives whose batches may be cut, as was seen once.
_cuttable: WeakSet[Objective] = WeakSet()


@dataclass(frozen=True)
class Allotment:
    """What a pass may use.

    Attributes:
        examples: Evaluated together; None as the objective does it.
        entries: Of per-example gradients at work at one time; None as suits the device.
        kept_bytes: For the rows that are kept; None keeps none.
    """

    examples: int | None
    entries: int | None
    kept_bytes: int | None


def allotment(objective: Objective, budget: int | None, *, keep: bool) -> Allotment:
    """Shares out `budget` bytes (None: no limit but that on what is kept).

    Of what the sums and one example's gradient leave, a half goes to graphs and gradients at work, a half to rows.

    Raises:
        ValueError: the budget is no positive number, or the loss of part of a batch is not what it should be.
        InsufficientMemory: it does not hold the sums, one example at work, and the smallest sketch.
    """
    if budget is None:
        return Allotment(None, None, min(KEPT_BYTES, objective.memory_budget) if keep else None)
    if isinstance(budget, bool) or not isinstance(budget, int) or budget <= 0:
        raise ValueError(f"`memory_budget` is {budget!r}; give a positive number of bytes, or None")
    look, itemsize = objective._first_look(), objective.dtype.itemsize
    _check_cuts(objective, look.sizes, budget)
    n, widest = objective.num_parameters, max(objective.layout.sizes)
    # Two sums, two gradients of one example, and the weights where they are evaluated in another type.
    fixed = itemsize * n * (4 + (objective._dtype is not None))
    graph = GRAPH_FACTOR * _graph_bytes(objective)
    work = COPIES * itemsize * widest
    num = objective.num_examples
    kept = 2 * num * (3 * 8 * LEAST_SKETCH + 6 * itemsize * len(objective.layout.names)) if keep else 0
    if fixed + graph + work + kept > budget:
        raise InsufficientMemory(
            f"`memory_budget` is {budget} bytes; {n} parameters and {num} examples need at least "
            f"{fixed + graph + work + kept}: the sums, one example at work"
            + (", and a sketch; raise it, or use collect='sums'" if keep else "; raise it")
        )
    left = budget - fixed
    rows = min(left // 2, left - graph - work) if keep else 0
    at_work = max(work, (left - rows) // 4)
    together = max(1, (left - rows - at_work) // graph)
    return Allotment(min(together, max(look.sizes)), at_work // (COPIES * itemsize), rows if keep else None)


def _graph_bytes(objective: Objective) -> int:
    """What one more example saves, judged from a few: weights are saved once for all."""
    with objective.evaluation() as theta:
        chunk = next(objective.chunks())
        few = min(FEW, chunk.size)
        saved = []
        for count in {1, few}:
            sample = examples(chunk.batch, 0, count, chunk.size)
            saved.append(saved_bytes(lambda sample=sample: objective._evaluate(sample, theta)))
        return max(1, (max(saved) - min(saved)) // (few - 1) if few > 1 else saved[0])


def _check_cuts(objective: Objective, sizes: Sequence[int], budget: int) -> None:
    """A loss that mixes examples, or counts others than the objective does, shows in a few examples of each batch."""
    if objective in _cuttable or objective._chunk_size is not None or not objective._check:
        return
    assert objective._batches is not None
    cut = copy.copy(objective)
    cut._chunk_size = 1
    few = [min(FEW, size) for size in sizes]
    samples = [
        (number, examples(batch, 0, few[number], sizes[number]))
        for number, batch in zip(range(VERIFIED_BATCHES), objective._batches, strict=False)
    ]
    try:
        check_mean(cut, few, [sample for sample in samples if objective._terms(sample[1], sample[0]) > 0])
    except ValueError as error:
        raise ValueError(f"`memory_budget` is {budget}, for which batches would have to be cut: {error}") from error
    _cuttable.add(objective)
