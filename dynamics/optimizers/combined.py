"""Several optimizers used as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .base import Closure, Group


class CombinedOptimizer(Optimizer):
    """Several optimizers on disjoint parameters, used as one.

    Its groups are those of its parts, the very same dictionaries, so that schedulers change them.
    """

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """What the parts keep, by parameter."""
        return {p: kept for optimizer in self.optimizers for p, kept in optimizer.state.items()}

    @state.setter
    def state(self, value: Any) -> None:  # type: ignore[override]
        """torch assigns an empty one; each part has its own."""

    def add_param_group(self, param_group: Group) -> None:
        """Refused once made: which part would take it is not known."""
        if len(self.param_groups) == sum(len(optimizer.param_groups) for optimizer in self.optimizers):
            raise ValueError("add the parameters to one of `optimizers` and combine them anew")
        self.param_groups.append(param_group)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """One step of each; `closure` is evaluated once, before them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        for i, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state_dict[str(i)])
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def __repr__(self) -> str:
        return f"CombinedOptimizer({' and '.join(type(part).__name__ for part in self.optimizers)})"
