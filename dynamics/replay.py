"""Measurements at stored weights: the trajectory of a run that was not monitored."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..landscape.guard import plain_evaluation
from ..landscape.objective import Objective
from ..landscape.sharded import sharding_group
from .checkpoints import (
    STEP_KEYS,
    CheckpointError,
    Weights,
    checkpoint_files,
    read_checkpoint,
    step_in_name,
    weights_in,
)
from .point import Measurement, Point, checked_measurements, measured_rows
from .provenance import own_version
from .row import Row
from .trajectory import Trajectory

Item = Path | tuple[int, Mapping[str, Any]]

Checkpoints = (
    str
    | os.PathLike[str]
    | Mapping[int, Mapping[str, Any]]
    | Iterable[str | os.PathLike[str] | tuple[int, Mapping[str, Any]]]
)


@dataclass(frozen=True)
class ReplayResult:
    """What became of each checkpoint.

    Attributes:
        measured: Steps at which something was measured now.
        cached: Steps whose numbers were all there already.
        failed: (checkpoint, reason) of each that could not be used, or not be measured in part.
        products: Operator products spent now.
    """

    measured: list[int]
    cached: list[int]
    failed: list[tuple[str, str]]
    products: int


def replay(
    objective: Objective,
    checkpoints: Checkpoints,
    measurements: Iterable[Measurement],
    trajectory: Trajectory,
    *,
    key: str | None = None,
    step_of: Callable[[Path], int] | None = None,
    progress: bool = False,
) -> ReplayResult:
    """Runs every measurement at every checkpoint, in order, and records the rows.

    The weights are put into the objective's model for the time of a measurement; then weights and buffers are again
    what they were, to the last bit. Numbers are remembered by content (weights, settings of the measurement, data and
    loss): what was measured before is served from the trajectory, so an interrupted replay goes on where it stopped.
    A checkpoint that cannot be used is reported and skipped.

    Args:
        objective: The loss to analyse; its model gives names and shapes.
        checkpoints: A file, a folder, a glob, a list of files; or pairs (step, state dict), also as a mapping or from
            a generator. Files are read with torch.load(weights_only=True) or safetensors, in natural order.
        measurements: What to measure; their `every` does not matter here.
        trajectory: Where the rows go.
        key: Entry that holds the state dict ("ema", "state.model"); by default the one that fits the model.
        step_of: Gives the step of a file; by default the file says ("step", "global_step", "iteration"), or the
            number in its name.
        progress: Show a bar over checkpoints.

    Raises:
        ValueError: No checkpoint found; a closure instead of a model; state dicts that share their memory.
    """
    run = _Replay(objective, checked_measurements(measurements), trajectory, key, step_of)
    items = _items(checkpoints)
    total = len(items) if isinstance(items, list) else None
    run.alone = total == 1
    # None switches the bar off where there is no terminal to draw it on.
    for item in tqdm(items, total=total, desc="replay", unit="checkpoint", disable=None if progress else True):
        run.visit(item)
    return ReplayResult(run.measured, run.cached, run.failed, run.products)


class _Replay:
    """One call of `replay`: what the measurements remember, and what became of the checkpoints so far."""

    def __init__(
        self,
        objective: Objective,
        measurements: tuple[Measurement, ...],
        trajectory: Trajectory,
        key: str | None,
        step_of: Callable[[Path], int] | None,
    ) -> None:
        self.model = _whole_model(objective)
        self.objective, self.trajectory, self.key, self.step_of = objective, trajectory, key, step_of
        self.measurements = {m.name: m for m in measurements}
        self.settings = {m.name: _settings(m) for m in measurements}
        self.states: dict[str, dict[str, Any]] = {m.name: {} for m in measurements}
        self.context = f"{own_version()} {objective.fingerprint()}"
        self.alone = False  # the only checkpoint needs no step
        self.measured: list[int] = []
        self.cached: list[int] = []
        self.failed: list[tuple[str, str]] = []
        self.products = 0
        self._taken: dict[int, tuple[str, str]] = {}  # step -> checkpoint and fingerprint
        self._last: tuple[int, Tensor, str] | None = None

    def visit(self, item: Item) -> None:
        label = str(item) if isinstance(item, Path) else f"step {item[0]}"
        try:
            step, weights = self._loaded(item)
        except CheckpointError as error:
            self.failed.append((label, str(error)))
            return
        if not isinstance(item, Path):
            self._check_moved(step, weights)
        earlier, fingerprint = self._taken.setdefault(step, (label, weights.fingerprint))
        if fingerprint != weights.fingerprint:
            reason = f"its step {step} is that of {earlier} too, with other weights; tell them apart with `step_of`"
            self.failed.append((label, reason))
        elif earlier == label:
            self._measure(label, step, weights)

    def _loaded(self, item: Item) -> tuple[int, Weights]:
        if not isinstance(item, Path):
            return item[0], weights_in(item[1], self.model, self.key)
        content, step = read_checkpoint(item)
        weights = weights_in(content, self.model, self.key)
        if self.step_of is not None:
            try:
                step = operator.index(self.step_of(item))
            except Exception as error:
                raise CheckpointError(f"`step_of` failed for it: {type(error).__name__}: {error}") from error
        elif step is None:
            step = step_in_name(item)
        if step is None and self.alone:
            step = 0
        if step is None or step < 0:
            found = "there is no step" if step is None else f"the step is {step}"
            raise CheckpointError(f"{found} in its content (entries {', '.join(STEP_KEYS)}) or name; give `step_of`")
        return step, weights

    def _check_moved(self, step: int, weights: Weights) -> None:
        """State dicts that come one by one may be the live one each time, but then it must have moved."""
        tensor = next(iter(weights.tensors.values()))  # kept, so that its memory is not given to the next one
        if self._last is not None:
            before, last, fingerprint = self._last
            if last.data_ptr() == tensor.data_ptr() and fingerprint == weights.fingerprint and step != before:
                raise ValueError(_aliased(before, step))
        self._last = (step, tensor, weights.fingerprint)

    def _measure(self, label: str, step: int, weights: Weights) -> None:
        keys = {name: self._cache_key(name, weights) for name in self.measurements}
        rows = {name: None if key is None else self.trajectory.recall(key) for name, key in keys.items()}
        due = [name for name, known in rows.items() if known is None]
        failures = []
        if due:
            with _holding(self.model, weights.tensors):
                point = Point(step, self.objective)
                for name in due:
                    try:
                        rows[name] = self._run(name, point)
                    except Exception as error:
                        failures.append(f"measuring {name!r} failed: {type(error).__name__}: {error}")
                        rows[name] = [Row(name, math.nan, converged=False)]
                        continue
                    # Kept at once: a replay that is stopped within a checkpoint loses one measurement at most.
                    self.trajectory.record(step, rows[name] or (), complete=False, key=keys[name])
        everything = [row for found in rows.values() for row in found or ()]
        self.trajectory.record(step, everything, complete=not failures, replace=True)
        if failures:
            self.failed.append((label, "; ".join(failures)))
        if len(due) > len(failures):
            self.measured.append(step)
        elif not due:
            self.cached.append(step)

    def _run(self, name: str, point: Point) -> list[Row]:
        state = dict(self.states[name])  # after a failure the next checkpoint starts from what was known before
        start = perf_counter()
        with plain_evaluation(self.model, "keep"):
            rows = measured_rows(self.measurements[name], point.with_state(state))
        self.states[name] = state
        self.products += sum(row.products for row in rows)
        if rows and not any(row.seconds for row in rows):
            rows[0] = dataclasses.replace(rows[0], seconds=perf_counter() - start)
        return rows

    def _cache_key(self, name: str, weights: Weights) -> str | None:
        settings = self.settings[name]
        if settings is None:
            return None
        return hashlib.sha256(f"{weights.fingerprint} {self.context} {settings}".encode()).hexdigest()


def _whole_model(objective: Objective) -> nn.Module:
    if objective.model is None:
        raise ValueError(
            "`objective` has no model to load a checkpoint into; make it with Objective(model, loss, data)"
        )
    if sharding_group(objective.model) is not None:
        raise ValueError("`objective` has a sharded model; replay needs all weights in one process: do not shard it")
    return objective.model


def _settings(measurement: Measurement) -> str | None:
    """All that decides a measurement's result, as text; None when its repr does not tell."""
    shown: Any = measurement
    if dataclasses.is_dataclass(measurement):
        fields = [field.name for field in dataclasses.fields(measurement) if field.name != "every"]
        shown = [(name, getattr(measurement, name)) for name in fields]
    text = repr(shown)
    if " at 0x" in text or "..." in text:  # an object shown by its address, an array shown in part
        return None
    return f"{type(measurement).__module__}.{type(measurement).__qualname__} {text}"


