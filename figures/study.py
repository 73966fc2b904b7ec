"""The curves of a study."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from ..dynamics.studies.result import Heat, Line, Panel, StudyResult
from .style import BAND_ALPHA, COLORS, DASHES, GREY, HEAT, HOUSE, MARKERS, color_bar, dress, end_label, log_axis, style

COLUMNS = 2
PANEL_SIZE = (3.6, 2.7)  # inches
CHARACTERS = 62  # of the caption, under one panel
TITLE = 40  # characters a line
SHORT_NAME = 10  # characters
FEW_CELLS = 8  # so many have a tick each
POINT, CLOUD = 2.0, 300  # size of dots where there are more than so many
MANY = 4  # more lines than these have a small legend


def study_figure(result: StudyResult) -> Axes:
    """One axes for each panel of the result, with its setting as caption.

    Returns:
        The first axes; its figure has them all.
    """
    if not result.panels:
        raise ValueError(f"`result` of study {result.name!r} has no panels; nothing can be drawn")
    import matplotlib.pyplot as plt

    columns = min(COLUMNS, len(result.panels))
    rows = math.ceil(len(result.panels) / columns)
    with style():
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(PANEL_SIZE[0] * columns, PANEL_SIZE[1] * rows + 0.5),
            layout="constrained",
            squeeze=False,
        )
        figure.set_gid(HOUSE)
        flat: Sequence[Axes] = list(axes.flat)
        for ax, panel in zip(flat, result.panels, strict=False):
            draw_panel(ax, panel)
        for ax in flat[len(result.panels) :]:
            ax.set_axis_off()
        figure.suptitle(result.title, fontsize=10)
        figure.supxlabel(textwrap.fill(result.setting, CHARACTERS * columns), fontsize=7, color=GREY)
    return flat[0]


def draw_panel(ax: Axes, panel: Panel) -> None:
    """Cells, lines with their bands over them, named levels, a legend where there is more than one line."""
    if panel.heat is not None:
        _cells(ax, panel, panel.heat)
    over_cells = panel.heat is not None
    for i, line in enumerate(panel.lines):
        _line(ax, line, i + over_cells, halo=over_cells)  # the first colour is that of the cells
    cells = [] if panel.heat is None else [panel.heat]
    if panel.x_log:
        _log(ax, "x", [source.x for source in (*panel.lines, *cells)])
    if panel.y_log:
        _log(ax, "y", [source.y for source in (*panel.lines, *cells)])
    for name, level in panel.levels.items():
        ax.axhline(level, color=GREY, linewidth=1.0, linestyle=(0, (4, 2)))
        if len(name) <= SHORT_NAME:
            end_label(ax, level, name, GREY)
        else:  # beside the axes it would take their width
            place = {"xycoords": ("axes fraction", "data"), "xytext": (-2, 2), "textcoords": "offset points"}
            ax.annotate(name, (1.0, level), **place, color=GREY, ha="right", va="bottom", fontsize=7)
    dress(ax, grid=None if panel.heat is not None else "y")
    ax.set(title=textwrap.fill(panel.title, TITLE), xlabel=panel.x_label, ylabel=panel.y_label)
    if len(panel.lines) > 1 or (panel.lines and panel.lines[0].label):
        small = len(panel.lines) > MANY or panel.heat is not None
        ax.legend(fontsize=6 if small else 8, frameon=True, framealpha=0.8, edgecolor="none", labelspacing=0.3)


def _line(ax: Axes, line: Line, i: int, *, halo: bool) -> None:
    x, y = np.asarray(line.x, dtype=float), np.asarray(line.y, dtype=float)
    color = COLORS[i % len(COLORS)]
    dash, marker = (cycle[(i + i // len(COLORS)) % len(cycle)] for cycle in (DASHES, MARKERS))  # no two alike
    if line.points:
        dots = {"marker": ".", "markersize": POINT} if len(x) > CLOUD else {"marker": marker, "markersize": 4.0}
        ax.plot(x, y, color=color, linestyle="none", markeredgewidth=0, label=line.label, **dots)
        return
    shown = marker if line.marker or len(x) == 1 else "none"  # one point makes no line
    effects = [withStroke(linewidth=3.5, foreground="white")] if halo else []
    look = {"color": color, "linestyle": dash, "marker": shown, "markersize": 3.5, "linewidth": 1.3}
    ax.plot(x, y, **look, label=line.label, path_effects=effects)
    if line.error is not None:
        error = np.asarray(line.error, dtype=float)
        ax.fill_between(x, y - error, y + error, color=color, alpha=BAND_ALPHA, linewidth=0)


def _cells(ax: Axes, panel: Panel, heat: Heat) -> None:
    values = np.array([[math.nan if v is None else v for v in row] for row in heat.values], dtype=float)
    edges = [_edges(heat.x, panel.x_log), _edges(heat.y, panel.y_log)]
    mesh = ax.pcolormesh(*edges, np.ma.masked_invalid(values), cmap=HEAT, norm="log" if heat.log else None)
    color_bar(ax, mesh, heat.label)
    for axis, centres, log in ((ax.xaxis, heat.x, panel.x_log), (ax.yaxis, heat.y, panel.y_log)):
        if len(centres) <= FEW_CELLS and not log:
            axis.set_ticks(list(centres))


def _edges(centres: Sequence[float], log: bool) -> np.ndarray:
    """Borders half way between neighbours, on the axis as it is drawn."""
    x = np.asarray(centres, dtype=float)
    x = np.log(x) if log else x
    if len(x) == 1:
        edges = np.array([x[0] - 0.5, x[0] + 0.5])
    else:
        middle = (x[1:] + x[:-1]) / 2
        edges = np.concatenate([[2 * x[0] - middle[0]], middle, [2 * x[-1] - middle[-1]]])
    return np.exp(edges) if log else edges


def _log(ax: Axes, which: str, data: list[Sequence[float]]) -> None:
    values = np.concatenate([np.asarray(one, dtype=float) for one in data]) if data else np.zeros(0)
    values = values[np.isfinite(values) & (values > 0)]
    if len(values):
        log_axis(ax.xaxis if which == "x" else ax.yaxis, values.min(), values.max())
