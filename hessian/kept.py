"""Things built per chunk of data and kept between products while the weights stay and the memory lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from ..landscape.evaluation import Chunk
from ..landscape.memory import saved_bytes
from ..landscape.objective import Objective


class OverLeaves(Protocol):
    """Whatever is kept is a graph over these leaves."""

    theta: tuple[Tensor, ...]


Graph = TypeVar("Graph", bound=OverLeaves)


class KeptChunks(Generic[Graph]):
    """Iterates over `build(chunk, theta)` for every chunk of an objective, keeping as many as its memory budget holds.

    Args:
        objective: Whose weights, buffers or data, once changed, make everything kept stale.
        build: Called inside the objective's evaluation.
        changed: Called when everything kept was dropped.
    """

    def __init__(
        self,
        objective: Objective,
        build: Callable[[Chunk, tuple[Tensor, ...]], Graph],
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._objective, self._build, self._changed = objective, build, changed
        self._token: tuple | None = None
        self._kept: dict[tuple[int, int], Graph] = {}
        self._capacity: int | None = None

    def __iter__(self) -> Iterator[Graph]:
        token = self._objective.state_token()
        if token != self._token:
            self._kept, self._token = {}, token
            self._changed()
        first = next(iter(self._kept.values()), None)
        with self._objective.evaluation(None if first is None else first.theta) as theta:
            for chunk in self._objective.chunks():
                key = (chunk.number, chunk.first)
                graph = self._kept.get(key)
                if graph is None:
                    graph = self._build(chunk, theta)
                    if len(self._kept) < self._room(chunk, theta):
                        self._kept[key] = graph
                yield graph

    def _room(self, chunk: Chunk, theta: tuple[Tensor, ...]) -> int:
        """How many fit. A lone chunk needs its graph anyway."""
        if self._capacity is None:
            if chunk.size == chunk.batch_size and self._objective.num_batches == 1:
                self._capacity = 1
            else:
                size = saved_bytes(lambda: self._build(chunk, theta))
                self._capacity = self._objective.memory_budget // max(1, size)
        return self._capacity
