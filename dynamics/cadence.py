"""How often each measurement can be afforded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# The plan leaves this share of the allowance free: it pays for what the means do not foresee.
RESERVE = 0.05
# A spacing is shortened only when the next one would still fit if everything took this much longer.
SHORTEN = 1.25
# Weight of the latest cost in its running mean, once there are many.
MEMORY = 1 / 16
# Factors of the spacing: few, so that it settles, and at most 1.34 apart from 3 on, so that little is given away.
_MANTISSAS = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)


class Cadence:
    r"""Steps between measurements that keep their share of the wall time at a limit f.

    A measurement that is wanted every p steps and takes c seconds loads a step of training with c/p seconds. With τ
    seconds for a step of training itself, all of them may take f/(1 − f) τ per step. Loads are cut at the level κ at
    which Σ min(c/p, κ) is that, less a reserve: what is cheap keeps its period, what is expensive gets an equal share
    and is measured every k p steps, with the first k ≥ c/(p κ) out of 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, ...

    Costs are running means, without the first one where there are others: it compiles, traces and starts cold. Until
    the second is known the measurement keeps its period; what it must not cost beyond `affordable` is up to the caller.

    Args:
        periods: Steps between the measurements of each name, as asked for.
        max_overhead: f; None for no limit.
    """

    def __init__(self, periods: Mapping[str, int], max_overhead: float | None) -> None:
        self._periods = dict(periods)
        self._limit = max_overhead
        self._factors = dict.fromkeys(periods, 1)
        self._costs: dict[str, float] = {}  # mean seconds; a name is here once it was measured
        self._counts: dict[str, int] = {}

    @property
    def spacings(self) -> dict[str, int]:
        """Steps between measurements of each name."""
        return {name: period * self._factors[name] for name, period in self._periods.items()}

    def was_measured(self, name: str) -> bool:
        return name in self._costs

    def is_wanted(self, name: str, step: int) -> bool:
        """By the period that was asked for."""
        return step % self._periods[name] == 0

    def is_due(self, name: str, step: int) -> bool:
        """By the spacing in force."""
        return step % (self._periods[name] * self._factors[name]) == 0

    def add_cost(self, name: str, seconds: float) -> None:
        """Takes a measurement of `name` into its mean."""
        count = self._counts.get(name, 0)
        before = seconds if count < 2 else self._costs[name]
        self._costs[name] = before + (seconds - before) * max(1 / max(count, 1), MEMORY)
        self._counts[name] = count + 1

    def affordable(self, name: str, measuring: float, elapsed: float) -> bool:
        """Whether the share stays within the limit with one more, after `measuring` out of `elapsed` seconds."""
        if self._limit is None or name not in self._costs:
            return True
        cost = self._costs[name]
        return measuring + cost <= self._limit * (elapsed + cost)

    def settle(self, training: float) -> dict[str, int]:
        """Fits the spacings to the costs and to τ = `training` seconds per step.

        Returns:
            The new spacings of the names whose spacing changed.
        """
        if self._limit is None or training <= 0:
            return {}
        loads = {name: cost / self._periods[name] for name, cost in self._costs.items()}
        allowance = (1 - RESERVE) * self._limit / (1 - self._limit) * training
        level = _level(list(loads.values()), allowance)
        changed = {}
        for name, load in loads.items():
            if self._counts[name] < 2:
                continue
            before, needed = self._factors[name], _factor(load / level)
            if needed > before or _factor(SHORTEN * load / level) < before:
                self._factors[name] = needed if needed > before else _factor(SHORTEN * load / level)
                changed[name] = self._periods[name] * self._factors[name]
        return changed

    def state_dict(self) -> dict[str, Any]:
        return {"factors": dict(self._factors), "costs": dict(self._costs), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`; names that are not among the periods are left out."""
        known = self._periods.keys()
        self._factors = dict.fromkeys(known, 1) | {k: v for k, v in state["factors"].items() if k in known}
        self._costs = {k: v for k, v in state["costs"].items() if k in known}
        self._counts = {k: v for k, v in state["counts"].items() if k in known}


def _level(loads: list[float], allowance: float) -> float:
    """κ with Σ min(load, κ) = `allowance`; infinite where all loads fit."""
    left, rest = allowance, sorted(loads)
    while rest and rest[0] * len(rest) <= left:
        left -= rest.pop(0)
    return left / len(rest) if rest else math.inf


def _factor(ratio: float) -> int:
    """The first factor at or above `ratio`."""
    if ratio <= 1:
        return 1
    scale = 10 ** max(0, math.floor(math.log10(ratio)))
    while True:
        for mantissa in _MANTISSAS:
            factor = mantissa * scale
            if factor >= ratio and factor == int(factor):
                return int(factor)
        scale *= 10
