"""The spectra of the diagonal blocks side by side, and how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullLocator
from torch import Tensor

from ..dynamics.trajectory import Trajectory
from ..hessian.block_spectra import BlockSpectra
from ..hessian.block_spectrum import BlockSpectrum
from ..landscape.selection import near_names
from .curve import missing
from .style import BAND_ALPHA, BLUE, GREY, HEAT, VERMILION, canvas, color_bar

# Width of the smoothing on the logarithmic axis, in decades, as for the Jensen-Shannon divergence.
SIGMA = 0.1
# An eigenvalue alone in its block stands this many times above the floor of the panels.
ABOVE_FLOOR = 5.0
# Decades of |λ| that are drawn under the largest; float32 products resolve no more.
DECADES = 9
# Distances are written into the cells up to this many blocks.
MOST_NUMBERS = 14
MOST_PANELS = 200
MOST_LETTERS = 24
QUANTITY = "heterogeneity"  # under which the measurement BlockSpectra records its arrays
LARGEST_DISTANCE = math.sqrt(math.log(2))


class Panel(NamedTuple):
    """One block: nodes and weights [p, k] of p probes, or of one exact row; `size` coordinates."""

    name: str
    size: int
    nodes: np.ndarray
    weights: np.ndarray
    top: float
    converged: bool
    noise: float


def block_spectra_grid(
    source: BlockSpectra | Trajectory,
    ax: Axes | None = None,
    *,
    step: int | None = None,
    blocks: Sequence[str] | None = None,
    columns: int | None = None,
) -> Axes:
    r"""One panel for each block: its eigenvalues on a common logarithmic axis, positive ones up, negative ones down.

    The height is the share of the block's eigenvalues per decade of |λ|, itself logarithmic, so that blocks of
    different size and scale can be compared and a single outlier is seen. The band of a sampled block is ± one
    standard error over probes. The dot marks the largest eigenvalue, hollow where it had not converged.
    Eigenvalues that cannot be told from zero are given as a share.

    Args:
        source: A `BlockSpectra`, or a trajectory with the measurement of that name.
        ax: The place for the panels, which become its `child_axes`; None makes a figure that fits them.
        step: Of the trajectory; None is the last with spectra.
        blocks: Names, in the order of drawing; None is all.
        columns: Of the grid; None chooses, at most four.

    Returns:
        The axes around the panels, which carry the labels.
    """
    panels = _chosen(_panels(source, step), blocks)
    if columns is not None and columns < 1:
        raise ValueError(f"`columns` is {columns}; the grid needs at least one")
    across = min(columns or max(1, min(4, math.ceil(math.sqrt(len(panels) * 0.75)))), len(panels))
    down = math.ceil(len(panels) / across)
    low, high = _range(panels)
    grid = np.linspace(low, high, 400)
    curves = [_halves(panel, grid) for panel in panels]
    smallest = min(_lightest(panel) for panel in panels)
    floor = 10.0 ** math.floor(math.log10(smallest / (SIGMA * math.sqrt(2 * math.pi)) / ABOVE_FLOOR))
    highest = max(float((mean + band).max()) for halves in curves for mean, band in halves)
    height = 1.1 * math.log10(max(highest / floor, 10.0))
    with canvas(ax, (min(2.1 * across, 8.4) + 0.8, 1.15 * down + 0.7)) as ax:
        _empty(ax)
        for i, (panel, halves) in enumerate(zip(panels, curves, strict=True)):
            row, column = divmod(i, across)
            inset = ax.inset_axes(_place(row, column, down, across))
            _draw(inset, panel, grid, halves, floor, height)
            last = i + across >= len(panels)
            inset.tick_params(labelbottom=last, labelleft=column == 0)
        ax.set_xlabel("|λ| (loss / parameter²)", labelpad=18)
        marks = {p.converged for p in panels}
        dots = [
            Line2D([], [], label=name, **_dot(sure))
            for sure, name in ((True, "largest eigenvalue"), (False, "not converged"))
            if sure in marks
        ]
        place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2, "ncols": 2}
        ax.legend(handles=dots, frameon=False, fontsize="x-small", handletextpad=0.1, **place)
        ax.set_ylabel("Share of eigenvalues per decade\n(λ > 0 upwards, λ < 0 downwards)", labelpad=30)
    return ax


def js_heatmap(
    source: BlockSpectra | Trajectory,
    ax: Axes | None = None,
    *,
    step: int | None = None,
    axis: str = "log",
    sigma: float | None = None,
) -> Axes:
    r"""Jensen-Shannon distance between the spectra of all pairs of blocks: 0 is equal, √ln 2 = 0.83 is disjoint.

    Args:
        source: A `BlockSpectra`, or a trajectory with the measurement of that name.
        ax: Where to draw; None makes a figure. The colour bar takes a strip of its place.
        step: Of the trajectory; None is the last with spectra.
        axis, sigma: Of the spectra that are compared, as for `BlockSpectra.js_distance`; a trajectory holds the
            distances of the default ones.
    """
    if isinstance(source, BlockSpectra):
        _refuse_step(step)
        names, distance = list(source), source.js_distance(axis=axis, sigma=sigma).numpy()
    else:
        if axis != "log" or sigma is not None:
            raise ValueError("`axis` and `sigma` need a BlockSpectra; a trajectory holds distances already computed")
        _, arrays, names = _recorded(source, step)
        distance = arrays["js_divergence"].double().clamp(min=0).sqrt().numpy()
    size = min(max(0.42 * len(names), 2.0), 7.5)
    with canvas(ax, (size + 2.2, size + 1.2)) as ax:
        image = ax.imshow(distance, cmap=HEAT, vmin=0, vmax=LARGEST_DISTANCE, interpolation="nearest")
        image.set_gid("distance")
        small = "small" if len(names) <= 24 else "xx-small"
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=small)
        ax.set_yticks(range(len(names)), names, fontsize=small)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        if len(names) <= MOST_NUMBERS:
            for i, j in np.ndindex(distance.shape):
                ink = "white" if distance[i, j] > 0.4 * LARGEST_DISTANCE else "#222222"
                ax.text(j, i, f"{distance[i, j]:.2f}", ha="center", va="center", color=ink, fontsize="x-small")
        color_bar(ax, image, "Jensen-Shannon distance (√nat)")
    return ax


def _panels(source: BlockSpectra | Trajectory, step: int | None) -> list[Panel]:
    if isinstance(source, BlockSpectra):
        _refuse_step(step)
        return [
            Panel(
                name,
                spectrum.size,
                *_rows(spectrum),
                top=float(spectrum.top[0]),
                converged=spectrum.converged,
                noise=spectrum.noise,
            )
            for name, spectrum in source.items()
        ]
    at, arrays, names = _recorded(source, step)
    table = source.to_pandas()
    here = table[(table["quantity"] == "block_sharpness") & (table["step"] == at)]
    tops = {
        name: (value, sure) for name, value, sure in zip(here["block"], here["value"], here["converged"], strict=True)
    }
    panels = []
    for name in names:
        nodes, weights = (torch.atleast_2d(arrays[f"{name}/{part}"]).double().numpy() for part in ("nodes", "weights"))
        size, noise = arrays[f"{name}/size_and_noise"].tolist()
        top, converged = tops[name]
        panels.append(Panel(name, int(size), nodes, weights, float(top), bool(converged), noise))
    return panels


def _refuse_step(step: int | None) -> None:
    if step is not None:
        raise ValueError(f"`step` is {step}, but `source` is one BlockSpectra; leave `step` out")


def _rows(spectrum: BlockSpectrum) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights [p, k], a row for each probe."""
    if spectrum.density is not None:
        return spectrum.density.nodes.numpy(), spectrum.density.weights.numpy()
    nodes, weights = spectrum.atoms()
    return nodes.numpy()[None], weights.numpy()[None]


