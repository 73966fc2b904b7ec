"""The functions that a user hands over: how they are called and what identifies them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import CellType, CodeType
from typing import Any

import torch
from torch import Tensor, nn

from .batches import digest


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
    """What decides a user function's result, as bytes: its code, defaults and captured values, or a module's settings.

    Used in fingerprints: another loss has to be another objective.
    """
    return "\n".join(_parts(function, set())).encode()


def _parts(value: Any, seen: set[int]) -> Iterator[str]:
    if isinstance(value, str | bytes | int | float | bool | complex | torch.dtype | torch.device) or value is None:
        yield repr(value)
        return
    if id(value) in seen:
        yield "again"
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield digest(value).hexdigest()
    elif isinstance(value, CodeType):
        yield f"{value.co_name} {value.co_names} {value.co_code.hex()}"
        for constant in value.co_consts:
            yield from _parts(constant, seen)
    elif isinstance(value, functools.partial):
        for part in (value.func, value.args, value.keywords):
            yield from _parts(part, seen)
    elif isinstance(value, nn.Module):
        # Parameters are weights, which a fingerprint leaves out.
        yield f"{type(value).__module__}.{type(value).__qualname__} {value!r}"
        settings = {k: v for k, v in vars(value).items() if not k.startswith("_") and k != "training"}
        for part in (settings, dict(value.named_buffers()) if not list(value.parameters()) else None):
            yield from _parts(part, seen)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key)
            yield from _parts(item, seen)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _parts(item, seen)
    elif inspect.ismethod(value):
        yield from _parts(value.__func__, seen)
        yield from _parts(value.__self__, seen)
    elif inspect.isfunction(value):
        yield f"{value.__module__}.{value.__qualname__}"
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        for part in (value.__code__, value.__defaults__, value.__kwdefaults__, cells):
            yield from _parts(part, seen)
    else:
        yield f"{type(value).__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
        yield from _parts(getattr(value, "__dict__", None) if callable(value) else None, seen)


def captured_modules(*functions: Any) -> list[nn.Module]:
    """Modules that a function is or reaches: their buffers and attributes have to be left alone as well.

    It reaches what it captures, global modules that it names, its defaults, bound arguments and the attributes of
    the object it belongs to.
    """
    found: list[nn.Module] = []
    seen: set[int] = set()
    waiting: list[Any] = list(functions)
    while waiting:
        value = waiting.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.append(value)
        elif isinstance(value, functools.partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif inspect.ismethod(value):
            waiting += [value.__func__, *getattr(value.__self__, "__dict__", {}).values(), value.__self__]
        elif inspect.isfunction(value):
            waiting += [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
            named = (value.__globals__.get(name) for name in value.__code__.co_names)
            waiting += [item for item in named if isinstance(item, nn.Module)]
            waiting += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        elif type(value) in (list, tuple):
            waiting += value
        elif type(value) is dict:
            waiting += value.values()
        elif callable(value) and not isinstance(value, type):
            waiting += getattr(value, "__dict__", {}).values()
    return found


def _filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
