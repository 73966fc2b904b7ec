"""Reading numbers off the recorded curves of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .attention_stages import first_below

Run = Mapping[str, Any]


def at(run: Run, name: str, step: float) -> float:
    """A quantity of a run at a step, interpolated between measured ones."""
    return float(np.interp(step, run["step"], run[name]))


def line_fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope of the least-squares line, and R²."""
    slope, offset = np.polyfit(x, y, 1)
    left = np.asarray(y) - (slope * np.asarray(x) + offset)
    return float(slope), float(1 - left.var() / np.var(y))


def between(run: Run, name: str, start: int, end: int) -> tuple[list[float], list[float]]:
    """Steps from `start` to `end`, and the quantity there."""
    pairs = [(t, v) for t, v in zip(run["step"], run[name], strict=True) if start <= t <= end]
    return [t for t, _ in pairs], [v for _, v in pairs]


def differences(
    run: Run, other: Run, name: str, steps: int, *, stretch: int = 1, clock: str = "step"
) -> list[tuple[float, float]]:
    """Difference of a curve at t and that of another run at `stretch` times t, over the range of the curve.

    Args:
        steps: Largest t.
        clock: "step", or "test_step" for what is measured then.

    Returns:
        That share and its t, wherever both were measured. Of a curve that is constant the share is 0 or infinite.
    """
    there = dict(zip(other[clock], other[name], strict=True))
    pairs = [
        (t, v, there[stretch * t])
        for t, v in zip(run[clock], run[name], strict=True)
        if t <= steps and stretch * t in there
    ]
    spread = float(np.ptp([v for _, v, _ in pairs]))
    return [(0.0 if v == w else abs(v - w) / spread if spread else math.inf, t) for t, v, w in pairs]


def curves_apart(run: Run, other: Run, name: str, steps: int) -> tuple[float, float]:
    """The largest of `differences`, and its t."""
    return max(differences(run, other, name, steps), key=lambda pair: pair[0])


def last_move(steps: Sequence[float], values: Sequence[float]) -> float:
    """The last of the measured steps at which a value differs from the one before."""
    moves = [step for step, a, b in zip(steps[1:], values, values[1:], strict=False) if a != b]
    return moves[-1] if moves else steps[0]


def crossings(runs: Sequence[Run]) -> tuple[list[float | None], list[float | None]]:
    """First steps with s_21 < .01, and with s_11 < .1."""
    return (
        [first_below(run["step"], run["s21"], 0.01) for run in runs],
        [first_below(run["step"], run["s11"], 0.1) for run in runs],
    )


def each(runs: Sequence[Run], value: Callable[[Run], float]) -> list[float]:
    """A number of each run."""
    return [value(run) for run in runs]
