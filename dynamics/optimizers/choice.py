"""Optimizers by name: torch's own and those of this package."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...landscape.selection import near_names


def optimizer_names() -> list[str]:
    """Every name that `make_optimizer` takes."""
    return sorted(_known(), key=str.lower)


def optimizer_class(name: str) -> type[Optimizer]:
    """The optimizer called `name`, whatever its capitals.

    Raises:
        ValueError: there is none, or it does not take dense gradients.
    """
    known = _known()
    lower = {key.lower(): key for key in known}
    if name.lower() == "sparseadam":
        raise ValueError(
            "`optimizer` is 'SparseAdam', which takes sparse gradients only; these models have none: use 'Adam'"
        )
    if name.lower() not in lower:
        near = near_names(name.lower(), lower)
        raise ValueError(f"`optimizer` is {name!r}; near it: {near}; all: {', '.join(optimizer_names())}")
    return known[lower[name.lower()]]


def make_optimizer(name: str, model: nn.Module, options: Mapping[str, Any]) -> Optimizer | CombinedOptimizer:
    """The optimizer on all parameters of the model.

    Muon, which takes matrices only, is combined with AdamW in its default settings on everything else, as in its
    paper.

    Args:
        name: As in torch.optim, e.g. "SGD".
        options: Its keyword arguments, such as lr.
    """
    chosen = optimizer_class(name)
    known = _option_names(chosen)
    for option in options:
        if option not in known:
            raise ValueError(
                f"`optimizer_options` has {option!r}, which {chosen.__name__} does not take "
                f"(near: {near_names(option, known)}); it takes {', '.join(known)}"
            )
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        if chosen is torch.optim.Muon:
            matrices = [p for p in parameters if p.ndim == 2]
            others = [p for p in parameters if p.ndim != 2]
            muon = chosen(matrices, **options)
            return CombinedOptimizer([muon, torch.optim.AdamW(others)]) if others else muon
        return chosen(parameters, **options)  # type: ignore[call-arg]
    except (TypeError, ValueError, IndexError, AssertionError) as error:
        raise ValueError(f"{chosen.__name__} refuses `optimizer_options` {dict(options)}: {error}") from error


def needs_closure(optimizer: Optimizer | CombinedOptimizer) -> bool:
    """Whether `step` evaluates the loss itself, as a line search does, and must be handed a closure."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


class CombinedOptimizer:
    """Several optimizers on disjoint parameters, used as one."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
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

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for i, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[str(i)])


def _known() -> dict[str, type[Optimizer]]:
    from .. import optimizers as ours

    found = {}
    for package in (torch.optim, ours):
        for name in dir(package):
            value = getattr(package, name)
            if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer:
                found[name] = value
    found.pop("SparseAdam", None)
    return found


def _option_names(chosen: type[Optimizer]) -> list[str]:
    return [name for name in inspect.signature(chosen.__init__).parameters if name not in ("self", "params")]
