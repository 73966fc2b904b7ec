"""How much memory a graph takes and how much there is."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor


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


def saved_bytes(build: Callable[[], object]) -> int:
    """Bytes of distinct storages that autograd saves while `build` runs."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = build()
    del kept
    return sum(seen.values())
