"""What an objective computes on one chunk, as a function of tensors: for transforms and traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..landscape.batches import map_tensors, tensors_of
from ..landscape.evaluation import Chunk
from ..landscape.guard import substituted
from ..landscape.objective import Objective


def chunk_function(
    objective: Objective, chunk: Chunk, evaluate: Callable[[Chunk, Sequence[Tensor]], Any]
) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """`evaluate(chunk, theta)` as a function of (the analysed tensors, then others), and the others of this chunk.

    The others are frozen parameters, buffers and the chunk's tensors: whatever may differ between two evaluations of
    the same kind. Call inside the objective's evaluation, and the function too.
    """
    batch = tensors_of(chunk.batch)
    model = objective.model
    if model is None:
        return (lambda *tensors: evaluate(chunk, tensors)), ()
    named = dict(model.named_parameters())
    own = [named.pop(name) for name in objective.layout.names]
    frozen, buffers = list(named.values()), list(model.buffers())
    num_parameters = len(own) + len(frozen)

    def function(*tensors: Tensor) -> Any:
        parameters, rest = tensors[:num_parameters], tensors[num_parameters:]
        # Clones: a model may write to its buffers, and a transform allows that only of tensors made inside it.
        held = [tensor.clone() for tensor in rest[: len(buffers)]]
        data = iter(rest[len(buffers) :])
        places = zip((*own, *frozen, *buffers), (*parameters, *held), strict=True)
        with substituted(model, {id(place): tensor for place, tensor in places}):
            return evaluate(
                replace(chunk, batch=map_tensors(chunk.batch, lambda _: next(data))), parameters[: len(own)]
            )

    return function, (*frozen, *buffers, *batch)
