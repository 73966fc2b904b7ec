"""The regimes of a training run, told from its sharpness: transient, saturation, sharpening, edge of stability."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeGuard

import numpy as np

from .trajectory import Trajectory
from .trend import Trend

Label = Literal["transient", "saturation", "progressive sharpening", "edge of stability", "progressive flattening"]

# A change must exceed this many standard errors of the fit.
SIGNIFICANCE = 5.0
# Weights of neighbouring records in the mean of sharpness over threshold: an oscillation of period two is gone.
SMOOTHING = np.array([1.0, 2.0, 2.0, 2.0, 1.0])


@dataclass(frozen=True)
class Regime:
    """A stretch of a run with one label.

    Attributes:
        label: "transient", "saturation", "progressive sharpening", "edge of stability" or "progressive flattening".
        first_step, last_step: Of its records; every record belongs to one regime.
        change: Sharpness at its end over that at its beginning, of the fitted trend; of means at the edge.
        rate: The same as a factor per doubling of 1 + step; NaN for a single record.
        ratio: Mean of sharpness over threshold; NaN without a threshold.
        loss: First and last; NaN without a loss.
        rises: Share of its records whose loss is above that of the record before; NaN without a loss.
        reason: These numbers against the rule, in words.
    """

    label: Label
    first_step: int
    last_step: int
    change: float
    rate: float
    ratio: float
    loss: tuple[float, float]
    rises: float
    reason: str


class _Records(NamedTuple):
    """Columns [n], ascending in step; without loss or threshold NaN."""

    steps: np.ndarray
    sharpness: np.ndarray
    threshold: np.ndarray
    loss: np.ndarray

    def part(self, first: int, last: int) -> _Records:
        """Records first to last, both included."""
        return _Records(*(column[first : last + 1] for column in self))


class _Mark(NamedTuple):
    """A label from record to record, the change of log λ, and why."""

    label: Label
    first: int
    last: int
    change: float
    reason: str


class _Move(NamedTuple):
    """Neighbouring pieces of a trend of one direction: -1, 0 or 1, between two of its knots."""

    direction: int
    first: int
    last: int


def regimes(
    run: Trajectory | Sequence[int],
    loss: str | Sequence[float] | None = "loss",
    sharpness: str | Sequence[float] = "sharpness",
    threshold: str | float | Sequence[float] | None = "stability_threshold",
    *,
    flat: float = 0.05,
    edge: float = 0.95,
    band: tuple[float, float] = (0.8, 1.4),
    least_steps: int = 10,
    least_records: int = 5,
    early: float = 10.0,
) -> list[Regime]:
    r"""Cuts a run into regimes by its sharpness λ and the threshold of stability s (2/η for gradient descent).

    **Edge of stability**: λ/s, averaged over five neighbours with weights 1:2:2:2:1, is at least `edge` at first and
    stays in `band` but for excursions, for at least `least_steps` steps and `least_records` records; an excursion is
    shorter than that. It ends with the last record at `edge` before λ/s leaves the band.

    The rest is cut at the knots of a continuous, piecewise straight fit to log λ against log(1 + step), whose number of
    pieces follows from the noise. Pieces in which λ changes by less than `flat` while the steps double, or by less in
    total, or by less than five standard errors of the fit, are constant. Constant for less than a doubling is a turning
    point, or a rest, and belongs to the move before (at the beginning to the one after).

    - **Transient**: from the first record to the end of the first fall, where that begins at a time τ <= `early`. In
      units of 1/λ_0, τ is the sum of 2 λ_0 / s_t over the steps t before, which is λ_0 Σ η_t for gradient descent with
      whatever schedule. It has the catapult, where λ rises before it falls, in it.
    - **Saturation**: λ is constant. **Progressive sharpening**: it rises. **Progressive flattening**: it falls later.

    The loss decides nothing, it is only reported: it rises now and then at the edge, and with minibatches anywhere.
    Stochastic steps settle below the threshold of full-batch ones; give the sharpness that they hold at it, such as the
    batch sharpness. For an adaptive optimizer give `sharpness="threshold_ratio", threshold=1.0`.

    Args:
        run: A trajectory, from which the rows named by the other arguments are taken at the steps that have them all;
            or the steps of the records, ascending, counted from the start of training.
        loss: Name of a quantity, or numbers by record; None without.
        sharpness: Likewise; positive. Records where it is not finite are left out.
        threshold: Likewise, or one number; positive, infinite where η = 0. Records where it is NaN are left out. None,
            or NaN throughout, is to be without: no edge is found then, and τ is the number of steps. Between records
            1/s is taken as linear, before the first one as constant.
        flat: Relative change that counts as none, in (0, 1).
        edge, band: λ/s.
        early: Of τ.

    Returns:
        In the order of the run, neighbours with different labels.

    Raises:
        ValueError: Fewer than `least_records` records that are not left out, steps that do not ascend, lengths that
            differ, a sharpness or threshold that is not positive.

    Source: the regimes are those of Kalra and Barkeshli, Phase diagram of early training dynamics in deep neural
    networks, 2023, and Kalra, He and Barkeshli, Universal sharpness dynamics, 2025; the rules by which they
    are told apart are derived here.
    """
    if not 0 < flat < 1 or not 0 < band[0] <= edge <= band[1] or least_records < 5 or not early >= 0:
        raise ValueError(
            f"`flat` is {flat}, `edge` {edge}, `band` {band}, `least_records` {least_records}, `early` {early}; give "
            "flat in (0, 1), 0 < band[0] <= edge <= band[1], at least 5 records and early >= 0"
        )
    if isinstance(run, Trajectory):
        columns = _rows_of(run, loss, sharpness, threshold)
    else:
        columns = (run, loss, sharpness, threshold)
    records = _checked(*columns, least_records=least_records)
    marks: list[_Mark] = []
    edges = _without_singles(_edges(records, edge, band, least_steps, least_records), len(records.steps))
    first = 0
    for start, stop in [*edges, (len(records.steps), -1)]:
        if start > first:
            marks += _moves(records, first, start - 1, flat, early)
        if stop >= 0:
            marks.append(_edge_mark(records, start, stop, edge))
        first = stop + 1
    return [_regime(records, mark) for mark in marks]


def _edges(
    records: _Records, edge: float, band: tuple[float, float], least_steps: int, least_records: int
) -> Iterator[tuple[int, int]]:
    """First and last record of every stretch at the edge of stability."""

    def lasts(first: int, last: int) -> bool:
        return last - first + 1 >= least_records and records.steps[last] - records.steps[first] >= least_steps

    ratio = _smoothed(records.sharpness / records.threshold)
    inside = (ratio >= band[0]) & (ratio <= band[1])
    stretches = [list(group) for _, group in itertools.groupby(range(len(ratio)), key=lambda i: inside[i])]
    for stretch in stretches[1:-1]:  # a short excursion is bridged
        inside[stretch] |= not lasts(stretch[0], stretch[-1])
    for within, group in itertools.groupby(range(len(ratio)), key=lambda i: inside[i]):
        if not within:
            continue
        stretch = np.array(list(group))
        at = stretch[ratio[stretch] >= edge]
        if len(at) == 0:
            continue
        # A dip at the very end of the run may still be a part of the oscillation.
        first, last = int(at[0]), int(stretch[-1] if stretch[-1] == len(ratio) - 1 else at[-1])
        if lasts(first, last):
            yield first, last


def _without_singles(edges: Iterable[tuple[int, int]], num: int) -> list[tuple[int, int]]:
    """The same stretches, with what lies between, before or after them if it is one record, which has no trend."""
    found: list[tuple[int, int]] = []
    for first, last in edges:
        before = found[-1][1] if found else -1
        if found and first - before <= 2:
            found[-1] = (found[-1][0], last)
        else:
            found.append((first - 1 if first - before == 2 else first, last))
    if found and found[-1][1] == num - 2:
        found[-1] = (found[-1][0], num - 1)
    return found


def _edge_mark(records: _Records, first: int, last: int, edge: float) -> _Mark:
    part = records.part(first, last)
    level, ratio = _smoothed(part.sharpness), part.sharpness / part.threshold
    reason = (
        f"sharpness over threshold is {ratio.mean():.3g} on average with a standard deviation of {ratio.std():.2g}; "
        f"it reached {edge:g} at step {part.steps[0]}"
    )
    return _Mark("edge of stability", first, last, math.log(level[-1] / level[0]), reason)


def _moves(records: _Records, first: int, last: int, flat: float, early: float) -> Iterator[_Mark]:
    """Marks of records away from the edge, two of them at least."""
    part = records.part(first, last)
    trend = Trend.of(np.log2(1.0 + part.steps), np.log(part.sharpness))
    moves = _directions(trend, flat)
    fall = next((move for move in moves if move.direction < 0), None)
    if first == 0 and fall is not None:
        begin = int(trend.knots[fall.first])
        time = float(_times(part)[begin])
        if time <= early:
            change, _ = trend.change(0, fall.last)
            reason = f"the sharpness falls from step {part.steps[begin]} on, at the time τ = {time:.3g} <= {early:g}"
            yield _Mark("transient", 0, int(trend.knots[fall.last]), change, reason)
            moves = [move for move in moves if move.first >= fall.last]
    for move in moves:
        begin = first + (int(trend.knots[move.first]) + 1 if move.first else 0)
        change, error = trend.change(move.first, move.last)
        octaves = trend.x[move.last] - trend.x[move.first]
        reason = (
            f"the trend changes by {100 * math.expm1(change):+.2g} % with an error of {100 * error:.1g} %, by "
            f"{100 * math.expm1(change / octaves):+.2g} % per doubling of steps; {100 * flat:g} % count as none"
        )
        yield _Mark(_LABELS[move.direction], begin, first + int(trend.knots[move.last]), change, reason)


def _times(records: _Records) -> np.ndarray:
    """τ [n], the sum of 2 λ_0 / s over the steps before each record; steps without a threshold."""
    if np.isnan(records.threshold).all():
        return records.steps.astype(float)
    rates = 2 * records.sharpness[0] / records.threshold
    between = np.diff(records.steps) * (rates[1:] + rates[:-1]) / 2
    return records.steps[0] * rates[0] + np.concatenate([[0.0], np.cumsum(between)])


_LABELS: dict[int, Label] = {-1: "progressive flattening", 0: "saturation", 1: "progressive sharpening"}


def _directions(trend: Trend, flat: float) -> list[_Move]:
    """The pieces of the trend, neighbours of one direction as one."""
    rates = np.diff(trend.y) / np.diff(trend.x)
    signs = np.where(np.abs(rates) >= math.log1p(flat), np.sign(rates), 0.0)
    moves = _merged(_Move(int(sign), i, i + 1) for i, sign in enumerate(signs))

    def counts(move: _Move) -> bool:
        change, error = trend.change(move.first, move.last)
        return abs(change) >= max(math.log1p(flat), SIGNIFICANCE * error)

    moves = _merged(move if counts(move) else move._replace(direction=0) for move in moves)
    # Constant for less than a doubling of the steps is a turning point, or a rest.
    if len(moves) > 1:
        short = [move.direction == 0 and trend.x[move.last] - trend.x[move.first] < 1 for move in moves]
        for i in range(1, len(moves)):
            if short[i]:
                moves[i] = moves[i]._replace(direction=moves[i - 1].direction)
        if short[0]:
            moves[0] = moves[0]._replace(direction=moves[1].direction)
    return _merged(moves)


def _merged(moves: Iterable[_Move]) -> list[_Move]:
    merged: list[_Move] = []
    for move in moves:
        if merged and merged[-1].direction == move.direction:
            merged[-1] = merged[-1]._replace(last=move.last)
        else:
            merged.append(move)
    return merged


def _regime(records: _Records, mark: _Mark) -> Regime:
    part = records.part(mark.first, mark.last)
    octaves = math.log2((1 + part.steps[-1]) / (1 + part.steps[0]))
    before = records.loss[mark.first - 1 : mark.last] if mark.first else records.loss[: mark.last]
    after = records.loss[max(mark.first, 1) : mark.last + 1]
    return Regime(
        label=mark.label,
        first_step=int(part.steps[0]),
        last_step=int(part.steps[-1]),
        change=math.exp(mark.change),
        rate=math.exp(mark.change / octaves) if octaves else math.nan,
        ratio=float((part.sharpness / part.threshold).mean()),
        loss=(float(part.loss[0]), float(part.loss[-1])),
        rises=math.nan if np.isnan(part.loss).all() else float(np.mean(after > before)),
        reason=mark.reason,
    )


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Means [n] of at least five values over neighbours, over fewer of them at the ends."""
    return np.convolve(values, SMOOTHING, "same") / np.convolve(np.ones(len(values)), SMOOTHING, "same")


