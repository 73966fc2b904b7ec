"""Colours, line styles and sizes shared by every figure, and the context that applies them.

Lines differ in colour and in dash or marker, areas in lightness or hatching, so that a figure survives colour
blindness and a grey print. Nothing here changes matplotlib's global settings.

Source of the palette: Okabe and Ito, Color Universal Design, 2008.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from os import PathLike, fspath
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLACK, GREY = "#000000", "#6E6E6E"
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"

# Neighbours differ in lightness as well; yellow is left out, it vanishes on white paper.
COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, BLACK)
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

BAND_ALPHA = 0.22
DPI = 200
SETTINGS: dict[str, Any] = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "axes.linewidth": 0.7,
    "axes.edgecolor": "#333333",
    "axes.labelcolor": "#111111",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "xtick.labelcolor": "#111111",
    "ytick.labelcolor": "#111111",
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.minor.size": 1.6,
    "ytick.minor.size": 1.6,
    "xtick.minor.width": 0.5,
    "ytick.minor.width": 0.5,
    "figure.dpi": 120,
    "savefig.dpi": DPI,
    "pdf.fonttype": 42,  # TrueType: text stays text, and journals accept it
    "ps.fonttype": 42,
    "svg.fonttype": "path",  # looks the same where the font is missing
}


def style() -> AbstractContextManager[None]:
    """The house settings for the length of a `with` block; afterwards matplotlib's are as before."""
    return mpl.rc_context(SETTINGS)


@contextmanager
def canvas(ax: Axes | None, size: tuple[float, float]) -> Iterator[Axes]:
    """A given `ax` under its owner's settings, or a new figure's [width, height in inches] in the house style."""
    if ax is None:
        import matplotlib.pyplot as plt

        with style():
            yield plt.subplots(figsize=size, layout="constrained")[1]
    elif isinstance(ax, Axes):
        yield ax
    else:
        raise TypeError(f"`ax` is a {type(ax).__name__}; pass one matplotlib Axes, or None for a new figure")


def dress(ax: Axes, *, grid: str | None = "y") -> None:
    """Two spines and a faint grid under the data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    if grid is not None:
        ax.grid(True, axis=grid, color="#D9D9D9", linewidth=0.5)  # type: ignore[arg-type]


def end_label(ax: Axes, y: float, text: str, color: str) -> None:
    """`text` beside the right end of the axes at height `y`, so that the line needs no legend entry."""
    ax.annotate(
        text,
        (1.0, y),
        xytext=(4, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        color=color,
        va="center",
        ha="left",
        annotation_clip=False,
    )


def save(ax: Axes, *paths: str | PathLike[str], close: bool = True) -> None:
    """Writes the figure of `ax` to every path (.png, .pdf, .svg) at print resolution with embedded fonts.

    Args:
        ax: As returned by a figure function.
        paths: The ending chooses the format.
        close: Release the figure afterwards, so that a loop over many runs does not pile them up.
    """
    if not paths:
        raise ValueError("`paths` is empty; give at least one file name, such as 'sharpness.png'")
    figure = ax.get_figure(root=True)
    if not isinstance(figure, Figure):
        raise ValueError("`ax` belongs to no figure: it has been removed or its figure cleared")
    with style():
        for path in paths:
            figure.savefig(fspath(path), dpi=DPI)
    if close:
        import matplotlib.pyplot as plt

        plt.close(figure)
