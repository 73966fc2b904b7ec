"""Catapults along a run: the loss shoots up, the sharpness comes down, the loss comes back; and what drives them.

Source: Kalra and Barkeshli, Why Warmup the Learning Rate? Underlying Mechanisms and Improvements, NeurIPS 2024, the
sections on the mechanisms of warmup.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Mechanism = Literal["C1", "C2", "C3"]


@dataclass(frozen=True)
class Catapult:
    """One event; all numbers of records are those of the arrays given.

    Attributes:
        start: Record of the lowest loss before the rise.
        peak: Record of the highest loss.
        end: The first record after it with a loss no higher than at `start`; the last record where it never came back.
        returned: Whether it came back.
        loss_rise: Loss at the peak over that at `start`.
        sharpness_drop: Smallest sharpness from the peak to `end`, over the largest from `start` to the peak.
    """

    start: int
    peak: int
    end: int
    returned: bool
    loss_rise: float
    sharpness_drop: float


@dataclass(frozen=True)
class WarmupMechanism:
    """What the sharpness does by itself, and what the learning rate adds.

    Attributes:
        label: "C1" natural progressive sharpening, "C2" natural sharpness reduction, "C3" constant sharpness; None for
            a run that is above its threshold from the first record on, which shows nothing natural.
        natural: Records from the first on in which the run is stable: below its threshold and before any catapult.
        change: Sharpness over its first value where the label was decided: at the first of these records at which it
            has changed by more than the tolerance, else at the last of them.
        catapults: Of the whole run.
        edge_share: Share of the records after the first crossing that lie within `edge` of the threshold: near 1 for a
            persistent cycle of catapults with η ≈ 2/λ, low for isolated ones.
    """

    label: Mechanism | None
    natural: int
    change: float
    catapults: tuple[Catapult, ...]
    edge_share: float


def catapults(
    loss: Sequence[float], sharpness: Sequence[float], *, rise: float = 1.1, drop: float = 0.9
) -> tuple[Catapult, ...]:
    """The catapults of a run, in their order.

    A rise begins at the lowest loss so far and ends when the loss is back at that level. It is a catapult when the loss
    grew by the factor `rise` at least, and the sharpness fell to `drop` times what it had been, or below. Ripples
    within one rise are one event, so a run whose loss oscillates without coming back to its lowest value is one, too.

    Args:
        loss: At the records [T], the first of them before the first step.
        sharpness: Likewise; the preconditioned one for an adaptive optimizer.
        rise: Above 1.
        drop: Between 0 and 1.

    Raises:
        ValueError: arrays of different length, or with numbers that are not finite: cut a diverged run before its end.
    """
    losses, lambdas = _checked(loss, sharpness)
    if not rise > 1:
        raise ValueError(f"`rise` is {rise}; it must be above 1")
    if not 0 < drop <= 1:
        raise ValueError(f"`drop` is {drop}; it must be above 0 and at most 1")
    found, start, t = [], 0, 1
    while t < len(losses):
        if losses[t] <= losses[start]:
            start, t = t, t + 1
            continue
        back = np.flatnonzero(losses[t:] <= losses[start])
        end = t + int(back[0]) if len(back) else len(losses) - 1
        peak = start + int(losses[start : end + 1].argmax())
        grown = losses[peak] / losses[start] if losses[start] > 0 else math.inf
        fallen = lambdas[peak : end + 1].min() / lambdas[start : peak + 1].max()
        if grown >= rise and fallen <= drop:
            found.append(Catapult(start, peak, end, bool(len(back)), float(grown), float(fallen)))
        start, t = end, end + 1
    return tuple(found)


def warmup_mechanism(
    loss: Sequence[float],
    sharpness: Sequence[float],
    threshold: Sequence[float] | float,
    *,
    tol: float = 0.1,
    edge: float = 0.3,
    rise: float = 1.1,
    drop: float = 0.9,
) -> WarmupMechanism:
    """Which of the three mechanisms of warmup a run shows.

    The label is that of the natural evolution, before the run first meets its threshold: C1 where the sharpness rises
    by the share `tol` first, C2 where it falls by it first, C3 where it does neither. Then the rise of the learning
    rate alone brings the threshold down to it.

    Args:
        loss, sharpness: As for `catapults`.
        threshold: The largest stable sharpness at each record [T], such as 2/η_t, infinite where η = 0; or one number.
        tol: Share by which the sharpness must change.
        edge: Share of the threshold by which a record may be off it and be called at the edge.
        rise, drop: As for `catapults`.
    """
    losses, lambdas = _checked(loss, sharpness)
    thresholds = np.broadcast_to(np.asarray(threshold, dtype=float), lambdas.shape)
    if np.isnan(thresholds).any() or (thresholds <= 0).any():
        raise ValueError("`threshold` must be above 0 at every record; it may be infinite")
    if not (tol > 0 and edge > 0):
        raise ValueError(f"`tol` is {tol} and `edge` is {edge}; they must be above 0")
    events = catapults(loss, sharpness, rise=rise, drop=drop)
    above = np.flatnonzero(lambdas >= thresholds)
    ends = [*above[:1], *(event.start + 1 for event in events[:1]), len(losses)]
    natural = int(min(ends))
    near = np.abs(lambdas / thresholds - 1) <= edge
    edge_share = float(near[above[0] :].mean()) if len(above) else 0.0
    if natural == 0:
        return WarmupMechanism(None, 0, 1.0, events, edge_share)
    changes = lambdas[:natural] / lambdas[0]
    decided = np.flatnonzero((changes > 1 + tol) | (changes < 1 - tol))
    change = float(changes[decided[0]] if len(decided) else changes[-1])
    label: Mechanism = "C3" if not len(decided) else "C1" if change > 1 else "C2"
    return WarmupMechanism(label, natural, change, events, edge_share)


def _checked(loss: Sequence[float], sharpness: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    losses, lambdas = np.asarray(loss, dtype=float), np.asarray(sharpness, dtype=float)
    if losses.ndim != 1 or losses.shape != lambdas.shape or not len(losses):
        raise ValueError(
            f"`loss` has shape {list(losses.shape)} and `sharpness` {list(lambdas.shape)}; give one number of each for "
            "every record"
        )
    for name, values in (("loss", losses), ("sharpness", lambdas)):
        if not np.isfinite(values).all():
            first = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f"`{name}` is {values[first]} at record {first}; give the records before it")
    return losses, lambdas