def _rows_of(
    trajectory: Trajectory,
    loss: object,
    sharpness: object,
    threshold: object,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray | float | None]:
    """Steps, loss, sharpness and threshold at the steps that have them all."""
    named = {"loss": loss, "sharpness": sharpness, "threshold": threshold}
    for name, quantity in named.items():
        allowed = quantity is None or isinstance(quantity, str) or (name == "threshold" and _is_number(quantity))
        if not allowed or (name == "sharpness" and quantity is None):
            raise TypeError(f"`{name}` is {quantity!r}; with a trajectory give the name of one of its quantities")
    series = {name: trajectory.series(quantity) for name, quantity in named.items() if isinstance(quantity, str)}
    steps = functools.reduce(np.intersect1d, [one.steps for one in series.values()])
    columns = {name: one.values[np.searchsorted(one.steps, steps)] for name, one in series.items()}
    given = float(threshold) if _is_number(threshold) else columns.get("threshold")
    return steps, columns.get("loss"), columns["sharpness"], given


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _checked(steps: object, loss: object, sharpness: object, threshold: object, *, least_records: int) -> _Records:
    """The records with a sharpness and a threshold, when they can be told apart."""
    columns: dict[str, np.ndarray] = {"run": np.asarray(steps)}
    for name, given in (("loss", loss), ("sharpness", sharpness), ("threshold", threshold)):
        if isinstance(given, str):
            raise TypeError(f"`{name}` is {given!r}; beside steps give numbers, one for each, or use a trajectory")
        value = np.asarray(math.nan if given is None else given, dtype=float)
        columns[name] = np.broadcast_to(value, columns["run"].shape) if value.ndim == 0 else value
        if columns[name].shape != columns["run"].shape or columns["run"].ndim != 1:
            raise ValueError(
                f"`{name}` has shape {list(value.shape)} for {list(columns['run'].shape)} steps; give one for each"
            )
    if (np.diff(columns["run"]) <= 0).any() or (columns["run"] < 0).any():
        raise ValueError("`run` holds steps that do not ascend from 0; give each record once, in the order of training")
    missing = np.isnan(columns["threshold"])
    known = np.isfinite(columns["sharpness"]) & (~missing | missing.all())
    records = _Records(*(columns[name][known] for name in ("run", "sharpness", "threshold", "loss")))
    if len(records.steps) < least_records:
        raise ValueError(
            f"`run` has {len(records.steps)} records with a finite sharpness and a threshold that is not NaN; regimes "
            f"need {least_records}: measure more often"
        )
    for name, column in (("sharpness", records.sharpness), ("threshold", records.threshold)):
        wrong = np.flatnonzero(column <= 0)
        if len(wrong):
            raise ValueError(
                f"`{name}` is {column[wrong[0]]:.3g} at step {records.steps[wrong[0]]}; it must be positive: give the "
                "largest eigenvalue, and the threshold of the optimizer's next step"
            )
    return records
