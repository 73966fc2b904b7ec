"""Measuring while an optimizer trains, without touching what it trains."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from time import perf_counter
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..landscape.guard import plain_evaluation
from ..landscape.objective import Objective
from ..landscape.state import full_tensor
from .cadence import Cadence
from .point import Measurement, Point, checked_measurements, measured_rows
from .row import Row
from .trajectory import Trajectory

_STATE_VERSION = 2
_ON_ERROR = ("warn", "raise")


class MeasurementFailedWarning(UserWarning):
    """A measurement raised; its row is NaN and training went on."""


class Monitor:
    """Runs measurements along a training loop and records their rows.

    `step()` stands first in the iteration, so that step t means weights and buffers after t updates:

        with Monitor(objective, optimizer, [Loss(), Sharpness(every=10)], trajectory) as monitor:
            for batch in loader:
                monitor.step()
                ...forward, backward...
                optimizer.step()

    Leaving the `with` block, or `close()`, measures the final weights with every measurement. The training is left
    bit for bit as it would be without a monitor: weights, `.grad`, buffers, modes, optimizer state, random streams.

    To resume a run, save `state_dict()` beside model and optimizer after the optimizer's step, load it before the
    first `step()`: the numbers go on as if nothing had happened, and rows of the trajectory later than the state are
    discarded.

    A measurement that fails the first time it runs raises: it is likely a mistake, and nothing is lost yet. A later
    failure, such as the NaN loss of a diverged run, leaves a NaN row that is marked as not converged under the
    measurement's name, and one warning for each kind of error; training goes on.

    Args:
        objective: The loss to analyse, on fixed data; its model is the one in training.
        optimizer: The optimizer in the loop; None for a hand-written update.
        measurements: What to measure, with different names. Any object that is a `Measurement`.
        trajectory: Where the rows go; those of one step in one transaction.
        every: Period in steps of the measurements that name none; default 1.
        max_overhead: Largest share of wall time for all measurements together, in (0, 1), over the run since the
            first `step()`. The first measurement of each and the final point are made whatever they cost, so a run
            begins above it, measures nothing more until it is below, and then stays there. What is expensive gets a
            longer spacing, a multiple of its period that suits its mean cost; see `Cadence`. A row "cadence" (block:
            the measurement's name, value: steps from one to the next) stands where it changes, a row "skipped" (value:
            how often it was wanted and not made) at the end. All this depends on the clock.
        on_error: "warn" is described above; "raise" stops at any failure.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer | None,
        measurements: Iterable[Measurement],
        trajectory: Trajectory,
        *,
        every: int | None = None,
        max_overhead: float | None = None,
        on_error: str = "warn",
    ) -> None:
        if not isinstance(trajectory, Trajectory):
            raise TypeError(f"`trajectory` is a {type(trajectory).__name__}; open one with Trajectory.open(path)")
        if optimizer is not None and not hasattr(optimizer, "param_groups"):
            raise TypeError(f"`optimizer` is a {type(optimizer).__name__}; pass a torch optimizer, or None")
        if max_overhead is not None and not 0 < max_overhead < 1:
            raise ValueError(
                f"`max_overhead` is {max_overhead}; give a share of wall time in (0, 1), such as 0.1, or None"
            )
        if on_error not in _ON_ERROR:
            raise ValueError(f"`on_error` is {on_error!r}; choose one of {', '.join(_ON_ERROR)}")
        self.objective = objective
        self.optimizer = optimizer
        self.measurements = checked_measurements(measurements)
        self.trajectory = trajectory
        self.max_overhead = max_overhead
        self.on_error = on_error
        default = _period(every, "every") or 1
        self._periods = {m.name: _period(m.every, f"every of {m.name!r}") or default for m in self.measurements}
        self._needs_update = any(map(_needs_update, self.measurements))
        self._step = 0
        self._states: dict[str, dict[str, Any]] = {m.name: {} for m in self.measurements}
        self._previous: Tensor | None = None  # [n], only when a measurement asks for the update
        self._cadence = Cadence(self._periods, max_overhead)
        self._skipped: dict[str, int] = {}
        self._measuring = 0.0
        self._earlier = 0.0  # wall time before this process took over
        self._started: float | None = None
        self._warned: set[tuple[str, str]] = set()
        self._resumed = False
        self._closed = False
        self._warn_about_other_parameters()

    @property
    def next_step(self) -> int:
        """The step that the next `step()` measures: how often it was called so far, over all resumed runs."""
        return self._step

    @property
    def cadence(self) -> dict[str, int]:
        """Steps from one measurement to the next, of each: its period, or more to stay below `max_overhead`."""
        return self._cadence.spacings

    @property
    def skipped(self) -> dict[str, int]:
        """How often each measurement was wanted by its period and not made, to stay below `max_overhead`."""
        return dict(self._skipped)

    @property
    def overhead(self) -> float:
        """Share of the wall time since the first `step()` that went into measurements; 0 before it."""
        elapsed = self._elapsed()
        return self._measuring / elapsed if elapsed > 0 else 0.0

    def step(self) -> list[Row]:
        """Measures what is due; call it once per iteration, before the optimizer's step.

        Returns:
            The rows recorded now; empty at most steps.
        """
        self._begin()
        wanted = [m for m in self.measurements if self._cadence.is_wanted(m.name, self._step)]
        try:
            return self._measure(wanted, capped=True)
        finally:
            self._previous = self._flat_parameters() if self._needs_update else None
            self._step += 1

    def close(self) -> list[Row]:
        """Measures the final weights with every measurement; a second call does nothing."""
        if self._closed:
            return []
        self._begin()
        self._closed = True
        return self._measure(self.measurements, capped=False)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        self._closed = True

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to repeat the same numbers; copies of tensors, numbers and strings.

        `torch.load(..., weights_only=True)` reads it.
        """
        return {
            "version": _STATE_VERSION,
            "step": self._step,
            "num_parameters": self.objective.num_parameters,
            "states": {name: _copied(state) for name, state in self._states.items()},
            "previous": None if self._previous is None else self._previous.clone(),
            "cadence": self._cadence.state_dict(),
            "skipped": dict(self._skipped),
            "measuring": self._measuring,
            "elapsed": self._elapsed(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`. A measurement that is new since then starts afresh."""
        if state.get("version") == 1:  # had the latest cost of each measurement, and no spacing
            once = dict.fromkeys(state["costs"], 1)
            state = {**state, "cadence": {"factors": {}, "costs": state["costs"], "counts": once}}
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"`state` lacks {sorted(missing)}; pass what Monitor.state_dict() returned")
        if state["version"] > _STATE_VERSION:
            raise ValueError(
                f"`state` has version {state['version']}, newer than {_STATE_VERSION}, the last one that this "
                "sharpscope knows; upgrade it"
            )
        if state["num_parameters"] != self.objective.num_parameters:
            raise ValueError(
                f"`state` belongs to {state['num_parameters']} parameters; the objective has "
                f"{self.objective.num_parameters}: use the model and selection of the run that saved it"
            )
        known = self._states.keys()
        self._step = int(state["step"])
        self._states = {name: _copied(state["states"].get(name, {})) for name in known}
        self._previous = None if state["previous"] is None else state["previous"].to(self.objective.device, copy=True)
        self._cadence.load_state_dict(state["cadence"])
        self._skipped = {name: count for name, count in state["skipped"].items() if name in known}
        self._measuring, self._earlier = float(state["measuring"]), float(state["elapsed"])
        self._started = None
        self._resumed = True

    def _begin(self) -> None:
        """Before the first measurement: starts the clock and sees that the trajectory holds nothing later."""
        if self._closed:
            raise RuntimeError("this monitor is closed; make a new one and load its state_dict() to go on")
        if self._started is not None:
            return
        if self._resumed:
            self.trajectory.discard_after(self._step)
        else:
            steps = self.trajectory.steps()
            if steps and steps[-1] > self._step:
                raise ValueError(
                    f"`trajectory` in {self.trajectory.path} already reaches step {steps[-1]} and this monitor starts "
                    f"at step {self._step}, which would mix two runs: give a new folder, resume with "
                    "monitor.load_state_dict(...), or drop the old run with trajectory.discard_after(-1)"
                )
        self._started = perf_counter()

    def _measure(self, wanted: Iterable[Measurement], *, capped: bool) -> list[Row]:
        """Measures those of `wanted` that are due and affordable; with `capped` false, all of them."""
        wanted = list(wanted)
        if not wanted:
            return []
        rows = self._settle() if capped else self._skip_counts()
        due = [m for m in wanted if not capped or self._cadence.is_due(m.name, self._step)]
        if due and self.objective.device.type == "cuda":  # what training has queued is not a measurement's time
            torch.cuda.synchronize(self.objective.device)
        point = None
        seconds: dict[str, float] = {}
        needs_update = any(map(_needs_update, due))
        for measurement in wanted:
            start = perf_counter()
            if measurement not in due or (capped and not self._is_affordable(measurement.name, start)):
                self._skipped[measurement.name] = self._skipped.get(measurement.name, 0) + 1
                continue
            with plain_evaluation(self.objective.model, "keep"):
                if point is None:
                    update = self._update() if needs_update else None
                    point = Point(self._step, self.objective, self.optimizer, update=update)
                found, succeeded = self._run(measurement, point, start)
                rows += found
            taken = perf_counter() - start
            self._measuring += taken
            if succeeded:
                seconds[measurement.name] = taken
        if not rows and not seconds:
            return []
        start = perf_counter()
        self.trajectory.record(self._step, rows)
        taken = perf_counter() - start
        self._measuring += taken
        for name, cost in seconds.items():
            self._cadence.add_cost(name, cost + taken / len(seconds))
        return rows

    def _run(self, measurement: Measurement, point: Point, start: float) -> tuple[list[Row], bool]:
        """One measurement's rows, and whether it succeeded; after a failure its state is as before."""
        name = measurement.name
        state = dict(self._states[name])
        try:
            rows = measured_rows(measurement, point.with_state(state))
        except Exception as error:
            if self.on_error == "raise" or not self._cadence.was_measured(name):
                error.add_note(f"while measuring {name!r} at step {self._step}")
                raise
            self._warn_of_failure(name, error)
            return [Row(name, math.nan, converged=False, seconds=perf_counter() - start)], False
        self._states[name] = state
        if rows and not any(row.seconds for row in rows):
            rows[0] = replace(rows[0], seconds=perf_counter() - start)
        return rows, True

    def _warn_of_failure(self, name: str, error: Exception) -> None:
        kind = (name, type(error).__name__)
        if kind not in self._warned:
            self._warned.add(kind)
            message = (
                f"measurement {name!r} failed at step {self._step} and is NaN there (said once): {kind[1]}: {error}"
            )
            warnings.warn(message, MeasurementFailedWarning, stacklevel=5)

    def _is_affordable(self, name: str, now: float) -> bool:
        return self._cadence.affordable(name, self._measuring, self._elapsed(now))

    def _settle(self) -> list[Row]:
        """Fits the cadence to the costs so far; a row for each spacing that changed."""
        training = (self._elapsed() - self._measuring) / max(self._step, 1)
        changed = self._cadence.settle(training)
        return [Row("cadence", spacing, error=0.0, block=name) for name, spacing in changed.items()]

    def _skip_counts(self) -> list[Row]:
        return [Row("skipped", count, error=0.0, block=name) for name, count in self._skipped.items()]

    def _elapsed(self, now: float | None = None) -> float:
        if self._started is None:
            return self._earlier
        return self._earlier + (perf_counter() if now is None else now) - self._started

    def _flat_parameters(self) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return self.objective.join([full_tensor(p) for p in self.objective.parameters.values()])

    def _update(self) -> Tensor | None:
        return None if self._previous is None else self._flat_parameters() - self._previous

    def _warn_about_other_parameters(self) -> None:
        if self.optimizer is None:
            return
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not any(id(p) in trained for p in self.objective.parameters.values()):
            warnings.warn(
                "`optimizer` trains none of the objective's parameters: their curvature will not follow the training "
                "unless something else moves them. Build the objective on the model in training",
                stacklevel=3,
            )

    def __repr__(self) -> str:
        names = ", ".join(m.name for m in self.measurements)
        return f"Monitor([{names}], next_step={self._step}, trajectory={self.trajectory!r})"


def _needs_update(measurement: Measurement) -> bool:
    return bool(getattr(measurement, "needs_update", False))


def _period(every: int | None, argument: str) -> int | None:
    if every is None:
        return None
    try:
        period = operator.index(every)
    except TypeError:
        raise TypeError(f"`{argument}` is {every!r}; give a whole number of steps") from None
    if period < 1:
        raise ValueError(f"`{argument}` is {period}; give a number of steps >= 1")
    return period


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in state.items()}
