"""Sharpness and loss along a training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .style import BAND_ALPHA, COLORS, DASHES, MARKERS, VERMILION, append_axes, canvas, dress, end_label, log_axis

if TYPE_CHECKING:
    import pandas as pd

    from ..dynamics.trajectory import Trajectory

# Beyond this many points markers would merge into a thick line; points that did not converge keep theirs.
MAX_MARKERS = 40
# A threshold this many times above every sharpness is named at the edge instead of flattening the curve.
FAR_ABOVE = 4.0
INK = "#333333"


class Curve(NamedTuple):
    """One quantity of one block along the run, each [k]; what is not finite is NaN."""

    steps: np.ndarray
    values: np.ndarray
    errors: np.ndarray
    converged: np.ndarray


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


def sharpness_trajectory(
    trajectory: Trajectory,
    ax: Axes | None = None,
    *,
    label: str | None = None,
    threshold_label: str | None = None,
    loss: bool = True,
) -> Axes:
    r"""Largest Hessian eigenvalues against the training step, the stability threshold 2/η, and the loss underneath.

    Bands are ± the recorded errors; a hollow marker is a value that had not converged within its budget. The
    threshold and the loss are drawn where they were recorded. A second call with the same `ax` adds another run to
    both axes, so that runs can be compared.

    Args:
        trajectory: With the quantity "sharpness" (every index becomes a line); also read: "stability_threshold"
            and "loss".
        ax: Where to draw; None makes a figure. The loss takes the lower part of its place, with the same steps.
        label: Name of the run in a legend.
        threshold_label: What stands beside the threshold. None writes 2/η where the provenance has the learning
            rate ("lr" or "learning_rate", at the top or under "optimizer") and the threshold is 2/η; otherwise
            "stability threshold", for it depends on momentum and weight decay.
        loss: Whether to draw the loss.

    Returns:
        The axes of the sharpness.
    """
    table = trajectory.to_pandas()
    indices = sorted(set(table.loc[(table["quantity"] == "sharpness") & (table["block"] == ""), "index"]))
    if not indices:
        raise missing(trajectory, "sharpness", "add the measurement Sharpness() to the monitor")
    curves = {index: one for index in indices if (one := curve(table, "sharpness", index=index)) is not None}
    threshold = curve(table, "stability_threshold")
    losses = curve(table, "loss") if loss else None
    with canvas(ax, (5.6, 4.4 if losses is not None else 3.2)) as ax:
        run = len({_gid(line).split("-")[1] for line in _drawn(ax, "sharpness")})
        alone = run == 0 and label is None
        own = None if alone else COLORS[run % len(COLORS)]
        for index, one in curves.items():
            name = rf"$\lambda_{{{index + 1}}}$" if alone and len(curves) > 1 else label if index == 0 else None
            faint = 1.0 if alone or index == 0 else 0.55
            _line(ax, one, f"sharpness-{run}-{index + 1}", index if alone else run, name, alpha=faint)
        if threshold is not None:
            text = threshold_label or threshold_name(trajectory, threshold)
            _threshold(ax, threshold, f"threshold-{run}", text, own)
        dress(ax)
        ax.margins(x=0.02)
        ax.set_ylabel("Sharpness\n(loss / parameter²)")
        _fit(ax)
        lowest = ax
        if losses is not None:
            lowest = _loss_axes(ax)
            _loss(lowest, losses, run, own)
        lowest.set_xlabel("Training step")
        lowest.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10]))
        _legend(ax)
    return ax


def _drawn(ax: Axes, role: str) -> list[Line2D]:
    """The lines of a role, of every run so far: their gid is role-run, or role-run-index."""
    return [line for line in ax.lines if _gid(line).startswith(f"{role}-")]


def _gid(line: Line2D) -> str:
    return line.get_gid() or ""


def _line(ax: Axes, one: Curve, gid: str, look: int, name: str | None, *, alpha: float) -> None:
    """A line with its band and markers where they fit; what did not converge is hollow, with an error bar."""
    color, dash, marker = (cycle[look % len(cycle)] for cycle in (COLORS, DASHES, MARKERS))
    width = 1.5 if look == 0 else 1.2
    ax.plot(
        one.steps, one.values, color=color, linestyle=dash, linewidth=width, alpha=alpha, gid=gid, label=name or "_"
    )
    sure = Curve(*(column[one.converged] for column in one))
    if len(one.steps) <= MAX_MARKERS:
        ax.plot(sure.steps, sure.values, color=color, marker=marker, markersize=3, linestyle="none", label="_")
    lower, upper = sure.values - sure.errors, sure.values + sure.errors
    ax.fill_between(sure.steps, lower, upper, color=color, alpha=BAND_ALPHA, linewidth=0, gid=f"{gid}-band")
    if not one.converged.all():
        unsure = Curve(*(column[~one.converged] for column in one))
        bars = ax.errorbar(
            unsure.steps,
            unsure.values,
            unsure.errors,
            color=color,
            elinewidth=0.8,
            marker=marker,
            markersize=4.5,
            markerfacecolor="white",
            markeredgewidth=1.0,
            linestyle="none",
            zorder=3,
            label="_",
        )
        bars.lines[0].set_gid(f"{gid}-open")


def threshold_name(trajectory: Trajectory, threshold: Curve) -> str:
    """2/η where the provenance's learning rate says that this is what the threshold is."""
    notes = trajectory.provenance
    nested = notes.get("optimizer")
    for place in (notes, nested if isinstance(nested, dict) else {}):
        for key in ("lr", "learning_rate"):
            eta = place.get(key)
            if isinstance(eta, int | float) and eta > 0 and np.allclose(threshold.values, 2 / eta, rtol=1e-6, atol=0):
                return r"$2/\eta$"
    return "stability\nthreshold"


