"""A user's own model, data and loss, named on the command line or handed over in Python."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..landscape.objective import Objective
from ..landscape.selection import near_names


def subject(
    model: nn.Module | Callable[[], nn.Module] | str,
    data: Any,
    *,
    criterion: Callable[..., Any] | str | None = None,
    loss: Callable[..., Any] | str | None = None,
    **options: Any,
) -> Objective:
    """The objective made of a model, its data, and either a criterion or a loss.

    Args:
        model: A module, a function that makes one, or the name of either as `find` reads it.
        data: As for `Objective`, a function that makes it, or the name of either.
        criterion: `criterion(prediction, target)`: a function or module, a class in torch.nn such as
            "CrossEntropyLoss", or a name as `find` reads it.
        loss: `loss(model, batch)`, in place of `criterion`.
        options: Of `Objective`.
    """
    if (criterion is None) == (loss is None):
        raise ValueError(
            "give either `criterion` (--criterion), a function of prediction and target such as CrossEntropyLoss, or "
            f"`loss` (--loss), a function of model and batch; given: {'both' if loss is not None else 'neither'}"
        )
    made = made_by(model, "model")
    if not isinstance(made, nn.Module):
        raise TypeError(f"`model` {model!r} gives a {type(made).__name__}; it must be an nn.Module or make one")
    batches = made_by(data, "data")
    if loss is not None:
        return Objective(made, find(loss) if isinstance(loss, str) else loss, batches, **options)
    return Objective.supervised(made, _criterion(criterion), batches, **options)


def made_by(source: Any, argument: str) -> Any:
    """`source`, found by its name if it is one, and called if it is a function or class."""
    found = find(source) if isinstance(source, str) else source
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        return found()
    except TypeError as error:
        raise ValueError(f"`{argument}` {source!r} cannot be called without arguments: {error}") from error


def find(name: str) -> Any:
    """The object called "package.module:name", or "path/to/file.py:name".

    The current folder is searched last, so that its files cannot take the place of installed packages.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ValueError(f"{name!r} does not name an object; write package.module:name or path/to/file.py:name")
    module = _module_from_file(Path(place)) if place.endswith(".py") else _module(place)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [key for key in vars(found) if not key.startswith("_")]
            raise ValueError(f"{place} has no {attribute!r}; near it: {near_names(part, known)}")
        found = getattr(found, part)
    return found


def _module(place: str) -> Any:
    with contextlib.suppress(ValueError):
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not (place == error.name or place.startswith(f"{error.name}.")):
            raise  # the module is there; what it imports is not
        raise ValueError(
            f"there is no module {place!r} here or among the installed packages; start in the folder that contains it, "
            "or give the path of a .py file"
        ) from error


def _module_from_file(path: Path) -> Any:
    path = path.expanduser().absolute()
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # for what lies beside it
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _criterion(criterion: Any) -> Callable[..., Any]:
    if not isinstance(criterion, str):
        return criterion
    if ":" in criterion:
        found = find(criterion)
        return found() if isinstance(found, type) else found
    losses = [key for key in vars(nn) if key.endswith("Loss")]
    if criterion not in losses:
        raise ValueError(
            f"`criterion` is {criterion!r}, which torch.nn does not have (near: {near_names(criterion, losses)}); "
            "for a function of your own write package.module:name"
        )
    return getattr(nn, criterion)()
