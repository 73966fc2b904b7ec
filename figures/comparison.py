"""Runs with several optimizers in one figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..dynamics.trajectory import Trajectory
from .curve import Curve, curve
from .style import BAND_ALPHA, COLORS, DASHES, GREY, HOUSE, dress, end_label, log_axis, style

LEGEND_WIDTH, HANDLE_WIDTH = 88, 8  # characters
LINEAR = 3.0  # a ratio that goes further above the edge, as that of Adam's first step may, has a logarithmic axis


class Quantity(NamedTuple):
    """What a row of the figure shows."""

    name: str
    label: str
    log: bool
    level: tuple[str, float] | None = None


QUANTITIES = (
    Quantity("loss", "Loss", True),
    Quantity("sharpness", "Sharpness\n(loss / parameter²)", True),
    Quantity("preconditioned_sharpness", "Preconditioned\nsharpness", True),
    Quantity("threshold_ratio", "Preconditioned\nsharpness / threshold", False, ("edge", 1.0)),
)


def comparison(runs: Mapping[str, Trajectory]) -> Axes:
    """Loss, sharpness and the ratio to the stability threshold of each run, one line each, one row a quantity.

    Rows appear for what at least one run has recorded. The ratio is 1 at the edge of stability of every optimizer,
    whatever its geometry.

    Returns:
        The first axes; its figure has them all.
    """
    if not runs:
        raise ValueError("`runs` is empty; give trajectories by label")
    tables = {label: trajectory.to_pandas() for label, trajectory in runs.items()}
    found = {q: {label: c for label, t in tables.items() if (c := curve(t, q.name)) is not None} for q in QUANTITIES}
    shown = {quantity: curves for quantity, curves in found.items() if curves}
    if not shown:
        known = ", ".join(quantity.name for quantity in QUANTITIES)
        raise ValueError(f"`runs` have none of {known}; measure at least one of them")
    import matplotlib.pyplot as plt

    with style():
        figure, axes = plt.subplots(
            len(shown), 1, sharex=True, squeeze=False, layout="constrained", figsize=(6.2, 1.0 + 1.7 * len(shown))
        )
        figure.set_gid(HOUSE)
        looks = {label: (COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]) for i, label in enumerate(runs)}
        for ax, (quantity, curves) in zip(axes.flat, shown.items(), strict=True):
            for label, one in curves.items():
                _draw(ax, one, label, *looks[label])
            _finish(ax, quantity, list(curves.values()))
        axes.flat[-1].set_xlabel("Training step")
        axes.flat[-1].xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
        handles = {line.get_label(): line for ax in axes.flat for line in ax.lines if line.get_label() in runs}
        columns = max(1, LEGEND_WIDTH // (max(map(len, handles)) + HANDLE_WIDTH))
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(columns, len(handles)))
    return axes.flat[0]


def _draw(ax: Axes, one: Curve, label: str, color: str, dash: object) -> None:
    ax.plot(one.steps, one.values, color=color, linestyle=dash, linewidth=1.3, label=label)  # type: ignore[arg-type]
    ax.fill_between(one.steps, one.values - one.errors, one.values + one.errors, color=color, alpha=BAND_ALPHA, lw=0)


def _finish(ax: Axes, quantity: Quantity, curves: list[Curve]) -> None:
    values = np.concatenate([one.values[np.isfinite(one.values)] for one in curves])
    dress(ax)
    ax.set_ylabel(quantity.label)
    positive = len(values) > 0 and values.min() > 0
    if positive and (quantity.log or values.max() > LINEAR * max(1.0, float(np.median(values)))):
        log_axis(ax.yaxis, values.min(), values.max())
    if quantity.level is not None:
        name, level = quantity.level
        ax.axhline(level, color=GREY, linewidth=1.0, linestyle=(0, (4, 2)))
        end_label(ax, level, name, GREY)
        if ax.get_yscale() == "linear":
            ax.set_ylim(bottom=0)


def stability(trajectory: Trajectory) -> Axes:
    """One run's loss, sharpness and ratio to the stability threshold; see `comparison`."""
    notes = trajectory.provenance.get("optimizer")
    name = str(notes.get("name", "run")) if isinstance(notes, dict) else "run"
    return comparison({name: trajectory})
