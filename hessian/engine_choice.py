"""The choice among engines: the first that can differentiate, and a compiled one for long runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..landscape.objective import Objective
from ..landscape.selection import near_names
from .compiled_engine import COMPILE_SECONDS, COMPILED_SAVING, Compiled
from .difference_engine import FiniteDifference
from .engines import Engine, NotTwiceDifferentiable
from .graph_engine import DoubleBackward
from .tangent_engine import ForwardOverReverse

# Tried in this order; the compiled engine comes in when a run is long enough.
CANDIDATES: tuple[type[Engine], ...] = (DoubleBackward, ForwardOverReverse, FiniteDifference)
ENGINES: dict[str, type[Engine]] = {kind.name: kind for kind in (*CANDIDATES, Compiled)}
AUTO = "auto"
# Seconds of tracing and compiling for one node of the loss's graph: a decision rests on it, no result.
SECONDS_PER_NODE = 0.15

T = TypeVar("T")


def make_engine(objective: Objective, engine: str) -> Engine:
    """The engine of that name; "auto" chooses.

    Raises:
        ValueError: no such engine, or one that cannot take a closure without arguments.
    """
    if engine == AUTO:
        return Auto(objective)
    if engine not in ENGINES:
        names = [AUTO, *ENGINES]
        raise ValueError(f"`engine` is {engine!r}; choose among {names} (near: {near_names(engine, names)})")
    if objective.captures_tensors and engine != DoubleBackward.name:
        raise ValueError(
            f"`engine` is {engine!r}, but the closure takes no arguments, so nothing can be put in its tensors' "
            f"place; write closure(*tensors), or use engine={DoubleBackward.name!r}"
        )
    return ENGINES[engine](objective)


class Auto(Engine):
    """Double backward, forward over reverse and differences: the first that can differentiate this objective.

    Candidates are tried on the products that are asked for; one that fails hands the product to the next. When
    `expect` announces so many products that tracing and compiling pay for themselves, judged by the seconds that a
    product takes, the compiled engine is made and takes over if it is faster. `name` and `reason` are those of the
    engine in use.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        kinds = CANDIDATES[:1] if objective.captures_tensors else CANDIDATES
        self._waiting = list(kinds)
        self._failures: list[str] = []
        self._settled = False
        self._current = self._next()
        self._expected = 0
        self._fastest = float("inf")  # seconds of a product
        self._compiled: Compiled | None = None
        self._may_compile = True

    @property
    def chosen(self) -> Engine:
        """The engine in use; before any product a probe decides."""
        if not self._settled:
            n = self.objective.num_parameters
            probe = torch.full((n, 1), n**-0.5, dtype=self.objective.dtype, device=self.objective.device)
            self.matmat(probe)
        return self._compiled if self._compiled is not None else self._current

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.chosen.name

    @property
    def reason(self) -> str:  # type: ignore[override]
        return self.chosen.reason

    @property
    def relative_error(self) -> float:
        return self._tried(lambda engine: engine.relative_error) if self._settled else self.chosen.relative_error

    def relative_error_of(self, subset: Sequence[int]) -> float:
        return self.chosen.relative_error_of(subset)

    def expect(self, products: int) -> None:
        self._expected = max(0, products)
        if self._compiled is not None:
            self._compiled.expect(products)

    def gradient(self) -> Tensor:
        if self._compiled is not None:
            return self._compiled.gradient()
        return self._tried(lambda engine: engine.gradient())

    def local_matmat(self, V: Tensor, subset: Sequence[int]) -> Tensor:
        return self.chosen.local_matmat(V, subset)

    def products(self, parts: Sequence[tuple[Tensor, Sequence[int]]]) -> list[Tensor]:
        columns = sum(V.shape[1] for V, _ in parts)
        if columns == 0:
            return [V.clone() for V, _ in parts]
        n = self.objective.num_parameters
        whole = all(V.shape[0] == n for V, _ in parts)
        if whole and self._compiled is None and self._settled and self._pays():
            self._compile()
        if self._compiled is not None:
            found = self._compiled.products(parts)
            if self._compiled.refused:
                self._back_to_graphs()
            return found
        start = time.perf_counter()
        found = self._tried(lambda engine: engine.products(parts))
        if whole:
            self._fastest = min(self._fastest, (time.perf_counter() - start) / columns)
            self._expected = max(0, self._expected - columns)
        return found

    def _tried(self, use: Callable[[Engine], T]) -> T:
        """What `use` gives with the first candidate that can differentiate."""
        while True:
            try:
                found = use(self._current)
            except (RuntimeError, NotImplementedError) as error:
                if not isinstance(error, NotTwiceDifferentiable) and not _undifferentiable(error):
                    raise
                self._failures.append(f"{self._current.name}: {str(error).splitlines()[0][:160]}")
                if not self._waiting:
                    failures = "; ".join(self._failures)
                    raise RuntimeError(f"no engine can differentiate this objective twice: {failures}") from error
                self._current = self._next()
            else:
                self._settled = True
                return found

    def _next(self) -> Engine:
        engine = self._waiting.pop(0)(self.objective)
        if self._failures:
            engine.reason = "the engines before it cannot differentiate this loss (" + "; ".join(self._failures) + ")"
        else:
            engine.reason = "exact, and the fastest: its graph is kept between products"
        return engine

    def _pays(self) -> bool:
        """Whether the products still expected would take longer than they would with those of a compiled program."""
        objective = self.objective
        gain = self._expected * self._fastest * COMPILED_SAVING
        possible = self._may_compile and isinstance(self._current, DoubleBackward)
        if not possible or not COMPILE_SECONDS < gain < float("inf"):
            return False
        if objective.captures_tensors or objective.group is not None or objective.custom_functions:
            return False
        return gain > COMPILE_SECONDS + SECONDS_PER_NODE * _nodes(objective)

    def _compile(self) -> None:
        assert isinstance(self._current, DoubleBackward)
        compiled = Compiled(self.objective, exact=self._current, only_if_faster=True)
        compiled.expect(self._expected)
        self._compiled = compiled

    def _back_to_graphs(self) -> None:
        """After a compiled engine that refused: its reason stays, and no other is made."""
        assert self._compiled is not None
        self._current.reason = self._compiled.reason
        self._compiled, self._may_compile = None, False


def _nodes(objective: Objective) -> int:
    """Nodes in the autograd graph of the first chunk's loss."""
    with objective.evaluation() as theta:
        loss = objective.chunk_loss(next(objective.chunks()), theta)
        seen, waiting = set(), [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting.extend(parent for parent, _ in node.next_functions)
        return len(seen)


def _undifferentiable(error: Exception) -> bool:
    """Whether an error says that an operation has no (second) derivative, as against a mistake of the user's."""
    text = str(error).lower()
    signs = (
        "derivative for",
        "not implemented",
        "once_differentiable",
        "differentiate twice",
        "forward ad",
        "forward-mode ad",
        "double backward",
        "does not support",
        "setup_context",
        "functorch",
        "vmap",
        "custom_function",
        "generate_vmap_rule",
        "trying to backward through",
        "zerotensors",
        "create_graph",
    )
    return any(sign in text for sign in signs)