@contextmanager
def _holding(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with the given weights and buffers; its own are put back in place."""
    own = [*model.parameters(), *model.buffers()]
    with torch.no_grad():
        saved = [tensor.detach().clone() for tensor in own]
    try:
        model.load_state_dict(dict(tensors), strict=False)  # names were checked; extra state stays the model's own
        yield
    finally:
        with torch.no_grad():
            for tensor, before in zip(own, saved, strict=True):
                tensor.copy_(before)


def _items(checkpoints: Checkpoints) -> list[Item] | Iterator[Item]:
    """Files and (step, state dict) pairs; a list where the number is known."""
    if isinstance(checkpoints, str | os.PathLike):
        return list(checkpoint_files(checkpoints))
    entries: Any = list(checkpoints.items()) if isinstance(checkpoints, Mapping) else checkpoints
    if not isinstance(entries, Iterable):
        raise TypeError(f"`checkpoints` is a {type(checkpoints).__name__}; {_EXPECTED}")
    if not isinstance(entries, Sequence):
        return (item for entry in entries for item in _item(entry))
    items = [item for entry in entries for item in _item(entry)]
    if not items:
        raise ValueError(f"`checkpoints` is empty; {_EXPECTED}")
    _check_apart(items)
    return items


_EXPECTED = "give a folder, a glob, a list of files, or pairs (step, state dict)"


def _item(given: Any) -> list[Item]:
    if isinstance(given, str | os.PathLike):
        path = Path(given).expanduser()
        return list(checkpoint_files(path)) if path.is_dir() else [path]
    if isinstance(given, tuple | list) and len(given) == 2 and isinstance(given[1], Mapping):
        try:
            step = operator.index(given[0])
        except TypeError:
            raise TypeError(f"`checkpoints` names the step {given[0]!r}; steps are whole numbers") from None
        if step < 0:
            raise ValueError(f"`checkpoints` names the step {step}; steps count from 0")
        return [(step, given[1])]
    raise TypeError(f"`checkpoints` holds a {type(given).__name__}; {_EXPECTED}")


def _check_apart(items: Iterable[Item]) -> None:
    """`model.state_dict()` refers to the live weights: kept without a copy, all entries are the last one."""
    owners: dict[tuple[torch.device, int], int] = {}
    for item in items:
        if isinstance(item, Path):
            continue
        memory = {(t.device, t.untyped_storage().data_ptr()) for t in _tensors(item[1]) if t.numel()}
        for place in memory:
            if place in owners:
                raise ValueError(_aliased(owners[place], item[0]))
        owners.update(dict.fromkeys(memory, item[0]))


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors(value)


def _aliased(first: int, second: int) -> str:
    return (
        f"`checkpoints` has state dicts of steps {first} and {second} that share their memory, so they hold the same "
        "weights: model.state_dict() refers to the live ones. Keep copy.deepcopy(model.state_dict()) at each step, "
        "or {name: tensor.clone() ...}"
    )
