"""Things built per chunk of data and kept between products while the weights stay and the memory lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from ..landscape.evaluation import Chunk
from ..landscape.guard import without_autocast
from ..landscape.memory import saved_bytes
from ..landscape.objective import Objective


class OverLeaves(Protocol):
    """Whatever is kept is a graph over these leaves.

    Attributes:
        needs_model: A pass through the graph runs parts of the model again.
    """

    theta: tuple[Tensor, ...]

    @property
    def needs_model(self) -> bool: ...


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
        self._complete = False

    def __iter__(self) -> Iterator[Graph]:
        token = self._objective.state_token()
        if token != self._token:
            self._kept, self._token, self._complete = {}, token, False
            self._changed()
        if self._complete and not any(graph.needs_model for graph in self._kept.values()):
            with without_autocast():
                yield from self._kept.values()
            return
        first = next(iter(self._kept.values()), None)
        with self._objective.evaluation(None if first is None else first.theta) as theta:
            count = 0
            for chunk in self._objective.chunks():
                count += 1
                key = (chunk.number, chunk.first)
                graph = self._kept.get(key)
                if graph is None:
                    graph = self._build(chunk, theta)
                    if len(self._kept) < self._room(chunk, theta):
                        self._kept[key] = graph
                yield graph
            self._complete = len(self._kept) == count

    def _room(self, chunk: Chunk, theta: tuple[Tensor, ...]) -> int:
        """How many fit. A lone chunk needs its graph anyway."""
        if self._capacity is None:
            if chunk.size == chunk.batch_size and self._objective.num_batches == 1:
                self._capacity = 1
            else:
                built: list[Graph] = []
                size = saved_bytes(lambda: built.append(self._build(chunk, theta)))
                size += int(getattr(built.pop(), "held_bytes", 0))  # what autograd does not see
                self._capacity = self._objective.memory_budget // max(1, size)
        return self._capacity
