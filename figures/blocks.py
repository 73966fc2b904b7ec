"""The spectra of the diagonal blocks side by side, and how far apart they are."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MultipleLocator

from ..dynamics.trajectory import Trajectory
from ..hessian.block_spectra import BlockSpectra
from .style import BAND_ALPHA, BLUE, GREY, HEAT, VERMILION, canvas, color_bar
from .trajectory import missing

# Width of the smoothing on the logarithmic axis, in decades, as for the Jensen-Shannon divergence.
SIGMA = 0.1
# An eigenvalue alone in its block stands this many times above the floor of the panels.
ABOVE_FLOOR = 5.0
# Decades of |λ| that are drawn under the largest; float32 products resolve no more.
DECADES = 9
# Distances are written into the cells up to this many blocks.
MOST_NUMBERS = 14
LARGEST_DISTANCE = math.sqrt(math.log(2))


class Panel(NamedTuple):
    """One block: nodes and weights [p, k] of p probes, or of one exact row; `size` is None where it is not known."""

    name: str
    size: int | None
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
        columns: Of the grid; None makes it about as wide as it is high.

    Returns:
        The axes around the panels, which carry the labels.
    """
    panels = _chosen(_panels(source, step), blocks)
    if columns is not None and columns < 1:
        raise ValueError(f"`columns` is {columns}; the grid needs at least one")
    across = min(columns or max(1, math.ceil(math.sqrt(len(panels) * 0.75))), len(panels))
    down = math.ceil(len(panels) / across)
    low, high = _range(panels)
    grid = np.linspace(low, high, 400)
    curves = [_halves(panel, grid) for panel in panels]
    smallest = min(_lightest(panel) for panel in panels)
    floor = smallest / (SIGMA * math.sqrt(2 * math.pi)) / ABOVE_FLOOR
    height = math.log10(max(float((mean + band).max()) for halves in curves for mean, band in halves) / floor)
    height = max(height, 1.0) * 1.1
    with canvas(ax, (min(2.1 * across, 8.4) + 0.8, 1.15 * down + 0.7)) as ax:
        _empty(ax)
        for i, (panel, halves) in enumerate(zip(panels, curves, strict=True)):
            row, column = divmod(i, across)
            inset = ax.inset_axes(_place(row, column, down, across))
            _draw(inset, panel, grid, halves, floor)
            inset.set(xlim=(low, high), ylim=(-height, height))
            last = i + across >= len(panels)
            inset.tick_params(labelbottom=last, labelleft=column == 0)
        ax.set_xlabel("|λ| (loss / parameter²)", labelpad=18)
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
        names, distance = list(source), source.js_distance(axis=axis, sigma=sigma).numpy()
    else:
        if axis != "log" or sigma is not None:
            raise ValueError("`axis` and `sigma` need a BlockSpectra; a trajectory holds distances already computed")
        arrays = _recorded(source, step)[1]
        names = _names(arrays)
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
        if step is not None:
            raise ValueError(f"`step` is {step}, but `source` is one BlockSpectra; leave `step` out")
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
    step, arrays = _recorded(source, step)
    table = source.to_pandas()
    tops = table[(table["quantity"] == "block_sharpness") & (table["step"] == step)].set_index("block")
    panels = []
    for name in _names(arrays):
        nodes, weights = (torch.atleast_2d(arrays[f"{name}/{part}"]).double().numpy() for part in ("nodes", "weights"))
        top, converged = (tops.loc[name, column] for column in ("value", "converged"))
        panels.append(Panel(name, None, nodes, weights, float(top), bool(converged), 0.0))
    return panels
