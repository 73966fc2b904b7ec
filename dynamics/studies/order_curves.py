"""Reading numbers off the recorded curves of a run."""

from __future__ import annotations

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


def curves_apart(run: Run, other: Run, name: str, steps: int, *, stretch: int = 1) -> tuple[float, int]:
    """Largest difference of a curve at t and that of another run at `stretch` times t, over the range of the curve.

    Returns:
        That share, and its t among 0 to `steps`.
    """
    here = np.array([at(run, name, t) for t in range(steps + 1)])
    there = np.array([at(other, name, stretch * t) for t in range(steps + 1)])
    apart = np.abs(here - there) / np.ptp(here)
    return float(apart.max()), int(apart.argmax())


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
