"""The functions that a user hands over: how they are called and what identifies them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


def pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    length = f" of length {len(batch)}" if isinstance(batch, tuple | list | Mapping) else ""
    raise TypeError(
        f"a batch is a {type(batch).__name__}{length}, not a pair (inputs, targets); "
        "give split=lambda batch: (inputs, targets)"
    )


def call(model: nn.Module, inputs: Any) -> Any:
    return model(inputs)


def accepts(closure: Callable[..., Any], num: int) -> bool:
    try:
        signature = inspect.signature(closure)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*range(num))
    except TypeError:
        try:
            signature.bind()
        except TypeError:
            raise ValueError(
                f"`closure` takes neither {num} arguments (one per tensor) nor none; write closure(*tensors)"
            ) from None
        return False
    return True


def code_of(function: Any) -> bytes:
    """Name and byte code of a function, or class and settings of a module: a loss changed means another objective."""
    if function is None:
        return b"none"
    code = getattr(function, "__code__", None)
    if code is not None:
        constants = repr([c for c in code.co_consts if not inspect.iscode(c)])
        return f"{function.__module__}.{function.__qualname__}{constants}".encode() + code.co_code
    return repr(function).encode() if isinstance(function, nn.Module) else type(function).__qualname__.encode()