def _recorded(source: Trajectory, step: int | None) -> tuple[int, dict[str, Tensor], list[str]]:
    """The step to draw, its arrays, and the blocks in their order."""
    if not isinstance(source, Trajectory):
        raise TypeError(f"`source` is a {type(source).__name__}; pass BlockSpectra or a Trajectory")
    if QUANTITY not in source.quantities():
        raise missing(source, QUANTITY, "add the measurement BlockSpectra() to the monitor")
    steps = source.array_steps(QUANTITY)
    if step is None and steps:
        step = steps[-1]
    if step is None or step not in steps:
        near = sorted(sorted(steps, key=lambda other: abs(other - (step or 0)))[:5])
        raise ValueError(f"`step` is {step}, where no block spectra were recorded; near it: {near}")
    arrays = source.arrays(step, QUANTITY)
    return step, arrays, [name for name in source.blocks("block_sharpness") if f"{name}/nodes" in arrays]


def _chosen(panels: list[Panel], blocks: Sequence[str] | None) -> list[Panel]:
    known = {panel.name: panel for panel in panels}
    for name in blocks or ():
        if name not in known:
            raise ValueError(f"`blocks` names {name!r}, which is no block here; near it: {near_names(name, known)}")
    chosen = panels if blocks is None else [known[name] for name in blocks]
    if not 1 <= len(chosen) <= MOST_PANELS:
        raise ValueError(f"`blocks` makes {len(chosen)} panels; name 1 to {MOST_PANELS} of the {len(panels)} blocks")
    return chosen


