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
from matplotlib.axis import XAxis, YAxis
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from mpl_toolkits.axes_grid1 import make_axes_locatable

BLACK, GREY = "#000000", "#6E6E6E"
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"

# Neighbours differ in lightness as well; yellow is left out, it vanishes on white paper.
COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, BLACK)
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (6, 1.5, 1, 1.5)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (8, 3)),
    (0, (1, 1)),
    (0, (1, 3)),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

# Shades from paper white to ink, darkening all the way.
HEAT = LinearSegmentedColormap.from_list("ink", ["#E8F1F8", "#8CC1E3", BLUE, "#00385C", "#001522"])

BAND_ALPHA = 0.22
HOUSE = "sharpscope"  # marks the figures made here, so that what is added to them later looks the same
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
    "figure.constrained_layout.w_pad": 0.06,
    "figure.constrained_layout.h_pad": 0.06,
    "savefig.dpi": DPI,
    "pdf.fonttype": 42,  # TrueType: text stays text, and journals accept it
    "ps.fonttype": 42,
    "svg.fonttype": "path",  # looks the same where the font is missing
}


def style() -> AbstractContextManager[None]:
    """The house settings for the length of a `with` block; afterwards matplotlib's are as before."""
    return mpl.rc_context(SETTINGS)  # type: ignore[arg-type]


@contextmanager
def canvas(ax: Axes | None, size: tuple[float, float]) -> Iterator[Axes]:
    """A given `ax` under its owner's settings, or a new figure's [width, height in inches] in the house style."""
    if ax is None:
        import matplotlib.pyplot as plt

        with style():
            figure, ax = plt.subplots(figsize=size, layout="constrained")
            figure.set_gid(HOUSE)
            yield ax
    elif not isinstance(ax, Axes):
        raise TypeError(f"`ax` is a {type(ax).__name__}; pass one matplotlib Axes, or None for a new figure")
    elif ax.figure.get_gid() == HOUSE:
        with style():
            yield ax
    else:
        yield ax


def dress(ax: Axes, *, grid: str | None = "y") -> None:
    """Two spines and a faint grid under the data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    if grid is not None:
        ax.grid(True, axis=grid, color="#D9D9D9", linewidth=0.5)  # type: ignore[arg-type]


def end_label(ax: Axes, y: float, text: str, color: Any) -> Annotation:
    """`text` beside the right end of the axes at height `y`, so that the line needs no legend entry."""
    return ax.annotate(
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


def log_axis(axis: XAxis | YAxis, low: float, high: float) -> None:
    """A logarithmic axis with ticks that suit data from `low` to `high`: 1, 2, 5 or, in a long range, decades."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    short = high < 40 * low
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if short else (1.0,), numticks=8))
    axis.set_major_formatter(FuncFormatter(plain_or_power))
    axis.set_minor_formatter(NullFormatter())


def plain_or_power(x: float, position: int | None = None) -> str:
    """0.05 or 200 as they are read, 2×10⁻⁵ beyond."""
    if x == 0 or 1e-3 <= abs(x) < 1e4:
        return f"{x:g}"
    mantissa, exponent = f"{x:.4e}".split("e")
    factor = "" if abs(float(mantissa)) == 1 else rf"{abs(float(mantissa)):g}\times"
    return rf"${'-' if x < 0 else ''}{factor}10^{{{int(exponent)}}}$"


def append_axes(ax: Axes, side: str, size: str, pad: float, **options: Any) -> Axes:
    """New axes that take a strip of the place of `ax`, in any figure and under any layout engine."""
    strip = make_axes_locatable(ax).append_axes(side, size=size, pad=pad, **options)
    if (spec := ax.get_subplotspec()) is not None:
        strip.set_subplotspec(spec)  # so that layout engines leave room for its labels
    return strip


def color_bar(ax: Axes, mappable: ScalarMappable, label: str) -> Colorbar:
    """A slim colour bar on the right."""
    bar = ax.figure.colorbar(mappable, cax=append_axes(ax, "right", "3%", 0.08))
    bar.outline.set_linewidth(0.5)  # type: ignore[operator]
    bar.set_label(label)
    return bar


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
