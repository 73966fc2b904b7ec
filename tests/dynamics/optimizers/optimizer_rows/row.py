"""One optimizer of the table: how it is made, what judges it, how exactly."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class OptimizerRow:
    """
    Attributes:
        name: Of the test.
        by_options: The class, or a function, called as by_options(params, **descent) for the checks of torch's
            conventions.
        descent: Options with which it descends on a small real task.
        make: Called as make(params_or_groups) for parity; default by_options with `descent`.
        oracle: Likewise for the independent optimizer; None where only statistics can judge, see `note`.
        second_group: Options of the second parameter group in the parity run; both sides get them.
        tolerance: Largest absolute difference of any parameter after any step; 0.0 is bit for bit.
        dtype: Of the parameters in the parity run.
        package: What the oracle is imported from, skipped where it is missing.
        closure: Whether `step` needs a closure.
        steps: Of the parity run.
        note: Where else it is judged.
        coasts: Whether the parameters move on for a while at a learning rate of zero.
        draws: Whether the steps are random (so that two instances agree only from equal states).
    """

    name: str
    by_options: Callable[..., torch.optim.Optimizer]
    descent: Mapping[str, Any]
    make: Callable[[Any], torch.optim.Optimizer] | None = None
    oracle: Callable[[Any], torch.optim.Optimizer] | None = None
    second_group: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 0.0
    dtype: torch.dtype = torch.float64
    package: str | None = None
    closure: bool = False
    steps: int = 200
    note: str = ""
    draws: bool = False
    coasts: bool = False

    def __str__(self) -> str:
        return self.name
