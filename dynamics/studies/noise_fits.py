"""Power laws and thresholds of runs of which some may never have got there; NaN is what did not happen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..power_law import PowerLaw, power_law_fit
from .result import Line

Table = NDArray[np.float64]
UNKNOWN = PowerLaw(math.nan, math.nan, math.nan, math.nan, math.nan, 0)
NEVER = "never reached"


def law(x: ArrayLike, y: ArrayLike) -> PowerLaw:
    """`power_law_fit`, or NaN in all of its numbers where a y is not finite."""
    return power_law_fit(x, y) if np.isfinite(y).all() else UNKNOWN


def place(find: Callable[..., float | None], x: ArrayLike, y: ArrayLike, *settings: float) -> float:
    """What `crossing` or `crossover` finds; NaN where they find nothing or a y is not finite."""
    found = find(x, y, *settings) if np.isfinite(y).all() else None
    return math.nan if found is None else found


def told(found: PowerLaw | float, form: str = ".3g") -> str:
    """A law's exponent with its error, or a number."""
    if isinstance(found, PowerLaw):
        return str(found) if math.isfinite(found.exponent) else NEVER
    return format(found, form) if math.isfinite(found) else NEVER


def listed(values: Sequence[float] | Table) -> str:
    """To three digits, integers in full; "never" for NaN."""
    return ", ".join(
        "never" if math.isnan(v) else f"{v:g}" if v.is_integer() else f"{v:.3g}" for v in map(float, values)
    )


def means(values: Table) -> list[float]:
    """Geometric, over the last axis."""
    return np.exp(np.log(values).mean(-1)).tolist()


def line(label: str, x: Sequence[float], y: ArrayLike, error: ArrayLike | None = None, **style: Any) -> Line:
    """The points that are finite."""
    heights = np.asarray(y, dtype=np.float64)
    kept = np.isfinite(heights)
    bars = None if error is None else np.asarray(error)[kept].tolist()
    return Line(label, np.asarray(x)[kept].tolist(), heights[kept].tolist(), bars, **style)
