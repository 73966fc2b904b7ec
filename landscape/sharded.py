"""Models whose parameters are sharded over ranks (FSDP2): gathered for an evaluation, hooks stepped over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return type(tensor).__name__ == "DTensor" or type(getattr(tensor, "data", None)).__name__ == "DTensor"


def sharding_group(model: nn.Module | None) -> dist.ProcessGroup | None:
    """The group over which a model's parameters are sharded, or None."""
    for parameter in () if model is None else model.parameters():
        if is_sharded(parameter):
            return parameter.device_mesh.get_group()  # type: ignore[attr-defined]
    return None


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Steps over FSDP2's hooks while full parameters stand in the place of the shards.

    The evaluation then needs the memory of the whole model on every rank.
    """
    if sharding_group(model) is None:
        yield
        return
    found: list[tuple[Any, dict]] = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            found.append((hooks, dict(hooks)))
            for key, hook in list(hooks.items()):
                if _is_fsdp(hook):
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, before in found:
            hooks.clear()
            hooks.update(before)


def _is_fsdp(hook: Any) -> bool:
    owner = getattr(hook, "__self__", None) or getattr(getattr(hook, "func", None), "__self__", None)
    return "fsdp" in type(owner).__module__.lower() or "fsdp" in getattr(hook, "__module__", "").lower()
