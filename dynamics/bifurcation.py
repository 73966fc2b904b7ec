"""What late training does as the learning rate grows: orbits, their periods, doublings, Lyapunov exponents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

TOL = 1e-6


@dataclass(frozen=True)
class Bifurcation:
    """Late orbits over a parameter, such as the learning rate.

    Attributes:
        values: Of the parameter.
        orbits: For each the observable at the last steps [keep], fewer where it left the finite numbers.
        periods: For each the period of its orbit; None where there is none up to half of its length, or it diverged.
        diverged: For each whether it did.
    """

    values: tuple[float, ...]
    orbits: tuple[np.ndarray, ...]
    periods: tuple[int | None, ...]
    diverged: tuple[bool, ...]

    def points(self) -> tuple[list[float], list[float]]:
        """x and y of all dots of the diagram; without orbits that diverged."""
        kept = [pair for pair, lost in zip(zip(self.values, self.orbits, strict=True), self.diverged, strict=True)]
        return [x for x, orbit in kept for _ in orbit], [float(y) for _, orbit in kept for y in orbit]


def bifurcation(
    run: Callable[[float], Iterable[Any]],
    values: Sequence[float],
    *,
    burn_in: int,
    keep: int,
    observable: Callable[[Any], float] = float,
    tol: float = TOL,
) -> Bifurcation:
    """The bifurcation diagram of anything that runs step by step.

    Args:
        run: For a value of the parameter, the states of a run one after another.
        values: Of the parameter.
        burn_in: States to skip; not observed.
        keep: States to observe after them.
        observable: What is recorded of a state.
        tol: As for `detect_period`.
    """
    orbits = [late_orbit(run(value), burn_in=burn_in, keep=keep, observable=observable) for value in values]
    lost = tuple(len(orbit) < keep for orbit in orbits)
    periods = tuple(None if gone else detect_period(orbit, tol) for orbit, gone in zip(orbits, lost, strict=True))
    return Bifurcation(tuple(float(value) for value in values), tuple(orbits), periods, lost)


def late_orbit(
    states: Iterable[Any], *, burn_in: int, keep: int, observable: Callable[[Any], float] = float
) -> np.ndarray:
    """The observable at `keep` states after the first `burn_in`; it ends before the first that is not finite, and where
    the states end."""
    if burn_in < 0 or keep < 1:
        raise ValueError(f"`burn_in` is {burn_in} and `keep` is {keep}; they must be at least 0 and 1")
    orbit = []
    for state in islice(states, burn_in, burn_in + keep):
        value = float(observable(state))
        if not math.isfinite(value):
            break
        orbit.append(value)
    return np.array(orbit)


def detect_period(series: Sequence[float] | np.ndarray, tol: float = TOL) -> int | None:
    """The smallest p, up to half of the length, with |x_(t+p) − x_t| <= tol for all t; None where there is none.

    The tolerance is absolute: near a doubling, where orbits converge slowly, choose it well above what is left of the
    transient and below the distance of the new branches.

    Raises:
        ValueError: fewer than two numbers, or one that is not finite.
    """
    x = np.asarray(series, dtype=float)
    if x.ndim != 1 or len(x) < 2 or not np.isfinite(x).all():
        raise ValueError(f"`series` has shape {list(x.shape)}; give at least two finite numbers in a row")
    for p in range(1, len(x) // 2 + 1):
        if np.abs(x[p:] - x[:-p]).max() <= tol:
            return p
    return None


def onset(holds: Callable[[float], bool], low: float, high: float, *, width: float) -> tuple[float, float]:
    """A bracket no wider than `width` with `holds` false at its lower and true at its upper end, by bisection.

    For a doubling: `lambda Y: period(Y) != p`.

    Raises:
        ValueError: it does not go from false at `low` to true at `high`.
    """
    if holds(low) or not holds(high):
        raise ValueError(f"`holds` must be false at `low` = {low:g} and true at `high` = {high:g}; widen the bracket")
    while high - low > width:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low, high


def lyapunov_exponent(
    states: Iterable[Any], jacobian: Callable[[Any], Any], *, burn_in: int, steps: int, seed: int = 0
) -> float:
    """Largest Lyapunov exponent, per step: the mean of log‖J v‖/‖v‖ for a tangent vector v that the orbit carries.

    Below zero on a stable periodic orbit, above on a chaotic one.

    Args:
        states: Of a run, one after another.
        jacobian: Of the step from a state to the next, a number or [k, k].
        burn_in: Steps in which v turns towards the direction that grows most; not counted.
        steps: Counted.
        seed: Of the first v.
    """
    v, total, counted = None, 0.0, 0
    for i, state in enumerate(islice(states, burn_in + steps)):
        J = np.atleast_2d(np.asarray(jacobian(state), dtype=float))
        if v is None:
            v = np.random.default_rng(seed).normal(size=J.shape[0])
            v /= np.linalg.norm(v)
        v = J @ v
        growth = float(np.linalg.norm(v))
        if growth == 0.0:
            return -math.inf
        if not math.isfinite(growth):
            return math.inf
        v /= growth
        if i >= burn_in:
            total, counted = total + math.log(growth), counted + 1
    if not counted:
        raise ValueError(f"`states` ended within `burn_in` = {burn_in}; give a longer run")
    return total / counted
