"""The trend of a noisy curve as a continuous chain of straight pieces."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Most bins of a fit, whose cost grows with their square.
NUM_BINS = 150
# Departure from straight pieces that counts as none: the curve is not made of them.
FLOOR = 0.02
# A knot more must lower χ² by this times the logarithm of the number of bins: two parameters and its place.
KNOT_PENALTY = 3.0


@dataclass(frozen=True)
class Trend:
    """A continuous, piecewise straight fit to points (x, y), x ascending.

    Attributes:
        knots: Indices of the points where a piece begins or ends [k + 1], the first and the last point among them.
        x: Of the knots [k + 1].
        y: Fitted values there [k + 1].
        covariance: Of `y` [k + 1, k + 1].
    """

    knots: np.ndarray
    x: np.ndarray
    y: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray) -> Trend:
        """The fit with the least χ² + penalty · (number of knots).

        Points are first averaged in bins of equal width. The variance of a bin is FLOOR² + σ² / (points in it) with
        the noise σ of a point from the second differences. Knots are first chosen among the bins by dynamic programming
        over chords. Chords end on noisy points and need too many; so, with heights by weighted least squares, the knot
        that is needed least is left out while that raises χ² by less than the penalty.

        Args:
            x, y: [n], n >= 2, x ascending.
        """
        bins = np.floor((x - x[0]) / max(x[-1] - x[0], 1e-300) * NUM_BINS).astype(int)
        _, owner, counts = np.unique(bins, return_inverse=True, return_counts=True)
        means = np.stack([np.bincount(owner, weights=v) / counts for v in (x, y)])
        variance = FLOOR**2 + noise(x, y) ** 2 / counts
        penalty = KNOT_PENALTY * math.log(len(variance))
        found = _chords(means[0], means[1], 1 / variance, penalty)
        found, heights, covariance = _pruned(means[0], means[1], 1 / variance, found, penalty)
        # The last point of a bin stands for it, so that its points belong to the piece before.
        last = np.cumsum(counts) - 1
        knots = last[found]
        knots[0] = 0
        return cls(knots, means[0][found], heights, covariance)

    def change(self, i: int, j: int) -> tuple[float, float]:
        """y_j − y_i between two knots, and its standard error."""
        C = self.covariance
        return float(self.y[j] - self.y[i]), math.sqrt(max(0.0, C[i, i] + C[j, j] - 2 * C[i, j]))


def noise(x: np.ndarray, y: np.ndarray) -> float:
    """Standard deviation of independent noise on a smooth curve, from the distance of points to a chord of neighbours.

    Its median, so that corners and jumps have no say; 0 for fewer than three points.
    """
    if len(x) < 3:
        return 0.0
    share = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    distance = y[1:-1] - (1 - share) * y[:-2] - share * y[2:]
    return float(1.4826 * np.median(np.abs(distance) / np.sqrt(1 + share**2 + (1 - share) ** 2)))


def _chords(x: np.ndarray, y: np.ndarray, weight: np.ndarray, penalty: float) -> np.ndarray:
    """Indices of the knots [k + 1] of the best chain of chords between points."""
    x, y = x - x[0], y - y[0]
    sums = {name: np.concatenate([[0.0], np.cumsum(weight * v)]) for name, v in _moments(x, y).items()}
    best, before = np.zeros(len(x)), np.zeros(len(x), dtype=int)
    for j in range(1, len(x)):
        i = np.arange(j)
        s = {name: total[j + 1] - total[i] for name, total in sums.items()}
        slope = (y[j] - y[i]) / (x[j] - x[i])
        level = y[i] - slope * x[i]
        chi = s["yy"] - 2 * slope * s["xy"] - 2 * level * s["y"]
        chi += slope**2 * s["xx"] + 2 * slope * level * s["x"] + level**2 * s["1"]
        total = best[i] + np.maximum(chi, 0.0) + penalty
        before[j] = int(total.argmin())
        best[j] = total[before[j]]
    knots = [len(x) - 1]
    while knots[-1] > 0:
        knots.append(int(before[knots[-1]]))
    return np.array(knots[::-1])


def _moments(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    return {"1": np.ones_like(x), "x": x, "y": y, "xx": x * x, "xy": x * y, "yy": y * y}


def _pruned(
    x: np.ndarray, y: np.ndarray, weight: np.ndarray, knots: np.ndarray, penalty: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The knots that are needed, their heights [k + 1] and the covariance of these."""
    heights, covariance, chi = _fit(x, y, weight, knots)
    while len(knots) > 2:
        fewer = [np.delete(knots, i) for i in range(1, len(knots) - 1)]
        fits = [_fit(x, y, weight, kept) for kept in fewer]
        best = min(range(len(fits)), key=lambda i: fits[i][2])
        if fits[best][2] - chi >= penalty:
            break
        knots, (heights, covariance, chi) = fewer[best], fits[best]
    return knots, heights, covariance


def _fit(x: np.ndarray, y: np.ndarray, weight: np.ndarray, knots: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Heights at the knots by weighted least squares, their covariance, and χ²."""
    hats = np.stack([np.interp(x, x[knots], row) for row in np.eye(len(knots))], axis=1)
    weighted = hats * weight[:, None]
    covariance = np.linalg.inv(hats.T @ weighted)
    heights = covariance @ (weighted.T @ y)
    return heights, covariance, float(weight @ (y - hats @ heights) ** 2)
