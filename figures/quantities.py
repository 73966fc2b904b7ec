"""Every measured quantity along a run, one panel each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..dynamics.trajectory import Trajectory
from .curve import Curve, draw_curve
from .quantity_panels import DECADE, Panel, panels_of
from .style import GREY, HOUSE, VERMILION, canvas, dress, log_axis, plain_or_power, style
from .trajectory import FAR_ABOVE, threshold_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Quantities whose panels stand in one row of the grid where they fit.
FAMILIES = ("gradient_alignment", "coherence", "heterogeneity", "codec_error", "block")
CURVATURE = "loss / parameter²"
UNITS = {
    "loss": "loss",
    "sam_sharpness": "loss",
    "average_sharpness": "loss",
    "sharpness": CURVATURE,
    "bottom_eigenvalue": CURVATURE,
    "density": "mean λ\n(loss / parameter²)",
    "block_sharpness": CURVATURE,
    "batch_sharpness": CURVATURE,
    "stability_threshold": CURVATURE,
    "sam_edge": CURVATURE,
    "gradient_curvature": CURVATURE,
    "update_curvature": CURVATURE,
    "trace": CURVATURE,
    "coherence_lambda1": CURVATURE,
    "coherence_lambda1_S": CURVATURE,
    "coherence_max_lambda1": CURVATURE,
    "coherence_lr": "learning rate",
    "gradient_norm": "loss / parameter",
    "coherence_gradient_norm": "loss / parameter",
    "gradient_alignment_confusion": "(loss / parameter)²",
    "noise_scale": "examples",
    "heterogeneity": "nats",
    "heterogeneity_max": "nats",
    "heterogeneity_linear": "nats",
    "heterogeneity_scale_spread": "decades",
    "optimizer_state_bytes": "bytes",
}
# The ratio is 1 at the edge of stability.
LEVELS = {"threshold_ratio": ("edge", 1.0)}
WHITE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
NOTE: dict[str, Any] = {"color": GREY, "fontsize": "x-small", "bbox": WHITE, "gid": "note"}
MOST_LETTERS = 24
CELL_WIDTHS = {1: 4.6, 2: 3.0, 3: 2.5}  # inches, by the number of columns
NARROWEST, CELL_HEIGHT = 2.15, 1.55


def quantities(
    trajectory: Trajectory,
    ax: Axes | None = None,
    *,
    names: Sequence[str] | None = None,
    columns: int | None = None,
) -> Axes:
    r"""What was measured against the training step, one panel for each quantity.

    A line with its band is the whole model. The band is ± the recorded error, or from NAME_low to NAME_high where both
    were recorded; a hollow marker is a value that had not converged. Quantities with rows for blocks have up to seven
    named lines, with the blocks spread evenly over the order of their last values, the highest and the lowest among
    them; other blocks are thin and grey. Positive values over more than a decade have a logarithmic axis. What is not
    finite is left out, and the panel says how often; an interval without an upper end reaches the edge of the panel.
    "batch_sharpness" and "sharpness" have the "stability_threshold" as a level, learning rates of one measurement share
    a panel, and quantities of one measurement a row of the grid.

    Args:
        trajectory: With any quantity.
        ax: Where to draw, for `names` that make one panel; None makes a figure.
        names: Quantities, in the order of drawing; None is all but the monitor's own "cadence" and "skipped".
        columns: Of the grid; None chooses, at most four.

    Returns:
        The first panel; its figure has them all.

    Raises:
        ValueError: nothing measured, an unknown name, an `ax` for several panels.
    """
    if columns is not None and columns < 1:
        raise ValueError(f"`columns` is {columns}; the grid needs at least one")
    panels = panels_of(trajectory, names)
    if not panels:
        known = ", ".join(trajectory.quantities()) or "nothing"
        raise ValueError(
            f"`trajectory` has no quantity to draw; it holds {known}: add measurements to its monitor, such as Loss()"
            if names is None
            else "`names` is empty; name quantities, or leave it out to draw all"
        )
    if ax is not None:
        if len(panels) > 1:
            raise ValueError(
                f"`ax` is one Axes, and there are {len(panels)} panels ({', '.join(p.name for p in panels)}); give one "
                "of `names`, or no `ax`"
            )
        with canvas(ax, (5.6, 3.2)) as ax:
            _draw(ax, panels[0], trajectory, legend=ax)
            ax.set_xlabel("Training step")
        return ax
    import matplotlib.pyplot as plt

    across = columns or min(4, sum(panel.width for panel in panels))
    rows = _packed(panels, across)
    across = min(across, max(_width(row, across) for row in rows))
    width = CELL_WIDTHS.get(across, NARROWEST) * across
    with style():
        figure = plt.figure(figsize=(width, (3.0 if across == 1 else CELL_HEIGHT) * len(rows) + 0.3))
        figure.set_layout_engine("constrained")
        figure.set_gid(HOUSE)
        return _grid(figure, rows, across, trajectory)


def _packed(panels: list[Panel], across: int) -> list[list[Panel]]:
    """The panels in rows of `across` cells: families in one row where they fit, each in the first row with room."""
    families: dict[str, list[Panel]] = {}
    for panel in panels:
        families.setdefault(_family(panel.name), []).append(panel)
    rows: list[list[Panel]] = []
    for family in families.values():
        group: list[Panel] = []
        for panel in [*family, None]:
            if panel is None or _width([*group, panel], across) > across:
                row = next((row for row in rows if _width([*row, *group], across) <= across), None)
                if row is None:
                    rows.append(row := [])
                row.extend(group)
                group = []
            if panel is not None:
                group.append(panel)
    return rows


def _family(name: str) -> str:
    return next((family for family in FAMILIES if name == family or name.startswith(f"{family}_")), name)


def _width(panels: Sequence[Panel], across: int) -> int:
    return sum(min(panel.width, across) for panel in panels)


def _grid(figure: Figure, rows: list[list[Panel]], across: int, trajectory: Trajectory) -> Axes:
    cells = figure.add_gridspec(len(rows), across)
    lowest: dict[int, Axes] = {}
    first: Axes | None = None
    for i, row in enumerate(rows):
        column = 0
        for panel in row:
            ax = figure.add_subplot(cells[i, column], sharex=first)
            first = first or ax
            legend = ax
            if panel.width == 2 and across > 1:  # the names stand in the cell beside it
                legend = figure.add_subplot(cells[i, column + 1])
                legend.set_axis_off()
            _draw(ax, panel, trajectory, legend=legend)
            ax.tick_params(labelbottom=False)
            lowest[column] = ax
            column += min(panel.width, across)
    for ax in lowest.values():
        ax.tick_params(labelbottom=True)
        ax.set_xlabel("Training step", fontsize="small")
    assert first is not None
    return first


def _draw(ax: Axes, panel: Panel, trajectory: Trajectory, *, legend: Axes) -> None:
    """One panel, and the names of its lines in `legend`."""
    bottom, top = _limits(panel)
    for i, line in enumerate(panel.lines):
        band = np.clip(line.lower, bottom, top), np.clip(line.upper, bottom, top)
        draw_curve(ax, line.curve, line.look, f"{panel.name}-{i}", line.name, band=band)
    dress(ax)
    ax.margins(x=0.04)
    if panel.is_log:
        log_axis(ax.yaxis, bottom, top)
    else:
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        ax.yaxis.set_major_formatter(FuncFormatter(plain_or_power))
    ax.set_ylim(bottom, top)
    if panel.threshold is not None:
        _level(ax, panel.threshold, threshold_name(trajectory, panel.threshold).replace("\n", " "))
    elif panel.name in LEVELS:
        name, y = LEVELS[panel.name]
        level = np.full(len(panel.lines[0].curve.steps), y)
        _level(ax, Curve(panel.lines[0].curve.steps, level, level, level > 0), name)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10]))
    ax.tick_params(labelsize="x-small", length=2)
    ax.set_title(_broken(panel.name), loc="left", fontsize="small", pad=3)
    if panel.name in UNITS:
        ax.set_ylabel(UNITS[panel.name], fontsize="x-small")
    _note(ax, panel)
    _legend(panel, ax, legend)


def _limits(panel: Panel) -> tuple[float, float]:
    """The ends of the panel: bands are followed for as long again as the values reach, or for a decade."""
    values = np.concatenate([line.curve.values for line in panel.lines])
    values = values[np.isfinite(values)]
    bands = np.concatenate([end for line in panel.lines if line.look.band_alpha for end in (line.lower, line.upper)])
    bands = bands[np.isfinite(bands)]
    if not len(values):
        return 0.0, 1.0
    if panel.threshold is not None:
        levels = panel.threshold.values
        values = np.append(values, levels[(levels <= FAR_ABOVE * values.max()) & (levels > 0)])
    low, high = float(values.min()), float(values.max())
    if panel.is_log:
        above = bands[bands > 0]
        low, high = max(min([low, *above]), low / DECADE), min(max([high, *above]), high * DECADE)
        room = (high / low) ** 0.06
        return low / room, high * room
    reach = high - low or math.inf
    low, high = max(min([low, *bands]), low - reach), min(max([high, *bands]), high + reach)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    return low - room, high + room


def _level(ax: Axes, level: Curve, name: str) -> None:
    """A dashed line with its name at the left end, or only the name where it lies far above."""
    finite = level.values[np.isfinite(level.values)]
    if not len(finite):
        return
    look: dict[str, Any] = {"color": VERMILION, "fontsize": "x-small", "bbox": WHITE, "gid": "level-name"}
    if finite.min() > ax.get_ylim()[1]:
        text = rf"{name} = {finite[-1]:.4g} $\uparrow$"
        ax.text(0.98, 0.97, text, transform=ax.transAxes, ha="right", va="top", **look)
        return
    ax.plot(
        level.steps,
        level.values,
        color=VERMILION,
        linewidth=1.0,
        linestyle=(0, (4, 2)),
        drawstyle="steps-post",
        gid="level",
    )
    y = float(finite[0])
    under = _share_of_height(ax, y) > 0.75
    place: dict[str, Any] = {
        "xycoords": ("axes fraction", "data"),
        "xytext": (2, -2 if under else 2),
        "textcoords": "offset points",
    }
    ax.annotate(name, (0.0, y), ha="left", va="top" if under else "bottom", **place, **look)


def _note(ax: Axes, panel: Panel) -> None:
    """How many values cannot be drawn, at the right end where the lines are not."""
    values = np.concatenate([line.curve.values for line in panel.lines])
    wrong = int((~np.isfinite(values)).sum())
    if wrong == len(values):
        ax.set_yticks([])
        ax.text(0.5, 0.5, f"none of {wrong} finite", ha="center", va="center", transform=ax.transAxes, **NOTE)
    elif wrong:
        known = panel.lines[-1].curve.values
        last = known[np.isfinite(known)][-1:]
        high = len(last) > 0 and _share_of_height(ax, float(last[0])) > 0.5
        named = any(text.get_gid() == "level-name" for text in ax.texts)
        y, va = (0.03, "bottom") if high or named else (0.97, "top")
        text = f"{wrong} of {len(values)} not finite"
        ax.text(0.98, y, text, ha="right", va=va, transform=ax.transAxes, **NOTE)


def _legend(panel: Panel, ax: Axes, place: Axes) -> None:
    handles, names = ax.get_legend_handles_labels()
    if panel.others:
        rest = next(line for line in ax.lines if line.get_color() == GREY)
        handles, names = [*handles, rest], [*names, f"{panel.others} more"]
    hollow = [line for line in ax.lines if (line.get_gid() or "").endswith("-open") and _is_seen(line)]
    if hollow:
        handles, names = [*handles, hollow[0]], [*names, "not converged"]
    if handles:
        beside: dict[str, Any] = (
            {} if place is ax else {"loc": "center left", "bbox_to_anchor": (0.0, 0.5), "borderaxespad": 0.0}
        )
        place.legend(handles, names, frameon=False, fontsize="x-small", handlelength=2.0, **beside)


def _is_seen(line: Line2D) -> bool:
    return bool(np.isfinite(np.asarray(line.get_ydata(), dtype=float)).any())


def _share_of_height(ax: Axes, y: float) -> float:
    """Where `y` lies: 0 at the bottom of the axes, 1 at the top."""
    return float(ax.transAxes.inverted().transform(ax.transData.transform((0.0, y)))[1])


def _broken(name: str) -> str:
    """A long name on two lines."""
    cut = name.rfind("_", 0, MOST_LETTERS) + 1
    return name if len(name) <= MOST_LETTERS or not cut else f"{name[:cut]}\n{name[cut:]}"
