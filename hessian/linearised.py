"""J v of a prediction by a traced program: as cheap as J v can be, after a trace that has to pay for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..landscape.batches import tensors_of
from ..landscape.evaluation import Chunk
from ..landscape.memory import storages
from ..landscape.objective import Objective
from .chunk_function import chunk_function
from .tracing import Linear, TangentProgram

# What a trace costs and what it saves, measured on CPUs for dense, convolutional and attention networks; a decision
# rests on them, no result. Seconds of tracing for one node of the prediction's graph:
TRACE_SECONDS = 0.005
# Seconds of a gradient for one byte that the graph holds:
SECONDS_PER_BYTE = {"cpu": 2e-9, "cuda": 2e-11}
# Gradients saved by one product, without and with convolutions, whose double backward does half its work in vain:
SAVED, SAVED_BY_CONVOLUTIONS = 0.25, 1.0
# Traces of one operator: every shape of a batch needs its own.
MAX_PROGRAMS = 8


class Mistraced(RuntimeError):
    """A traced program and the function it was traced from disagree."""


@dataclass
class Shape:
    """What chunks of one shape share: whether a trace pays off for them, and the trace."""

    trace_seconds: float
    seconds_saved: float  # by one product of one chunk
    seconds_lost: float = 0.0  # by products so far, for want of a trace
    program: TangentProgram | None = None


class Linearisations:
    """Decides per shape of chunk whether a trace pays, traces, and linearises the prediction at the current weights.

    A trace is made when what it would save in the products that are expected, or what it would have saved in those
    done, is worth more than it costs: so it never more than doubles the cost. `reason` says why there is none.

    Args:
        objective: Of the supervised form.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.reason = "no run of products has been long enough for a trace to pay"
        self._refused = False
        self._expected = 0
        self._shapes: dict[Any, Shape] = {}

    def expect(self, products: int) -> None:
        self._expected = max(0, products)

    def refuse(self, reason: str) -> None:
        """No traced program from now on."""
        self._refused, self.reason = True, reason
        for shape in self._shapes.values():
            shape.program = None

    def count(self, chunk: Chunk, theta: Sequence[Tensor], outputs: Tensor, products: int) -> None:
        """Books products of a chunk that went without a trace."""
        if not self._refused:
            shape = self._shape(chunk, theta, outputs)
            shape.seconds_lost += products * shape.seconds_saved

    def linearise(self, chunk: Chunk, theta: tuple[Tensor, ...], outputs: Tensor) -> Linear | None:
        """J at `theta` where a trace pays and gives `outputs` again; call inside the objective's evaluation."""
        if self._refused:
            return None
        if self.objective.custom_functions:
            self.refuse(f"custom autograd functions {list(self.objective.custom_functions)} may not survive a trace")
            return None
        shape = self._shape(chunk, theta, outputs)
        gain = max(shape.seconds_lost, self._expected * shape.seconds_saved)
        if shape.program is None and gain <= shape.trace_seconds:
            return None
        function, others = chunk_function(self.objective, chunk, lambda c, _: self.objective.prediction(c)[0])
        try:
            if shape.program is None:
                if sum(s.program is not None for s in self._shapes.values()) >= MAX_PROGRAMS:
                    return None
                shape.program = TangentProgram.trace(function, theta, others)
            linear = shape.program.linearise(theta, others)
        except Exception as error:  # whatever a trace of a user's model may raise: the kept graph does without it
            self.refuse(f"the prediction cannot be traced: {type(error).__name__}: {str(error).splitlines()[:1]}")
            return None
        if not self._equal(linear.value[0], outputs):
            self.refuse("a traced prediction differs from the model's own: it depends on more than its tensors")
            return None
        self.reason = "J v by a traced program; it gives the model's prediction and satisfies ⟨u, J v⟩ = ⟨Jᵀ u, v⟩"
        return linear

    def _equal(self, traced: Tensor, outputs: Tensor) -> bool:
        if traced.shape != outputs.shape or traced.dtype != outputs.dtype:
            return False
        difference = (traced - outputs.detach()).double().norm()
        return bool(difference <= 64 * self.objective.coarsest_eps * outputs.detach().double().norm())

    def _shape(self, chunk: Chunk, theta: Sequence[Tensor], outputs: Tensor) -> Shape:
        key = tuple((tuple(t.shape), t.dtype) for t in (*theta, outputs, *tensors_of(chunk.batch)))
        if key not in self._shapes:
            self._shapes[key] = _estimate(outputs)
        return self._shapes[key]


def _estimate(outputs: Tensor) -> Shape:
    """What a trace would cost and save, judged by the graph of the prediction and the tensors that it holds."""
    nodes, waiting, seen = 0, [outputs.grad_fn], set()
    memory: dict[int, int] = {}
    convolutions = False
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += 1
        convolutions |= "Conv" in node.name()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            held = node.saved_tensors  # type: ignore[attr-defined]
        else:
            held = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        memory.update(storages(tensor for tensor in held if isinstance(tensor, Tensor)))
        waiting.extend(parent for parent, _ in node.next_functions)
    gradient = sum(memory.values()) * SECONDS_PER_BYTE.get(outputs.device.type, SECONDS_PER_BYTE["cpu"])
    saved = SAVED_BY_CONVOLUTIONS if convolutions else SAVED
    return Shape(trace_seconds=TRACE_SECONDS * nodes, seconds_saved=saved * gradient)