def _threshold(ax: Axes, threshold: Curve, gid: str, text: str, color: str | None) -> None:
    """A dashed line, across the whole width where it is constant. Its hidden label keeps its name."""
    finite = threshold.values[np.isfinite(threshold.values)]
    if not len(finite):
        return
    look: dict[str, Any] = {"color": color or VERMILION, "linewidth": 1.1, "gid": gid, "label": f"_{text}"}
    look["linestyle"] = (0, (4, 2)) if color is None else (0, (1.5, 1.5))
    if np.ptp(finite) <= 1e-9 * abs(finite[-1]):
        ax.axhline(finite[-1], **look)
    else:
        ax.plot(threshold.steps, threshold.values, drawstyle="steps-post", **look)


def _fit(ax: Axes) -> None:
    """Limits from zero to just above the data, and a name for every threshold in or above them."""
    heights = np.concatenate([np.zeros(1), *(_finite(line) for line in _drawn(ax, "sharpness"))])
    low, top = heights.min(), heights.max()
    thresholds = _drawn(ax, "threshold")
    limits = np.concatenate([np.zeros(1), *(_finite(line) for line in thresholds)])
    near = limits <= FAR_ABOVE * top if top > 0 else np.ones_like(limits, dtype=bool)
    top = max(top, limits[near].max())
    if top > low:
        ax.set_ylim(low - 0.04 * (top - low) * (low < 0), top + 0.08 * (top - low))
    for text in [text for text in ax.texts if text.get_gid() == "threshold-name"]:
        text.remove()
    named, above = set(), []
    for line in thresholds:
        y, text = float(_finite(line)[-1]), str(line.get_label())[1:]
        if y > ax.get_ylim()[1]:
            above.append(rf"{text} = {y:.4g} $\uparrow$".replace("\n", " "))
        elif (y, text) not in named:
            named.add((y, text))
            end_label(ax, y, text, line.get_color()).set_gid("threshold-name")
    if above:
        text = "\n".join(dict.fromkeys(above))
        inside = ax.annotate(text, (1, 1), xytext=(-2, -2), xycoords="axes fraction", textcoords="offset points")
        inside.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})
        inside.set(color=thresholds[0].get_color(), ha="right", va="top", gid="threshold-name")


def _finite(line: Line2D) -> np.ndarray:
    values = np.asarray(line.get_ydata(), dtype=float)
    return values[np.isfinite(values)]


def _loss_axes(ax: Axes) -> Axes:
    """The axes under `ax`, made at the first call."""
    place = ax.get_position(original=True).bounds
    for other in ax.get_shared_x_axes().get_siblings(ax):
        if other.get_gid() == "loss-axes" and other.get_position(original=True).bounds == place:
            return other
    below = append_axes(ax, "bottom", "55%", 0.1, sharex=ax)
    below.set_gid("loss-axes")
    if ax.get_subplotspec() is not None:
        ax.figure.align_ylabels([ax, below])
    ax.tick_params(axis="x", labelbottom=False)
    ax.set_xlabel("")
    return below


def _loss(ax: Axes, losses: Curve, run: int, color: str | None) -> None:
    color = color or INK
    ax.plot(
        losses.steps,
        losses.values,
        color=color,
        linestyle=DASHES[run % len(DASHES)],
        linewidth=1.2,
        marker=MARKERS[run % len(MARKERS)] if len(losses.steps) <= MAX_MARKERS else "none",
        markersize=2.5,
        gid=f"loss-{run}",
    )
    lower, upper = losses.values - losses.errors, losses.values + losses.errors
    ax.fill_between(losses.steps, lower, upper, color=color, alpha=BAND_ALPHA, linewidth=0, gid=f"loss-{run}-band")
    heights = np.concatenate([_finite(line) for line in _drawn(ax, "loss")])
    dress(ax)
    ax.set_ylabel("Loss")
    if len(heights) and heights.min() > 0:
        log_axis(ax.yaxis, heights.min(), heights.max())
    else:
        ax.set_yscale("linear")  # a loss at or below zero has no logarithm


def _legend(ax: Axes) -> None:
    handles, names = ax.get_legend_handles_labels()
    hollow = [line for line in _drawn(ax, "sharpness") if _gid(line).endswith("-open")]
    if hollow:
        handles, names = [*handles, hollow[0]], [*names, "not converged"]
    if handles:
        # Sharpness mostly rises, which leaves the lower right free.
        ends = [_finite(line)[-1] for line in _drawn(ax, "sharpness") if len(_finite(line))]
        rising = min(ends, default=0.0) > sum(ax.get_ylim()) / 2
        ax.legend(handles, names, loc="lower right" if rising else "best", frameon=False, fontsize="small")
