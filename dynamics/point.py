"""What a measurement sees: one moment of training, and the little it may remember."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer

from ..hessian.curvature import Hessian
from ..landscape.objective import Objective
from .row import Row

T = TypeVar("T")


class PointHessian(Hessian):
    """The Hessian at a point, which starts Lanczos from the gradient that the point already has."""

    def __init__(self, objective: Objective, gradient: Callable[[], Tensor]) -> None:
        super().__init__(objective)
        self._gradient = gradient

    def start_vector(self) -> Tensor:
        return self._gradient()


class Point:
    """The weights at one training step, with everything measured there computed once.

    Loss, gradient and Hessian are made at the first request and shared by all measurements of the step.

    Args:
        step: Optimizer steps taken so far.
        objective: The loss, at the weights of this step.
        optimizer: The optimizer about to step, where there is one (a checkpoint has none).
        state: What the measurement remembers from step to step, such as eigenvectors to start from: strings to
            tensors or numbers, changed in place. It is saved with the monitor.
        update: The last change of the selected parameters, θ_t − θ_(t−1), flat [n]; None where it is unknown.
    """

    def __init__(
        self,
        step: int,
        objective: Objective,
        optimizer: Optimizer | None = None,
        *,
        state: dict[str, Any] | None = None,
        update: Tensor | None = None,
    ) -> None:
        self.step = step
        self.objective = objective
        self.optimizer = optimizer
        self.state: dict[str, Any] = {} if state is None else state
        self.update = update
        self._shared: dict[str, Any] = {}
        # Cached apart from `_shared`: the Hessian refers to it, and must not hold the point that holds the Hessian.
        # Such a cycle would keep the graphs of every step until the garbage collector runs.
        self._gradient = functools.cache(objective.gradient)

    def with_state(self, state: dict[str, Any]) -> Point:
        """The same point for another measurement: `state` is its own, computed values are shared."""
        other = copy.copy(self)
        other.state = state
        return other

    def shared(self, key: str, compute: Callable[[], T]) -> T:
        """`compute()`, once for all measurements of this point that ask for `key`."""
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]

    def loss(self) -> float:
        """Mean loss over the objective's data."""
        return self.shared("loss", self.objective.loss)

    def gradient(self) -> Tensor:
        """Gradient of the loss, flat [n]."""
        return self._gradient()

    def hessian(self) -> Hessian:
        """Hessian of the loss, an operator [n, n]."""
        return self.shared("hessian", lambda: PointHessian(self.objective, self._gradient))

    def __repr__(self) -> str:
        return f"Point(step={self.step}, objective={self.objective!r})"


@runtime_checkable
class Measurement(Protocol):
    """What `Monitor` and `replay` run: anything with a name, a period and rows for a point.

    A frozen dataclass is the usual form: its repr then says everything that decides the result, which is what
    `replay` caches by. A measurement that reads `point.update` sets a class attribute `needs_update = True`, which
    makes the monitor keep the parameters of the step before.
    """

    @property
    def name(self) -> str:
        """Tells measurements of one monitor apart; a failed measurement is recorded under it."""
        ...

    @property
    def every(self) -> int | None:
        """Measure at steps 0, every, 2·every, ...; None leaves it to the monitor."""
        ...

    def measure(self, point: Point) -> Iterable[Row]:
        """The rows of this point."""
        ...


def checked_measurements(measurements: Iterable[Measurement]) -> tuple[Measurement, ...]:
    """The measurements, when each of them is one and no two share a name."""
    if isinstance(measurements, Measurement) or not isinstance(measurements, Iterable):
        raise TypeError(f"`measurements` is {measurements!r}; pass a list, such as [Loss(), Sharpness(every=10)]")
    measurements = tuple(measurements)
    names = set()
    for measurement in measurements:
        if isinstance(measurement, type) or not isinstance(measurement, Measurement):
            cure = f"write {measurement.__name__}()" if isinstance(measurement, type) else "see Measurement"
            raise TypeError(
                f"`measurements` holds {measurement!r}, not an object with `name`, `every`, `measure(point)`; {cure}"
            )
        if measurement.name in names:
            raise ValueError(
                f"`measurements` has two named {measurement.name!r}, whose rows would overwrite each other; "
                f'give one another name: {type(measurement).__name__}(..., name="...")'
            )
        names.add(measurement.name)
    return measurements


def measured_rows(measurement: Measurement, point: Point) -> list[Row]:
    """The rows of one measurement, when they are rows and it remembers only what can be saved."""
    rows = list(measurement.measure(point))
    for row in rows:
        if not isinstance(row, Row):
            raise TypeError(
                f"measurement {measurement.name!r} yielded {row!r}; `measure` must yield sharpscope Row objects"
            )
    for key, value in point.state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor | bool | int | float | str | None):
            raise TypeError(
                f"measurement {measurement.name!r} keeps {key!r}: {type(value).__name__} in `point.state`; "
                "only tensors, numbers and strings under string keys can be saved and resumed"
            )
    return rows
