"""Which parameters of a model are analysed."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        if type(model).__name__ == "OptimizedModule":
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def near_names(name: str, known: Iterable[str]) -> str:
    """The known names nearest to a misspelt one, for an error message."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:5]
    return ", ".join(repr(n) for n in near) if near else "none"


def selected_parameters(model: nn.Module, params: Any) -> dict[str, Tensor]:
    """Parameters by name, in `named_parameters` order, tied ones once.

    Args:
        params: None for all that require grad; names or globs; parameters themselves; or a function (name, parameter)
            -> bool. An explicit choice may name frozen parameters.

    Raises:
        ValueError: nothing selected, an unknown name, a tensor that is no parameter of the model, complex numbers.
    """
    named: dict[str, Tensor] = dict(model.named_parameters())
    if not named:
        raise ValueError(f"`model` ({type(model).__name__}) has zero parameters; there is nothing to differentiate")
    if params is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
        if not chosen:
            raise ValueError(
                f"`model` has {len(named)} parameters and all are frozen; set requires_grad, or name some in `params`"
            )
    elif callable(params) and not isinstance(params, Tensor):
        chosen = _by_predicate(named, params)
    else:
        chosen = _by_names(model, named, [params] if isinstance(params, str | Tensor) else list(params))
    if not chosen:
        raise ValueError("`params` selects no parameter; choose among " + ", ".join(map(repr, list(named)[:8])))
    for name, p in chosen.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter {name!r} of a lazy module has no shape yet; run the model once first")
        if not p.is_floating_point():
            raise ValueError(
                f"parameter {name!r} has dtype {p.dtype}; curvature needs real floating parameters: "
                "leave it out with `params`"
            )
    return chosen


def _by_predicate(named: dict[str, Tensor], predicate: Callable[..., object]) -> dict[str, Tensor]:
    return {name: p for name, p in named.items() if predicate(name, p)}


def _by_names(model: nn.Module, named: dict[str, Tensor], wanted: list[Any]) -> dict[str, Tensor]:
    # A tied parameter answers to each of its names.
    first_name = {id(p): name for name, p in named.items()}
    every_name = {name: first_name[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    names: set[str] = set()
    for item in wanted:
        if isinstance(item, Tensor):
            if id(item) not in first_name:
                raise ValueError(
                    f"`params` holds a tensor of shape {list(item.shape)} that is no parameter of `model`; "
                    "pass tensors from model.parameters(), or names"
                )
            names.add(first_name[id(item)])
        elif isinstance(item, str):
            matches = [first for name, first in every_name.items() if fnmatch.fnmatchcase(name, item)]
            if not matches:
                raise ValueError(
                    f"`params` names {item!r}, which matches no parameter; near it: {near_names(item, every_name)}"
                )
            names.update(matches)
        else:
            raise TypeError(f"`params` holds a {type(item).__name__}; give names, globs or parameters")
    return {name: p for name, p in named.items() if name in names}
