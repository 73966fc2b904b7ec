"""How much memory a graph takes and how much there is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .state import sparse_parts


class InsufficientMemory(MemoryError):
    """A job needs more memory than there is; the message says what would fit."""


def refuse_unless_fits(needed: int, device: torch.device, *, what: str, cure: str) -> None:
    """Stops before an allocation that cannot succeed.

    Raises:
        InsufficientMemory: `needed` bytes are more than the device has free.
    """
    available = available_bytes(device)
    if needed > available:
        raise InsufficientMemory(
            f"{what} needs {needed / 2**30:.3g} GiB and {available / 2**30:.3g} GiB are free on {device}; {cure}"
        )


def available_bytes(device: torch.device) -> int:
    """Free memory of the device, in bytes (on a CPU: what the system can still hand out)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of every distinct memory behind tensors, sparse ones included."""
    found: dict[int, int] = {}
    for tensor in tensors:
        for part in (tensor,) if tensor.layout == torch.strided else sparse_parts(tensor.detach()):
            storage = part.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def saved_bytes(build: Callable[[], object]) -> int:
    """Bytes of distinct storages that autograd saves while `build` runs."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen.update(storages((tensor,)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = build()
    del kept
    return sum(seen.values())
