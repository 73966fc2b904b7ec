"""How much memory a piece of work takes at its peak."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of tensors that were not there before.

    Attributes:
        peak: Most that was held at one time.
        kept: What is still held at the end, its result not counted.
    """

    peak: int
    kept: int


def peak_bytes(run: Callable[[], object], device: torch.device) -> PeakMemory:
    """Runs `run` once and measures the memory that its tensors take.

    On a GPU the allocator counts, whose peak statistics start anew with it. On a CPU, where it does not, the storages
    of the results of all operations are counted, so the temporaries inside a kernel are missed.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        return PeakMemory(peak, torch.cuda.memory_allocated(device) - before)
    counter = _StorageCounter()
    with counter:
        run()
    return PeakMemory(counter.peak, counter.held())


class _StorageCounter(TorchDispatchMode):
    """Counts the storages that operations make and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._total = 0  # an upper bound: the dead are counted out when it matters
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu" and _address(leaf) not in known:
                self._count(leaf.untyped_storage())
        return result

    def held(self) -> int:
        """Bytes alive now."""
        self._alive = {address: entry for address, entry in self._alive.items() if not entry[0].expired()}
        self._total = sum(size for _, size in self._alive.values())
        return self._total

    def _count(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        before = self._alive.pop(address, None)
        if before is not None:
            self._total -= before[1]
        self._alive[address] = StorageWeakRef(storage), storage.nbytes()
        self._total += storage.nbytes()
        if self._total > self.peak:
            self.peak = max(self.peak, self.held())


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
