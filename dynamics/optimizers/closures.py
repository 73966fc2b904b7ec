"""Which optimizers evaluate the loss themselves."""

from __future__ import annotations

import inspect

from torch.optim import Optimizer


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether `step` evaluates the loss itself, as a line search does, and must be handed a closure.

    An optimizer says so by an attribute `needs_closure`, or by a `closure` without a default.
    """
    said = getattr(optimizer, "needs_closure", None)
    if said is not None:
        return bool(said)
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
