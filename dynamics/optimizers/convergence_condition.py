"""Whether schedules of an Adam-type method satisfy the sufficient condition for convergence.

Source: Zou, Shen, Jie, Zhang, Liu, A Sufficient Condition for Convergences of Adam and RMSProp, CVPR 2019, with its
corollary on polynomial schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .option_checks import check_number
from .schedules import Schedule, Values, plain, schedule_of

Given = float | str | Schedule | Callable[[int], float] | Sequence[float] | Tensor | Values

# An exponent below this counts as zero: a constant, or a factor such as a logarithm.
ZERO = 0.01


@dataclass(frozen=True)
class Item:
    """One item of the condition: what it asks for, whether it holds, and why not."""

    statement: str
    holds: bool
    found: str


@dataclass(frozen=True)
class SufficientCondition:
    """
    Attributes:
        items: The four of them, in the paper's order.
        C0: Smallest constant of item 3 up to T: max over t of χ_t over the smallest χ before.
        s, r: Exponents of α_t ~ t^-s and 1 − θ_t ~ t^-r over the last decade of steps.
        horizons, ratios: (Σ_(t<=T) α_t √(1 − θ_t)) / (T α_T) at several T up to the last.
        rate: Of the bound on (E‖∇f‖^(4/3))^(3/2), e.g. "T^-0.25"; None where the condition does not hold.
    """

    items: tuple[Item, Item, Item, Item]
    C0: float
    s: float
    r: float
    horizons: Values
    ratios: Values
    rate: str | None

    @property
    def holds(self) -> bool:
        return all(item.holds for item in self.items)

    def __str__(self) -> str:
        lines = [
            f"{'holds   ' if item.holds else 'violated'}  {i}. {item.statement}: {item.found}"
            for i, item in enumerate(self.items, 1)
        ]
        return "\n".join([*lines, f"rate: {self.rate or 'none follows'}"])


def check_sufficient_condition(
    alpha: Given, beta: Given = 0.9, theta: Given = 0.999, T: int = 100_000, *, start: int = 1
) -> SufficientCondition:
    r"""The four items of the condition on α_t, β_t, θ_t, for t from `start` to T.

    1. 0 <= β_t <= β < 1.
    2. 0 < θ_t < 1, not decreasing, and β < √θ_start.
    3. χ_t = α_t / √(1 − θ_t) almost non-increasing: a_t <= χ_t <= C0 a_t with a_t non-increasing.
    4. (Σ_(t<=T) α_t √(1 − θ_t)) / (T α_T) → 0.

    The first two are decided as they stand. The last two speak of the limit; they are decided by the exponents s and r
    of the last decade of steps: item 3 by r <= 2s, item 4 by r > 0 and s < 1. For α_t = η t^-s and θ_t = 1 − c t^-r
    the bound on the gradient is then

        T^(-r/2)  where s + r/2 < 1,     T^-(1−s) log T  where = 1,     T^-(1−s)  where > 1.

    Constants that are chosen for a horizon (`practical`) are constants here, so they violate item 4; their bound at
    that T is the ratio itself, √(1 − θ).

    Args:
        alpha: α_t with everything that acts on it, the learning-rate scheduler too: a number, a schedule or its text, a
            function of t, or the logged values at t = 1, 2, ..., to which T is then cut.
        beta, theta: Likewise.
        T: Last step, at least 10 after `start`.
        start: First step; the theory lets schedules begin at a K with θ_K > β².
    """
    check_number("T", T, least=1)
    check_number("start", start, least=1)
    for given in (alpha, beta, theta):
        T = min(T, len(given)) if not isinstance(given, str) and hasattr(given, "__len__") else T  # type: ignore[arg-type]
    if start + 10 > T:
        raise ValueError(f"`T` is {T} with `start` = {start}; at least ten steps after the start are needed")
    t = np.arange(start, T + 1, dtype=np.float64)
    a, b, th = (_values(name, given, t) for name, given in (("alpha", alpha), ("beta", beta), ("theta", theta)))
    if not (np.isfinite(a).all() and (a > 0).all()):
        raise ValueError("`alpha` must be positive and finite at every step from `start` to `T`")
    s, r = -_exponent(t, a), -_exponent(t, 1 - th)
    first, second = _first(b), _second(float(b.max()), th)
    with np.errstate(divide="ignore", invalid="ignore"):
        chi = a / np.sqrt(1 - th)
    C0 = float(np.max(chi / np.minimum.accumulate(chi)))
    third = Item(
        "α_t / √(1 − θ_t) almost non-increasing",
        bool(r <= 2 * s + ZERO),
        f"C0 = {C0:.4g}; r = {r:.3g}, 2s = {2 * s:.3g}",
    )
    horizons = np.unique(np.geomspace(start + 9, T, 40).astype(int)).astype(np.float64)
    sums = np.cumsum(a * np.sqrt(np.clip(1 - th, 0, None)))
    here = (horizons - start).astype(int)
    ratios = sums[here] / (horizons * a[here])
    fourth = Item(
        "Σ α_t √(1 − θ_t) / (T α_T) → 0",
        bool(r > ZERO and s < 1 - ZERO),
        f"{ratios[-1]:.4g} at T = {T}; r = {r:.3g}, s = {s:.3g}",
    )
    items = (first, second, third, fourth)
    rate = predicted_rate(s, r) if all(item.holds for item in items) else None
    return SufficientCondition(items, C0, s, r, horizons, ratios, rate)


def predicted_rate(s: float, r: float) -> str | None:
    """The bound for α_t ~ t^-s and 1 − θ_t ~ t^-r, or None outside 0 < r <= 2s < 2."""
    if not (ZERO < r <= 2 * s + ZERO and s < 1 - ZERO):
        return None
    if abs(s + r / 2 - 1) < ZERO / 2:
        return f"T^{_short(s - 1)} log T"
    return f"T^{_short(-r / 2 if s + r / 2 < 1 else s - 1)}"


def second_moment_weights(theta: Given, T: int) -> tuple[Values, float]:
    """Weights w_i = (1 − θ_i) Π_(j>i) θ_j of the squared gradients in v_T, and the weight Π θ_j left to v_0.

    They sum to 1. The effective window is 1 / Σ w_i².
    """
    check_number("T", T, least=1)
    th = _values("theta", theta, np.arange(1, T + 1, dtype=np.float64))
    after = np.append(np.cumprod(th[::-1])[::-1][1:], 1.0)
    return (1 - th) * after, float(np.prod(th))


def _values(name: str, given: Any, t: Values) -> Values:
    if isinstance(given, Tensor):
        given = given.detach().cpu().numpy()
    if not isinstance(given, str | Schedule) and hasattr(given, "__len__"):
        return np.asarray(given, dtype=np.float64)[t.astype(int) - 1]
    function = schedule_of(plain(name, given))
    if isinstance(function, Schedule):
        return np.asarray(function.values(t), dtype=np.float64)
    return np.array([float(function(int(step))) for step in t])


def _first(b: Values) -> Item:
    largest = float(b.max())
    return Item("0 <= β_t <= β < 1", bool((b >= 0).all() and largest < 1), f"largest {largest:.6g}")


def _second(largest: float, th: Values) -> Item:
    statement = "0 < θ_t < 1, not decreasing, β < √θ_1"
    inside = bool((th > 0).all() and (th < 1).all())
    rising = bool((np.diff(th) >= -1e-15).all())
    covered = largest < math.sqrt(max(float(th[0]), 0.0))
    reasons = [] if inside else [f"θ_t in [{th.min():.6g}, {th.max():.6g}]"]
    reasons += [] if rising else ["θ_t decreases"]
    reasons += [] if covered else [f"β = {largest:.4g} but √θ_1 = {math.sqrt(max(float(th[0]), 0.0)):.4g}"]
    return Item(statement, not reasons, "; ".join(reasons) or f"θ_1 = {th[0]:.6g}, β = {largest:.4g}")


def _exponent(t: Values, y: Values) -> float:
    """Slope of log y against log t over the last decade, at up to a thousand steps; y = 0 there gives −∞."""
    last = np.unique(np.geomspace(max(t[0], t[-1] / 10), t[-1], 1000).astype(int)) - int(t[0])
    x, y = np.log(t[last]), y[last]
    if (y <= 0).any():
        return -math.inf
    return float(np.polyfit(x - x.mean(), np.log(y), 1)[0])


def _short(exponent: float) -> str:
    return f"{round(exponent, 3):g}"
