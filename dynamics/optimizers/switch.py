"""Optimizers that take over from one another at given steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...hessian.preconditioned import Root
from .adapters import adapted
from .base import Closure, Group, tensor_bytes
from .closures import needs_closure
from .wrapper import Wrapper


class SwitchSchedule:
    """The optimizer of step t is the last of the list whose start is at most t; steps are counted from 0.

    All hold the same parameters. One that wraps another of the list works on its state. To run SAM late::

        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = SwitchSchedule([(0, sgd), (5000, SAM(sgd, rho=0.05))], carry_momentum=True)

    Learning rates are each optimizer's own, so each wants its scheduler.

    Args:
        schedule: Pairs (first step, optimizer); the first starts at 0, starts increase.
        carry_momentum: At a switch the next optimizer goes on with the moments of the one before, which must be of the
            same class (inside wrappers); False lets it begin with none, as two optimizers of the same parameters do in
            the code of Zhou et al., Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training,
            2025.

    Raises:
        ValueError, TypeError: on construction, for starts, parameters or classes that do not fit.
    """

    def __init__(self, schedule: Iterable[tuple[int, Optimizer]], *, carry_momentum: bool) -> None:
        pairs = list(schedule)
        if not pairs or not all(isinstance(optimizer, Optimizer) for _, optimizer in pairs):
            raise TypeError("`schedule` must be pairs (first step, optimizer), such as [(0, sgd), (5000, sam)]")
        self.starts = [start for start, _ in pairs]
        self.optimizers = [optimizer for _, optimizer in pairs]
        whole = all(isinstance(start, int) and not isinstance(start, bool) for start in self.starts)
        if not whole or self.starts[0] != 0 or sorted(set(self.starts)) != self.starts:
            raise ValueError(
                f"`schedule` starts at the steps {self.starts}; they must be integers, 0 and then increasing"
            )
        if any(_parameters(optimizer) != _parameters(self.optimizers[0]) for optimizer in self.optimizers):
            raise ValueError("`schedule` has optimizers of different parameters; give all of them the same ones")
        kinds = {type(_innermost(optimizer)).__name__ for optimizer in self.optimizers}
        if carry_momentum and len(kinds) > 1:
            raise ValueError(
                f"`carry_momentum` is True, but {' and '.join(sorted(kinds))} have different moments; pass False"
            )
        self.carry_momentum = carry_momentum
        self.steps_taken = 0

    @property
    def active(self) -> Optimizer:
        """The optimizer of the next step."""
        return self.optimizers[self._position(self.steps_taken)]

    @property
    def param_groups(self) -> list[Group]:
        """Those of the active optimizer."""
        return self.active.param_groups

    @property
    def needs_closure(self) -> bool:
        """Whether the active optimizer must be handed a closure."""
        return needs_closure(self.active)

    def step(self, closure: Closure | None = None) -> Any:
        """One step of the active optimizer; returns what that returns."""
        position = self._position(self.steps_taken)
        if self.steps_taken and position != self._position(self.steps_taken - 1):
            self._switch(self.optimizers[position - 1], self.optimizers[position])
        active = self.optimizers[position]
        loss = active.step() if closure is None else active.step(closure)
        self.steps_taken += 1
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.active.zero_grad(set_to_none)

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor | Root | None:
        return adapted(self.active).preconditioner(p, gradient)

    def threshold_of_group(self, group: Group) -> float | None:
        return adapted(self.active).threshold_of_group(group)

    def coupled_weight_decay(self, group: Group) -> float:
        return adapted(self.active).coupled_weight_decay(group)

    def stability_threshold(self) -> float | None:
        """`stability_threshold_of` the active optimizer."""
        from .thresholds import stability_threshold_of

        return stability_threshold_of(self.active)

    def state_dict(self) -> dict[str, Any]:
        parts = {str(i): optimizer.state_dict() for i, optimizer in enumerate(self.optimizers)}
        return {**parts, "steps_taken": self.steps_taken}

    @property
    def state(self) -> Mapping[Tensor, Any]:
        """What the active optimizer keeps, by parameter."""
        return _innermost(self.active).state

    def state_bytes(self) -> int:
        """Of all optimizers; what several share counts once."""
        return tensor_bytes([[list(part.state.values()) for part in _chain(one)] for one in self.optimizers])

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for i, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state_dict[str(i)])
        self.steps_taken = int(state_dict["steps_taken"])

    def _position(self, step: int) -> int:
        return sum(start <= step for start in self.starts) - 1

    def _switch(self, before: Optimizer, after: Optimizer) -> None:
        source, target = _innermost(before), _innermost(after)
        if not self.carry_momentum:
            target.state.clear()
        elif source is not target:
            target.state.clear()
            for p, state in source.state.items():
                target.state[p] = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def _innermost(optimizer: Optimizer) -> Optimizer:
    return _chain(optimizer)[-1]


def _chain(optimizer: Optimizer) -> list[Optimizer]:
    """A wrapper, what it wraps, and so on."""
    found = [optimizer]
    while isinstance(optimizer, Wrapper):
        optimizer = optimizer.base
        found.append(optimizer)
    return found


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
