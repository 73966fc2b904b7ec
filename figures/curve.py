"""One measured number along a run, and how every figure draws it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from .style import BAND_ALPHA

if TYPE_CHECKING:
    import pandas as pd

    from ..dynamics.trajectory import Trajectory

# Beyond this many points markers would merge into a thick line; points that did not converge keep theirs.
MAX_MARKERS = 40


class Curve(NamedTuple):
    """One quantity of one block along the run, each [k]; what is not finite is NaN."""

    steps: np.ndarray
    values: np.ndarray
    errors: np.ndarray
    converged: np.ndarray

    def part(self, chosen: np.ndarray) -> Curve:
        """The points where `chosen` [k] is true."""
        return Curve(*(column[chosen] for column in self))


class Look(NamedTuple):
    """Colour, dash, marker, width in points and opacity of a line; without a marker only what is hollow has one."""

    color: str
    dash: Any = "-"
    marker: str = "o"
    width: float = 1.2
    alpha: float = 1.0
    band_alpha: float = BAND_ALPHA


def curve(table: pd.DataFrame, quantity: str, block: str = "", index: int = 0) -> Curve | None:
    """The rows of a trajectory's table that make one line; None where there are none."""
    rows = table[(table["quantity"] == quantity) & (table["block"] == block) & (table["index"] == index)]
    if rows.empty:
        return None
    values, errors = (np.array(rows[name], dtype=float) for name in ("value", "error"))
    values[~np.isfinite(values)] = np.nan
    errors[~np.isfinite(errors)] = np.nan
    return Curve(np.array(rows["step"]), values, errors, np.array(rows["converged"], dtype=bool))


def missing(trajectory: Trajectory, quantity: str, cure: str) -> ValueError:
    """The error for a trajectory without `quantity`, naming what it has."""
    known = ", ".join(repr(name) for name in trajectory.quantities()) or "nothing yet"
    return ValueError(f"`trajectory` has no {quantity!r} to draw; it has {known}: {cure}")


def draw_curve(
    ax: Axes,
    one: Curve,
    look: Look,
    gid: str,
    name: str | None,
    *,
    band: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:
    """A line with its band and markers where they fit; what did not converge is hollow, with an error bar.

    Args:
        gid: Of the line; its band and its hollow markers have it with "-band" and "-open".
        name: In a legend.
        band: Lower and upper end [k]; None is ± the errors.
    """
    lower, upper = (one.values - one.errors, one.values + one.errors) if band is None else band
    dots: dict[str, Any] = {"color": look.color, "marker": look.marker or "o", "linestyle": "none", "label": "_"}
    ax.plot(
        one.steps,
        one.values,
        color=look.color,
        linestyle=look.dash,
        linewidth=look.width,
        alpha=look.alpha,
        gid=gid,
        label=name or "_",
    )
    sure = one.converged
    if len(one.steps) <= MAX_MARKERS and look.marker:
        ax.plot(one.steps[sure], one.values[sure], markersize=3, **dots)
    if look.band_alpha:
        fill = {"color": look.color, "alpha": look.band_alpha, "linewidth": 0, "gid": f"{gid}-band"}
        ax.fill_between(one.steps[sure], lower[sure], upper[sure], **fill)
        if sure.sum() == 1:  # a band has no width there
            ax.vlines(one.steps[sure], lower[sure], upper[sure], color=look.color, linewidth=0.8, gid=f"{gid}-bar")
    if not sure.all():
        unsure = one.part(~sure)
        bars = ax.errorbar(
            unsure.steps,
            unsure.values,
            unsure.errors,
            elinewidth=0.8,
            markersize=4.5,
            markerfacecolor="white",
            markeredgewidth=1.0,
            zorder=3,
            **dots,
        )
        bars.lines[0].set_gid(f"{gid}-open")
