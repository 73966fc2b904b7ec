"""Power laws in measured data: their exponent with a bootstrap error, and where a plateau is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95


@dataclass(frozen=True)
class PowerLaw:
    """y = prefactor · x^exponent.

    Attributes:
        exponent: Least-squares slope of log y over log x.
        error: Its bootstrap standard error.
        low, high: Its 95 % bootstrap percentile interval.
        prefactor: In the unit of y.
        num_points: Different x in the fit.
    """

    exponent: float
    error: float
    low: float
    high: float
    prefactor: float
    num_points: int

    def at(self, x: ArrayLike) -> NDArray[np.float64]:
        """prefactor · x^exponent."""
        return self.prefactor * np.asarray(x, dtype=np.float64) ** self.exponent

    def __str__(self) -> str:
        return f"{self.exponent:.3g} ± {self.error:.2g}"


def power_law_fit(
    x: ArrayLike,
    y: ArrayLike,
    *,
    window: tuple[float, float] | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> PowerLaw:
    r"""Fits y = C x^a by least squares of log y on log x.

    Errors come from the bootstrap. With repeats (y of shape [n, r]) the repeats are drawn again at each x, so the error
    is that of their scatter; the mean of log y over the repeats is what is fitted. With one y for each x the residuals
    are drawn again, divided by √(1 − h_i), h_i the leverage.

    Args:
        x: [n], positive, at least two different ones.
        y: [n] or [n, r], positive. [n] and [n, 1] need three different x for an error.
        window: Smallest and largest x to use; None uses all.
        num_resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        ValueError: shapes disagree, a value is not positive and finite, or too few x are left.

    Source: Davison, Hinkley, Bootstrap Methods and their Application, 1997, sections 3.2 and 6.2.
    """
    abscissae, ordinates = _positive("x", x, (1,)), _positive("y", y, (1, 2))
    if ordinates.ndim == 2 and ordinates.shape[1] == 1:
        ordinates = ordinates[:, 0]
    if len(abscissae) != len(ordinates):
        raise ValueError(f"`y` has {len(ordinates)} rows for {len(abscissae)} x; give one row for each x")
    if window is not None:
        inside = (abscissae >= window[0]) & (abscissae <= window[1])
        abscissae, ordinates = abscissae[inside], ordinates[inside]
    needed, different = (3 if ordinates.ndim == 1 else 2), len(np.unique(abscissae))
    if different < needed:
        raise ValueError(
            f"{different} different `x` are left, {needed} are needed for an error; widen `window` or measure more"
        )
    if num_resamples < 2:
        raise ValueError(f"`num_resamples` is {num_resamples}; a standard error needs at least 2")
    u, v = np.log(abscissae), np.log(ordinates)
    means = v if v.ndim == 1 else v.mean(1)
    exponents = _slopes(u, _resampled(u, v, num_resamples, np.random.default_rng(seed)))
    exponent = float(_slopes(u, means))
    low, high = np.quantile(exponents, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return PowerLaw(
        exponent,
        float(exponents.std(ddof=1)),
        float(low),
        float(high),
        float(np.exp(means.mean() - exponent * u.mean())),
        different,
    )


def crossing(x: ArrayLike, y: ArrayLike, level: float, *, rising: bool = True) -> float | None:
    """The x at which y first reaches `level`, interpolated linearly in log x and log y; None if it never does.

    Args:
        x: [n], positive and increasing.
        y: [n], positive.
        level: Positive.
        rising: Whether y is to reach it from below; otherwise from above.

    Raises:
        ValueError: values are not positive and finite, or x does not increase.
    """
    abscissae, ordinates = _positive("x", x, (1,)), _positive("y", y, (1,))
    if len(abscissae) != len(ordinates):
        raise ValueError(f"`y` has {len(ordinates)} values for {len(abscissae)} x; give one for each x")
    if (np.diff(abscissae) <= 0).any():
        raise ValueError("`x` does not increase; sort it and give each value once")
    if not np.isfinite(level) or level <= 0:
        raise ValueError(f"`level` is {level:g}; it must be positive and finite, as logarithms are compared")
    u, v = np.log(abscissae), (np.log(ordinates) - np.log(level)) * (1 if rising else -1)
    reached = np.flatnonzero(v >= 0)
    if len(reached) == 0:
        return None
    i = int(reached[0])
    if i == 0:
        return float(abscissae[0])
    return float(np.exp(u[i - 1] - v[i - 1] * (u[i] - u[i - 1]) / (v[i] - v[i - 1])))


def crossover(x: ArrayLike, y: ArrayLike, factor: float = 2.0, *, plateau: int = 1) -> float | None:
    """Where y leaves its plateau at small x: the first x with y = factor · plateau.

    The plateau is the geometric mean of the first `plateau` values; see `crossing` for the interpolation.

    Args:
        x: [n], positive and increasing.
        y: [n], positive.
        factor: Above 1 for a y that rises, below 1 for one that falls.
        plateau: How many values make the plateau, fewer than n.

    Returns:
        None where y stays within the factor.

    Raises:
        ValueError: as `crossing`; the factor is 1 or not positive; or the plateau has all values or none.

    Source: the T_c of Sclocchi, Geiger, Wyart, Dissecting the Effects of SGD Noise in Distinct Regimes of Deep
    Learning, 2023, where an observable begins to differ from that of small noise.
    """
    ordinates = _positive("y", y, (1,))
    if not np.isfinite(factor) or factor <= 0 or factor == 1:
        raise ValueError(f"`factor` is {factor:g}; give one above 1 for a rise, or between 0 and 1 for a fall")
    if not 1 <= plateau < len(ordinates):
        raise ValueError(f"`plateau` is {plateau} of {len(ordinates)} values; give at least 1 and not all")
    level = factor * float(np.exp(np.log(ordinates[:plateau]).mean()))
    return crossing(np.asarray(x)[plateau - 1 :], ordinates[plateau - 1 :], level, rising=factor > 1)


def _slopes(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of v [..., n] over u [n]."""
    centred = u - u.mean()
    return v @ centred / (centred @ centred)


def _resampled(
    u: NDArray[np.float64], v: NDArray[np.float64], num: int, random: np.random.Generator
) -> NDArray[np.float64]:
    """[num, n] bootstrap copies of v."""
    if v.ndim == 2:
        chosen = random.integers(v.shape[1], size=(num, *v.shape))
        return np.take_along_axis(np.broadcast_to(v, (num, *v.shape)), chosen, axis=2).mean(2)
    centred = u - u.mean()
    leverage = 1 / len(u) + centred**2 / (centred @ centred)
    fit = v.mean() + _slopes(u, v) * centred
    with np.errstate(divide="ignore", invalid="ignore"):  # a leverage of one leaves no residual
        residuals = np.where(leverage < 1 - 1e-12, (v - fit) / np.sqrt(1 - leverage), 0.0)
    return fit + random.choice(residuals - residuals.mean(), size=(num, len(v)))


def _positive(name: str, values: ArrayLike, dimensions: Sequence[int]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in dimensions or array.size == 0:
        raise ValueError(f"`{name}` has shape {array.shape}; give {' or '.join(['[n]', '[n, r]'][: len(dimensions)])}")
    if not np.isfinite(array).all() or (array <= 0).any():
        bad = array[~(np.isfinite(array) & (array > 0))][0]
        raise ValueError(f"`{name}` holds {bad:g}; logarithms need positive finite values: leave such points out")
    return array
