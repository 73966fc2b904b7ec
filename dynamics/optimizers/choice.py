"""Optimizers by name: torch's own and those of this package."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...landscape.selection import near_names
from .combined import CombinedOptimizer

# What an optimizer is given by `make_optimizer` itself.
GIVEN = ("self", "params", "params_or_base", "model", "objective")
# Stochastic gradient descent with something added: they take its learning rate.
LIKE_SGD = ("LangevinSGD", "HeavyTailedSGD", "AcceleratedSGD")
DEFAULT_BASE = "SGD"
# Their steps keep their length, or search for it.
WITHOUT_THRESHOLD = ("SignSGD", "Lion", "SignMomentum2", "SignRound", "Muon", "Rprop", "LBFGS")


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


def option_names(name: str, options: Mapping[str, Any] | None = None) -> list[str]:
    """The options that `make_optimizer` takes for a name; those of a wrapper include those of its base."""
    return _option_names(optimizer_class(name), options or {})


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that the optimizer does not take."""
    known = option_names(name, options)
    for option in options:
        if option not in known:
            raise ValueError(
                f"`optimizer_options` has {option!r}, which {optimizer_class(name).__name__} does not take "
                f"(near: {near_names(option, known)}); it takes {', '.join(known)}"
            )


def descends_like(name: str, options: Mapping[str, Any]) -> str:
    """The optimizer whose learning rate suits this one: a wrapper's base, SGD for its variants, else itself."""
    chosen = optimizer_class(name)
    if _wraps(chosen):
        return optimizer_class(str(options.get("base", DEFAULT_BASE))).__name__
    return "SGD" if chosen.__name__ in LIKE_SGD else chosen.__name__


def has_threshold(name: str) -> bool:
    """Whether there is a curvature at which the optimizer's steps become unstable."""
    return optimizer_class(name).__name__ not in WITHOUT_THRESHOLD


def make_optimizer(name: str, model: nn.Module, options: Mapping[str, Any]) -> Optimizer:
    """The optimizer on all parameters of the model.

    One that reads the structure of the model gets the model. Muon, which takes matrices only, is combined with AdamW in
    its default settings on everything else, as in its paper.

    Args:
        name: As in torch.optim or in this package, e.g. "SGD".
        options: Its keyword arguments, such as lr. An optimizer round another one, such as SAM, also takes `base`, the
            other's name (default "SGD"), and the other's options.
    """
    chosen = optimizer_class(name)
    check_options(name, options)
    options = with_defaults(name, options)
    try:
        if _wraps(chosen):
            return _wrapped(chosen, model, options)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if chosen is torch.optim.Muon:
            return _muon(parameters, options)
        reads_model = "model" in inspect.signature(chosen.__init__).parameters
        return chosen(parameters, **options, **({"model": model} if reads_model else {}))  # type: ignore[call-arg]
    except (TypeError, ValueError, IndexError, AssertionError) as error:
        raise ValueError(f"{chosen.__name__} refuses `optimizer_options` {dict(options)}: {error}") from error


def with_defaults(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, and values for those that the class leaves to its user: little noise; a long step γ of five short
    ones with β = δ / (15 γ), the published rule at five large eigenvalues."""
    chosen = optimizer_class(name).__name__
    if chosen == "LangevinSGD":
        return {"temperature": 1e-6, **options}
    if chosen == "HeavyTailedSGD":
        return {"alpha": 1.8, "sigma": 1e-4, **options}
    if chosen == "AcceleratedSGD":
        lr = float(options.get("lr", 0.01))
        gamma = float(options.get("gamma", 5 * lr))
        return {"lr": lr, "gamma": gamma, "beta": lr / (15 * gamma) if gamma else 0.0, **options}
    return dict(options)


def _wrapped(chosen: Callable[..., Optimizer], model: nn.Module, options: Mapping[str, Any]) -> Optimizer:
    own = inspect.signature(chosen).parameters
    base = make_optimizer(
        str(options.get("base", DEFAULT_BASE)), model, {key: v for key, v in options.items() if key not in own}
    )
    if not isinstance(base, Optimizer):
        raise ValueError(
            "`base` is 'Muon', which is combined with AdamW here and cannot be wrapped; choose another one"
        )
    given = {key: value for key, value in options.items() if key in own and key != "base"}
    return chosen(base, **given, **({"model": model} if "model" in own else {}))


def _muon(parameters: Sequence[Tensor], options: Mapping[str, Any]) -> Optimizer:
    muon = torch.optim.Muon([p for p in parameters if p.ndim == 2], **options)
    others = [p for p in parameters if p.ndim != 2]
    return CombinedOptimizer([muon, torch.optim.AdamW(others)]) if others else muon


def _wraps(chosen: type[Optimizer]) -> bool:
    return "base" in inspect.signature(chosen.__init__).parameters


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


def _option_names(chosen: type[Optimizer], options: Mapping[str, Any]) -> list[str]:
    names = [name for name in inspect.signature(chosen.__init__).parameters if name not in GIVEN]
    if _wraps(chosen):
        base = optimizer_class(str(options.get("base", DEFAULT_BASE)))
        names += [name for name in _option_names(base, {}) if name not in names]
    return names
