"""Times of work on a device, the buffers it is measured on, and the speed of a copy to hold it against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

# What takes longer than this is repeated less often.
SLOW_SECONDS = 0.3
SLOW_REPETITIONS = 5
# Of programs of others: one that takes longer is called once more only.
PATIENCE = 1.0
GLANCES = 5
# Of the counter that `torch.cuda._sleep` waits for: about one second.
CYCLES = 1.8e9
MOST_SETS = 16


class Clock:
    """Medians over repetitions that go round the buffer sets in turn.

    On CUDA every repetition lies between two events, behind a kernel that sleeps until the host has queued them all, so
    that `device_us` holds no waiting for the host; `wall_us` is the time of the same calls as a program sees it, from
    the first call until the device is idle, divided by their number. On a CPU both are wall-clock times.
    """

    def __init__(self, device: torch.device, repetitions: int) -> None:
        self.device, self.repetitions = device, repetitions
        on_cuda = device.type == "cuda"
        self.l2_bytes = (
            getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 1 << 26) if on_cuda else 1 << 16
        )
        self._copies: dict[int, float] = {}

    def sets_for(self, size: float) -> int:
        """How many buffer sets of `size` bytes to rotate: at least 4, and together twice the cache."""
        return min(max(4, -(-2 * self.l2_bytes // max(int(size), 1))), MOST_SETS)

    def measure(self, calls: Sequence[Callable[[], object]]) -> dict[str, Any]:
        """Microseconds of one call, after a warm-up of every set."""
        for call in calls:
            call()
        self.wait()
        began = time.perf_counter()
        calls[0]()
        self.wait()
        once = time.perf_counter() - began
        repetitions = self.repetitions if once < SLOW_SECONDS else min(SLOW_REPETITIONS, self.repetitions)
        turns = [calls[i % len(calls)] for i in range(repetitions)]
        began = time.perf_counter()
        for call in turns:
            call()
        self.wait()
        wall = (time.perf_counter() - began) / repetitions
        device = self._between_events(turns, wall) if self.device.type == "cuda" else _wall_times(turns)
        return {
            "device_us": 1e6 * statistics.median(device),
            "device_best_us": 1e6 * min(device),
            "device_worst_us": 1e6 * max(device),
            "wall_us": 1e6 * wall,
            "repetitions": repetitions,
            "sets": len(calls),
        }

    def glance(self, call: Callable[[], object]) -> dict[str, Any]:
        """Microseconds of a program of others, by few calls on one buffer set.

        The device is idle before and after each, so that `device_us` is wall-clock time too. The first call is a
        warm-up, and one of the two that count if it is slow.
        """
        times = _wall_times([lambda: (call(), self.wait())])
        if times[0] > PATIENCE:
            times += _wall_times([lambda: (call(), self.wait())])
        else:
            times = _wall_times([lambda: (call(), self.wait())] * min(GLANCES, self.repetitions))
        middle = 1e6 * statistics.median(times)
        return {
            "device_us": middle,
            "device_best_us": 1e6 * min(times),
            "device_worst_us": 1e6 * max(times),
            "wall_us": middle,
            "repetitions": len(times),
            "sets": 1,
        }

    def copy_us(self, size: float) -> float:
        """Median time of a copy on the device that reads and writes `size` bytes together."""
        half = max(int(size) // 2, 1)
        if half not in self._copies:
            sets = self.sets_for(2 * half)
            pairs = [[torch.empty(half, dtype=torch.uint8, device=self.device) for _ in "ab"] for _ in range(sets)]
            for source, _ in pairs:
                source.random_(0, 256)
            turns = [lambda a=a, b=b: b.copy_(a) for a, b in pairs]
            self._copies[half] = self.measure(turns)["device_us"]
        return self._copies[half]

    def poison(self, size: int) -> None:
        """Fill memory with ones that the allocator will hand out next."""
        blocks = [torch.full((size,), 255, dtype=torch.uint8, device=self.device) for _ in range(4)]
        del blocks

    def wait(self) -> None:
        """Until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _between_events(self, turns: Sequence[Callable[[], object]], wall: float) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in turns]
        torch.cuda._sleep(int(CYCLES * min(1.5 * wall * len(turns) + 1e-3, 1.0)))
        for call, (first, last) in zip(turns, pairs, strict=True):
            first.record()
            call()
            last.record()
        self.wait()
        return [first.elapsed_time(last) / 1e3 for first, last in pairs]


def _wall_times(turns: Sequence[Callable[[], object]]) -> list[float]:
    times = []
    for call in turns:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times
