"""Critical learning rates of early training: where loss and sharpness begin to catapult, where training diverges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..hessian.batch_moments import is_number
from ..hessian.curvature import Hessian
from ..hessian.eigs import top_eigenvalues
from ..landscape.objective import Objective


class ScaledLearningRate(NamedTuple):
    """
    Attributes:
        lr: η = c / λ_0.
        sharpness: λ_0, the largest eigenvalue of the Hessian.
        error: Its error bar, as `value_bounds` of `EigenPairs`; η has the same relative error.
    """

    lr: float
    sharpness: float
    error: float


def learning_rate_from_c(objective: Objective, c: float, *, tol: float = 1e-3, seed: int = 0) -> ScaledLearningRate:
    """The learning rate η = c / λ_0 with λ_0 the sharpness at the current weights; c = 2 is the edge of stability.

    Args:
        c: Positive.
        tol, seed: As for `top_eigenvalues`.

    Raises:
        ValueError: c is not positive, or the largest eigenvalue is not.

    Source: Kalra and Barkeshli, Phase diagram of early training dynamics in deep neural networks, 2023.
    """
    if not 0 < c < math.inf:
        raise ValueError(f"`c` is {c}; give a positive number, such as 1")
    pairs = top_eigenvalues(Hessian(objective), 1, tol=tol, verify=True, seed=seed)
    sharpness = float(pairs.values[0])
    if sharpness <= 0:
        raise ValueError(
            f"the largest eigenvalue of the Hessian is {sharpness:.3g}, so c / λ is no learning rate; measure at other "
            "weights, or set the learning rate itself"
        )
    return ScaledLearningRate(c / sharpness, sharpness, float(pairs.value_bounds[0]))


@dataclass(frozen=True)
class EarlyRun:
    """The first steps of one training at η = c / λ_0.

    Attributes:
        c: Learning rate in units of 1 / λ_0.
        loss: L_0, L_1, ... after each step. A run that diverged may be shorter than the steps looked at, and counts as
            risen then; a loss that is not finite is divergence.
        sharpness: λ_0, λ_1, ..., NaN where it was not measured; None for a run without it, as is one in which it is
            known at no step after the first.
        diverged: Whether the training diverged, then or later; where a loss is not finite it did anyway.
        path: Loss on the segment from the first weights to those after the steps looked at; None where unknown.
    """

    c: float
    loss: Sequence[float]
    sharpness: Sequence[float] | None = None
    diverged: bool = False
    path: Sequence[float] | None = None


@dataclass(frozen=True)
class CriticalConstants:
    """The four critical constants; None where the grid ended before.

    Attributes:
        c_loss: Smallest c at which the loss rises above L_0 in the first steps (loss catapult).
        c_sharp: Smallest c at which the sharpness rises above λ_0 in them (sharpness catapult); None also where no
            run has a sharpness.
        c_barrier: Smallest c with a loss above L_0 on the segment from the first weights to the last; c_max where no
            training that stayed finite has one; None also where no path is known.
        c_max: Largest c that does not diverge, nor any smaller one.
        grid: The values of c, ascending. sharpness_grid: Those with a sharpness.
        has_barrier: Whether c_barrier was found, not set to c_max.
    """

    c_loss: float | None
    c_sharp: float | None
    c_barrier: float | None
    c_max: float | None
    grid: tuple[float, ...] = field(repr=False)
    sharpness_grid: tuple[float, ...] = field(repr=False)
    has_barrier: bool = field(repr=False)

    def bracket(self, name: str) -> tuple[float, float]:
        """The two values of c, neighbours on the grid, between which a constant lies; c_sharp on `sharpness_grid`.

        0 or infinity stands for an end beyond the grid.

        Args:
            name: "c_loss", "c_sharp", "c_barrier" or "c_max".
        """
        if name not in ("c_loss", "c_sharp", "c_barrier", "c_max"):
            raise ValueError(f"`name` is {name!r}; choose 'c_loss', 'c_sharp', 'c_barrier' or 'c_max'")
        value = getattr(self, name)
        grid = self.sharpness_grid if name == "c_sharp" else self.grid
        if value is None:
            return grid[-1] if grid else 0.0, math.inf
        i = grid.index(value)
        if name == "c_max" or (name == "c_barrier" and not self.has_barrier):
            return value, grid[i + 1] if i + 1 < len(grid) else math.inf
        return grid[i - 1] if i else 0.0, value


def critical_constants(runs: Sequence[EarlyRun], *, steps: int = 10, tolerance: float = 1e-3) -> CriticalConstants:
    r"""The critical constants of a scan over learning rates from the same initial weights.

    With T = `steps` and a tolerance ε for the error of what was measured:

        c_loss    = smallest c with max_{1≤t≤T} L_t / L_0 > 1 + ε
        c_sharp   = smallest c with max_{1≤t≤T} λ_t / λ_0 > 1 + ε
        c_barrier = smallest c with a loss above (1 + ε) L_0 on the segment θ_0 → θ_T; c_max if there is none
        c_max     = largest c below which nothing diverges

    Each is a value of the grid; see `CriticalConstants.bracket` for what the grid leaves open.

    Args:
        runs: In any order, no two with the same c. L_0 and λ_0 are those of each run itself.
        steps: T >= 1.
        tolerance: ε >= 0, relative to the first value.

    Raises:
        ValueError: No runs, two with the same c, a run shorter than `steps` that did not diverge, a first loss or
            sharpness that is not positive, divergence at the smallest c, an empty path, or a run without sharpness
            (path) below c_sharp (c_barrier) where others have one. A run that diverged may have none.

    Source: Kalra and Barkeshli, Phase diagram of early training dynamics in deep neural networks, 2023; they
    have ε = 0.
    """
    ordered = sorted(runs, key=lambda run: run.c)
    _check(ordered, steps, tolerance)
    over = 1 + tolerance
    grid = tuple(run.c for run in ordered)
    c_loss = _first(ordered, lambda run: _rise(_stopped(run.loss), steps) > over or len(run.loss) <= steps)
    measured = [run for run in ordered if _is_measured(run, steps)]
    c_sharp = _first(measured, lambda run: run.sharpness is not None and _rise(run.sharpness, steps) > over)
    finite = [run for run in ordered if run in measured or not _diverged(run)]
    _check_known("sharpness", {run.c: run if run in measured else None for run in finite}, c_sharp)
    c_diverged = _first(ordered, _diverged)
    stable = [run.c for run in ordered if c_diverged is None or run.c < c_diverged]
    c_max = None if c_diverged is None else stable[-1]
    paths = {run.c: run.path for run in ordered if run.c in stable}
    c_barrier = _first(
        [run for run in ordered if run.c in stable],
        lambda run: run.path is not None and max(_stopped(run.path)) > over * run.loss[0],
    )
    _check_known("path", paths, c_barrier)
    has_paths = any(path is not None for path in paths.values())
    return CriticalConstants(
        c_loss,
        c_sharp,
        c_max if has_paths and c_barrier is None else c_barrier,
        c_max,
        grid,
        tuple(run.c for run in measured),
        has_barrier=c_barrier is not None,
    )


def _check(runs: Sequence[EarlyRun], steps: int, tolerance: float) -> None:
    """`runs` ascend in c."""
    if not runs:
        raise ValueError("`runs` is empty; give an EarlyRun for each learning rate")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"`steps` is {steps!r}; give a whole number of steps, 1 or more")
    if not (is_number(tolerance) and tolerance >= 0):
        raise ValueError(f"`tolerance` is {tolerance!r}; give a relative error, 0 or more")
    for run, other in itertools.pairwise(runs):
        if run.c == other.c:
            raise ValueError(f"`runs` has two runs at c = {run.c:g}; give one for each learning rate")
    if _diverged(runs[0]):
        raise ValueError(f"the run at the smallest c = {runs[0].c:g} diverges; begin the grid lower")
    for run in runs:
        if not 0 < run.c < math.inf:
            raise ValueError(f"`runs` has c = {run.c}; c = η λ_0 is positive")
        for name, values in (("loss", run.loss), ("sharpness", run.sharpness)):
            if values is None:
                continue
            if len(values) == 0 or not 0 < values[0] < math.inf:
                first = values[0] if len(values) else "missing"
                raise ValueError(f"the first {name} at c = {run.c:g} is {first}; it must be positive and finite")
            if len(values) <= steps and not _diverged(run):
                raise ValueError(
                    f"the run at c = {run.c:g} has a {name} after {len(values) - 1} steps only; give {steps}, "
                    "or set `diverged`"
                )
        if run.path is not None and len(run.path) == 0:
            raise ValueError(f"the path at c = {run.c:g} is empty; give the loss along it, or None")


def _diverged(run: EarlyRun) -> bool:
    return run.diverged or not all(math.isfinite(v) for v in run.loss)


def _is_measured(run: EarlyRun, steps: int) -> bool:
    """Whether the sharpness is known after one of the first steps."""
    return run.sharpness is not None and any(math.isfinite(v) for v in run.sharpness[1 : steps + 1])


def _check_known(name: str, known: Mapping[float, object], crossing: float | None) -> None:
    """What is measured at some learning rates must be measured at all below the crossing."""
    missing = [c for c, values in known.items() if values is None]
    if len(missing) < len(known) and missing and (crossing is None or missing[0] < crossing):
        raise ValueError(
            f"`runs` has no {name} at c = {missing[0]:g}, below the first rise; give it there, or for none of the runs"
        )


def _stopped(values: Sequence[float]) -> Sequence[float]:
    """A loss that is not a number has overflowed."""
    return [math.inf if math.isnan(v) else v for v in values]


def _rise(values: Sequence[float], steps: int) -> float:
    """max_{1≤t≤T} v_t / v_0 of what was measured."""
    return max((v for v in values[1 : steps + 1] if not math.isnan(v)), default=-math.inf) / values[0]


def _first(runs: Sequence[EarlyRun], crossed: Callable[[EarlyRun], bool]) -> float | None:
    return next((run.c for run in runs if crossed(run)), None)
