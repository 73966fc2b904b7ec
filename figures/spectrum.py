"""The density of eigenvalues at one point, and along a training run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ..dynamics.trajectory import Trajectory
from ..hessian.eigs import EigenPairs
from ..hessian.slq import SpectralDensity
from .curve import curve, missing
from .style import BAND_ALPHA, BLACK, COLORS, DASHES, HEAT, VERMILION, canvas, color_bar, dress, log_axis
from .trajectory import FAR_ABOVE, threshold_name

if TYPE_CHECKING:
    import pandas as pd

# The density falls as exp(-x²) beside an isolated eigenvalue; the axis ends this far under the lowest peak ...
UNDER_LOWEST_PEAK = 5.0
# ... and no further than this under the highest, where rounding begins.
DEEPEST = 1e-10
# Widths of the Gaussian beyond the last node.
REACH = 5
EIGENVALUE = "Eigenvalue λ (loss / parameter²)"
DENSITY = "Spectral density (parameter² / loss)"


class Ticks(NamedTuple):
    """Eigenvalues to mark, each [k]."""

    values: np.ndarray
    errors: np.ndarray
    converged: np.ndarray


def density(
    source: SpectralDensity | Trajectory,
    ax: Axes | None = None,
    *,
    step: int | None = None,
    eigenvalues: EigenPairs | Sequence[float] | np.ndarray | torch.Tensor | None = None,
    sigma: float | None = None,
    label: str | None = None,
) -> Axes:
    r"""Density of eigenvalues, smoothed by a Gaussian, on a logarithmic scale, with eigenvalues as ticks underneath.

    The band is ± one standard error over probe vectors. A tick ends in a dot, hollow where the eigenvalue had not
    converged, with its error across. A second call with the same `ax` adds another density.

    Args:
        source: A `SpectralDensity`, or a trajectory with the quantity "density".
        ax: Where to draw; None makes a figure.
        step: Of the trajectory; None is the last with a density.
        eigenvalues: To mark; None marks what a trajectory has at this step as "sharpness" and "bottom_eigenvalue".
            An empty list marks nothing.
        sigma: Width of the Gaussian; None is 1 % of the range of the eigenvalues.
        label: Name of the density in a legend.
    """
    if isinstance(source, Trajectory):
        step = _step(source, step)
        spectrum = _recorded(source, step)
        ticks = _recorded_ticks(source.to_pandas(), step) if eigenvalues is None else _ticks(eigenvalues)
    elif isinstance(source, SpectralDensity):
        if step is not None:
            raise ValueError(f"`step` is {step}, but `source` is one SpectralDensity; leave `step` out")
        spectrum, ticks = source, _ticks(() if eigenvalues is None else eigenvalues)
    else:
        raise TypeError(f"`source` is a {type(source).__name__}; pass a SpectralDensity or a Trajectory")
    width = spectrum.default_sigma() if sigma is None else sigma
    x = _points(spectrum, width)
    heights, band = (t.numpy() for t in spectrum.on_grid(x, width))
    floor = _floor(spectrum, width)
    with canvas(ax, (5.6, 3.4)) as ax:
        look = len([line for line in ax.lines if (line.get_gid() or "").startswith("density-")])
        color = COLORS[look % len(COLORS)]
        gid = f"density-{look}"
        dash = DASHES[look % len(DASHES)]
        above = np.where(heights > floor * 1e-3, heights, np.nan)  # what lies deeper would only fill vector files
        ax.plot(x, above, color=color, linestyle=dash, linewidth=1.3, gid=gid, label=label or "_")
        ax.fill_between(x, floor * 1e-3, np.nan_to_num(above), color=color, alpha=0.08, linewidth=0, zorder=0.5)
        if np.isfinite(band).all() and (band > 0).any():
            lower, upper = np.clip(heights - band, floor * 1e-3, None), heights + band
            ax.fill_between(x, lower, upper, color=color, alpha=BAND_ALPHA, linewidth=0, gid=f"{gid}-band")
        _draw_ticks(ax, ticks, VERMILION if look == 0 else color, f"eigenvalues-{look}")
        top = max(float(np.nanmax(heights + np.where(np.isfinite(band), band, 0))), floor)
        if look:
            floor, top = min(floor, ax.get_ylim()[0]), max(top, ax.get_ylim()[1] / 2)
        else:
            ax.axvline(0, color="#BBBBBB", linewidth=0.7, zorder=0)
        log_axis(ax.yaxis, floor, top)
        ax.set_ylim(floor, 2 * top)
        dress(ax)
        ax.margins(x=0.01)
        ax.set_xlabel(EIGENVALUE)
        ax.set_ylabel(DENSITY)
        _legend(ax)
    return ax


def density_evolution(
    trajectory: Trajectory, ax: Axes | None = None, *, sigma: float | None = None, threshold_label: str | None = None
) -> Axes:
    """The density of eigenvalues against the training step as shades, with sharpness and threshold as lines.

    Args:
        trajectory: With the quantity "density"; also read: "sharpness" and "stability_threshold".
        ax: Where to draw; None makes a figure. The colour bar takes a strip of its place.
        sigma: Width of the Gaussian, the same at all steps; None is 1 % of the widest range of eigenvalues.
        threshold_label: As for `sharpness_trajectory`.
    """
    _step(trajectory, None)
    steps = trajectory.array_steps("density")
    spectra = [_recorded(trajectory, step) for step in steps]
    width = max(spectrum.default_sigma() for spectrum in spectra) if sigma is None else sigma
    low = min(float(spectrum.nodes.min()) for spectrum in spectra) - REACH * width
    high = max(float(spectrum.nodes.max()) for spectrum in spectra) + REACH * width
    edges = np.linspace(low, high, int(np.clip(3 * (high - low) / width, 300, 4000)))
    middles = (edges[1:] + edges[:-1]) / 2
    shades = np.stack([spectrum.on_grid(middles, width)[0].numpy() for spectrum in spectra], axis=1)  # [g, steps]
    floor = max(min(_floor(spectrum, width) for spectrum in spectra), DEEPEST * shades.max())
    table = trajectory.to_pandas()
    sharpness, threshold = curve(table, "sharpness"), curve(table, "stability_threshold")
    with canvas(ax, (6.0, 3.6)) as ax:
        norm = LogNorm(floor, max(shades.max(), 10 * floor))
        mesh = ax.pcolormesh(_edges(steps), edges, np.where(shades >= floor, shades, np.nan), cmap=HEAT, norm=norm)
        mesh.set(rasterized=True, gid="density")
        color_bar(ax, mesh, DENSITY)
        if sharpness is not None:
            look = {"color": VERMILION, "linewidth": 1.1, "gid": "sharpness", "label": r"$\lambda_{1}$"}
            ax.plot(sharpness.steps, sharpness.values, **look)
        if threshold is not None and np.nanmax(threshold.values) < FAR_ABOVE * high:
            text = (threshold_label or threshold_name(trajectory, threshold)).replace("\n", " ")
            look = {"color": BLACK, "linestyle": (0, (4, 2)), "linewidth": 1.0, "gid": "threshold", "label": text}
            ax.plot(threshold.steps, threshold.values, drawstyle="steps-post", **look)
        if ax.lines:
            place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2, "ncols": 2}
            ax.legend(frameon=False, fontsize="small", **place)
        lines = [np.nanmax(line.get_ydata()) for line in ax.lines]
        ax.set_ylim(low, max([high, *lines]) + 0.04 * (high - low))
        ax.set_xlabel("Training step")
        ax.set_ylabel(EIGENVALUE)
        ax.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10]))
        dress(ax, grid=None)
    return ax


def _step(trajectory: Trajectory, step: int | None) -> int:
    """The step to draw, which has a density."""
    if "density" not in trajectory.quantities():
        raise missing(trajectory, "density", "add the measurement Density() to the monitor")
    steps = trajectory.array_steps("density")
    if not steps:
        raise ValueError("`trajectory` has the quantity 'density' without nodes and weights; record them as its arrays")
    if step is None:
        return steps[-1]
    if step not in steps:
        near = sorted(steps, key=lambda other: abs(other - step))[:5]
        raise ValueError(f"`step` is {step}, where no density was measured; near it: {sorted(near)}")
    return step


def _recorded(trajectory: Trajectory, step: int) -> SpectralDensity:
    arrays = trajectory.arrays(step, "density")
    nodes, weights = (torch.atleast_2d(arrays[name].double()) for name in ("nodes", "weights"))
    # All eigenvalues of a small matrix weigh the same, which the nodes of a quadrature do not.
    exact = len(nodes) == 1 and nodes.numel() > 1 and bool(torch.allclose(weights, weights[0, 0]))
    return SpectralDensity(nodes, weights, mean_stderr=math.nan, exact=exact, products=0, seconds=0.0)


def _points(spectrum: SpectralDensity, sigma: float) -> np.ndarray:
    """The axis: dense enough for every peak, and with every node, so that no peak loses its top."""
    nodes = spectrum.nodes.numpy().ravel()
    low, high = nodes.min() - REACH * sigma, nodes.max() + REACH * sigma
    return np.union1d(np.linspace(low, high, int(np.clip(8 * (high - low) / sigma, 500, 5000))), nodes)


def _floor(spectrum: SpectralDensity, sigma: float) -> float:
    """The lower end of the axis: below the peaks of the outermost eigenvalues and of nearly all others.

    Not of all: a quadrature may put a node into a gap of the spectrum, with a weight that means nothing.
    """
    nodes = spectrum.nodes[spectrum.weights > 0]
    at_nodes = spectrum.on_grid(nodes, sigma)[0]
    outermost = min(float(at_nodes[nodes.argmin()]), float(at_nodes[nodes.argmax()]))
    lowest = min(outermost, float(at_nodes.quantile(0.05)))
    return max(lowest / UNDER_LOWEST_PEAK, DEEPEST * float(at_nodes.max()))


def _ticks(eigenvalues: EigenPairs | Sequence[float] | np.ndarray | torch.Tensor) -> Ticks:
    if isinstance(eigenvalues, EigenPairs):
        values, errors = (t.detach().cpu().double().numpy() for t in (eigenvalues.values, eigenvalues.residuals))
        sure = errors <= eigenvalues.tol * np.abs(values).max(initial=0)  # of those that others held back
        return Ticks(values, errors, sure | eigenvalues.converged)
    values = np.asarray(eigenvalues, dtype=float).reshape(-1)
    return Ticks(values, np.zeros_like(values), np.ones_like(values, dtype=bool))


def _recorded_ticks(table: pd.DataFrame, step: int) -> Ticks:
    chosen = table["quantity"].isin(["sharpness", "bottom_eigenvalue"]) & (table["step"] == step)  # type: ignore[union-attr]
    rows = table[chosen & (table["block"] == "") & np.isfinite(table["value"])]
    values, errors = (np.array(rows[name], dtype=float) for name in ("value", "error"))
    return Ticks(values, np.nan_to_num(errors), np.array(rows["converged"], dtype=bool))


def _draw_ticks(ax: Axes, ticks: Ticks, color: str, gid: str) -> None:
    if not len(ticks.values):
        return
    place = ax.get_xaxis_transform()  # λ across, share of the height up
    ax.vlines(ticks.values, 0, 0.05, color=color, linewidth=1.1, transform=place, gid=gid)
    for sure, face in ((True, color), (False, "white")):
        x, errors = ticks.values[ticks.converged == sure], ticks.errors[ticks.converged == sure]
        if len(x):
            dots = ax.errorbar(
                x,
                np.full(len(x), 0.05),
                xerr=errors,
                transform=place,
                color=color,
                elinewidth=0.8,
                marker="o",
                markersize=3.5,
                markerfacecolor=face,
                linestyle="none",
                label="_",
            )
            dots.lines[0].set_gid(f"{gid}-{'sure' if sure else 'open'}")


def _legend(ax: Axes) -> None:
    handles, names = ax.get_legend_handles_labels()
    band = next((c for c in ax.collections if (c.get_gid() or "").endswith("-band")), None)
    if band is not None:
        handles.append(Patch(facecolor=band.get_facecolor()[0], linewidth=0))  # type: ignore[index]
        names.append("± standard error")
    for ending, name in (("-sure", "eigenvalue"), ("-open", "not converged")):
        found = [line for line in ax.lines if (line.get_gid() or "").endswith(ending)]
        handles, names = handles + found[:1], names + [name] * len(found[:1])
    if handles:
        ax.legend(handles, names, loc="upper right", frameon=False, fontsize="small")


def _edges(steps: Sequence[int]) -> np.ndarray:
    """Borders of the columns, halfway between steps."""
    at = np.asarray(steps, dtype=float)
    if len(at) == 1:
        return np.array([at[0] - 0.5, at[0] + 0.5])
    middles = (at[1:] + at[:-1]) / 2
    return np.concatenate([[at[0] - (middles[0] - at[0])], middles, [at[-1] + (at[-1] - middles[-1])]])
