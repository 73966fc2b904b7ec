"""The drop of the sharpness with the learning rate in the intermediate saturation regime."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class SteepestDrop(NamedTuple):
    """
    Attributes:
        c: Where the curve falls fastest; NaN where it falls nowhere.
        low, high: The central 95 % of bootstrap samples of the seeds; equal to c for one seed.
        slope: Its derivative with respect to c there.
    """

    c: float
    low: float
    high: float
    slope: float


def steepest_drop(
    c: Sequence[float],
    ratios: Sequence[Sequence[float]],
    *,
    window: int = 5,
    num_samples: int = 200,
    seed: int = 0,
) -> SteepestDrop:
    """c_crit of the intermediate saturation regime: where λ_τ / λ_0 at the step τ = K / c falls fastest with c.

    The mean over seeds is smoothed by a parabola in log c through the `window` nearest points round each point, whose
    slope there is the derivative.

    Args:
        c: Ascending, [m] with m >= window.
        ratios: λ_τ / λ_0, [seeds, m].
        window: Points of a parabola, odd, >= 3.
        num_samples: Of the bootstrap over seeds.
        seed: Of the bootstrap.

    Raises:
        ValueError: The shapes do not agree, c does not ascend from above zero, or there are too few points.

    Source: Kalra and Barkeshli, Phase diagram of early training dynamics in deep neural networks, 2023, who call the
    derivative a susceptibility.
    """
    grid, table = np.asarray(c, dtype=float), np.atleast_2d(np.asarray(ratios, dtype=float))
    if table.shape[1] != len(grid) or not np.isfinite(table).all():
        raise ValueError(
            f"`ratios` has shape {table.shape} or holds NaN; give a finite number for each of {len(grid)} c"
        )
    if window < 3 or window % 2 == 0 or len(grid) < window:
        raise ValueError(f"`window` is {window} for {len(grid)} values of c; give an odd number from 3 to that")
    if grid[0] <= 0 or (np.diff(grid) <= 0).any():
        raise ValueError("`c` must be positive and ascend")
    slopes = np.stack([_slopes(grid, row, window) for row in table])  # linear in the ratios, so means may come after
    mean = slopes.mean(axis=0)
    best = int(mean.argmin())
    if mean[best] >= 0:
        return SteepestDrop(math.nan, math.nan, math.nan, float(mean[best]))
    random = np.random.default_rng(seed)
    draws = random.integers(len(slopes), size=(num_samples, len(slopes)))
    low, high = np.quantile(grid[slopes[draws].mean(axis=1).argmin(axis=1)], [0.025, 0.975])
    return SteepestDrop(float(grid[best]), float(low), float(high), float(mean[best]))


def _slopes(c: np.ndarray, values: np.ndarray, window: int) -> np.ndarray:
    """d values / dc at every c [m]."""
    x, found = np.log(c), np.empty(len(c))
    for i in range(len(c)):
        first = min(max(0, i - window // 2), len(c) - window)
        near = slice(first, first + window)
        found[i] = np.polyfit(x[near] - x[i], values[near], 2)[1] / c[i]
    return found
