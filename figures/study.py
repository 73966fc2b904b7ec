"""The curves of a study."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from ..dynamics.studies.result import Line, Panel, StudyResult
from .style import BAND_ALPHA, COLORS, DASHES, GREY, HOUSE, MARKERS, dress, end_label, log_axis, style

COLUMNS = 2
PANEL_SIZE = (3.6, 2.7)  # inches
CHARACTERS = 62  # of the caption, under one panel
TITLE = 40  # characters a line
MANY = 4  # more lines than these have a small legend that may lie over them


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
    """Lines with their bands, named levels, a legend where there is more than one line."""
    for i, line in enumerate(panel.lines):
        _line(ax, line, i)
    if panel.x_log:
        _log(ax, "x", [line.x for line in panel.lines])
    if panel.y_log:
        _log(ax, "y", [line.y for line in panel.lines])
    for name, level in panel.levels.items():
        ax.axhline(level, color=GREY, linewidth=1.0, linestyle=(0, (4, 2)))
        end_label(ax, level, name, GREY)
    dress(ax)
    ax.set(title=textwrap.fill(panel.title, TITLE), xlabel=panel.x_label, ylabel=panel.y_label)
    if len(panel.lines) > 1 or (panel.lines and panel.lines[0].label):
        many = len(panel.lines) > MANY
        ax.legend(fontsize=6 if many else 8, frameon=many, framealpha=0.85, edgecolor="none", labelspacing=0.3)


def _line(ax: Axes, line: Line, i: int) -> None:
    x, y = np.asarray(line.x, dtype=float), np.asarray(line.y, dtype=float)
    color, dash, marker = (cycle[i % len(cycle)] for cycle in (COLORS, DASHES, MARKERS))
    shown = marker if line.marker or len(x) == 1 else "none"  # one point makes no line
    ax.plot(x, y, color=color, linestyle=dash, marker=shown, markersize=3.5, linewidth=1.3, label=line.label)
    if line.error is not None:
        error = np.asarray(line.error, dtype=float)
        ax.fill_between(x, y - error, y + error, color=color, alpha=BAND_ALPHA, linewidth=0)


def _log(ax: Axes, which: str, data: list[Sequence[float]]) -> None:
    values = np.concatenate([np.asarray(one, dtype=float) for one in data]) if data else np.zeros(0)
    values = values[np.isfinite(values) & (values > 0)]
    if len(values):
        log_axis(ax.xaxis if which == "x" else ax.yaxis, values.min(), values.max())