def _range(panels: list[Panel]) -> tuple[float, float]:
    """Limits of log10 |λ|: from what can be told from zero to a little above the largest."""
    sizes = [np.abs(p.nodes)[(np.abs(p.nodes) > p.noise) & (p.weights > 0)] for p in panels]
    everything = np.concatenate([size[size > 0] for size in sizes])
    if not len(everything):
        return -1.0, 1.0  # every block is zero
    high = math.log10(everything.max()) + 5 * SIGMA
    return max(math.log10(everything.min()) - 5 * SIGMA, high - DECADES), high


def _halves(panel: Panel, grid: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Density per decade of the positive and of the negative eigenvalues, mean and standard error [g] over probes."""
    halves = []
    for sign in (1, -1):
        rows = []
        for nodes, weights in zip(panel.nodes, panel.weights, strict=True):
            kept = (sign * nodes > panel.noise) & (weights > 0)
            distance = (grid[:, None] - np.log10(sign * nodes[kept])) / SIGMA  # [g, k]
            rows.append(np.exp(-(distance**2) / 2) @ weights[kept] / (SIGMA * math.sqrt(2 * math.pi)))
        spread = np.std(rows, axis=0, ddof=1) / math.sqrt(len(rows)) if len(rows) > 1 else np.zeros(len(grid))
        halves.append((np.mean(rows, axis=0), spread))
    return halves


def _lightest(panel: Panel) -> float:
    """The share of a single eigenvalue."""
    return 1 / panel.size


def _empty(ax: Axes) -> None:
    """Leaves of the axes only the labels."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.patch.set_visible(False)


def _place(row: int, column: int, down: int, across: int) -> tuple[float, float, float, float]:
    """Left, bottom, width and height of a panel, with its title above it."""
    width = (1 - 0.05 * (across - 1) / across) / across
    return column * (width + 0.05 / across), 1 - (row + 1) / down, width, 0.78 / down


def _draw(
    ax: Axes,
    panel: Panel,
    grid: np.ndarray,
    halves: list[tuple[np.ndarray, np.ndarray]],
    floor: float,
    height: float,
) -> None:
    """One panel, `height` decades over and under a middle line that stands for `floor`."""

    def decades(density: np.ndarray) -> np.ndarray:
        return np.log10(np.maximum(density, floor) / floor)

    x = 10**grid
    ax.set_xscale("log")
    for (mean, spread), sign, color, hatch in zip(halves, (1, -1), (BLUE, VERMILION), (None, "//////"), strict=True):
        side = "positive" if sign > 0 else "negative"
        y = sign * decades(mean)
        ax.fill_between(x, 0, y, facecolor=color, alpha=0.25, linewidth=0, hatch=hatch, edgecolor=color, gid=side)
        ax.plot(x, np.where(y == 0, np.nan, y), color=color, linewidth=0.9, gid=f"{side}-line")
        if spread.any():
            lower, upper = (sign * decades(mean + k * spread) for k in (-1, 1))
            ax.fill_between(x, lower, upper, color=color, alpha=BAND_ALPHA, linewidth=0, gid=f"{side}-band")
    ax.axhline(0, color="#333333", linewidth=0.6)
    if abs(panel.top) > max(panel.noise, x[0]):
        ax.plot([abs(panel.top)], [0], gid="top", **_dot(panel.converged))
    zero = float((panel.weights * (np.abs(panel.nodes) <= max(panel.noise, 10 ** grid[0]))).sum() / panel.weights.sum())
    if zero > 0.0005:
        note = ax.text(0.03, 0.04, f"{100 * zero:.3g} % ≈ 0", transform=ax.transAxes, va="bottom", fontsize="xx-small")
        note.set(color=GREY, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})
    ax.set_title(f"n = {panel.size:,}", loc="right", fontsize="xx-small", color=GREY, pad=2)
    ax.set_title(shortened(panel.name), loc="left", fontsize="small", pad=2)
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.set_major_locator(LogLocator(numticks=6))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(MultipleLocator(max(1, round(height / 2))))
    bottom = round(math.log10(floor))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: rf"$10^{{{bottom + round(abs(y))}}}$"))
    ax.tick_params(labelsize="x-small", length=2)
    ax.set(xlim=(x[0], x[-1]), ylim=(-height, height))


def _dot(converged: bool) -> dict[str, Any]:
    face = "#111111" if converged else "white"
    look = {"marker": "o", "markersize": 3.5, "markerfacecolor": face, "markeredgecolor": "#111111"}
    return look | {"linestyle": "none", "clip_on": False}


def shortened(name: str) -> str:
    """A long name without its middle."""
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS // 2 - 1]}…{name[-MOST_LETTERS // 2 :]}"
