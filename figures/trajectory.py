"""Sharpness and loss along a training run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .curve import MAX_MARKERS, Curve, Look, curve, draw_curve, missing
from .regime_shades import shade_regimes
from .style import BAND_ALPHA, COLORS, DASHES, MARKERS, VERMILION, append_axes, canvas, dress, end_label, log_axis

if TYPE_CHECKING:
    from ..dynamics.regimes import Regime
    from ..dynamics.trajectory import Trajectory

# A threshold this many times above every sharpness is named at the edge instead of flattening the curve.
FAR_ABOVE = 4.0
INK = "#333333"


def sharpness_trajectory(
    trajectory: Trajectory,
    ax: Axes | None = None,
    *,
    label: str | None = None,
    threshold_label: str | None = None,
    loss: bool = True,
    regimes: Sequence[Regime] = (),
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
        regimes: To shade and to name over the axes, as `sharpscope.regimes(trajectory)` finds them; of one run only.

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
            look = _look(index if alone else run, faint)
            draw_curve(ax, one, look, f"sharpness-{run}-{index + 1}", name)
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
        if regimes:
            shaded = [ax] if lowest is ax else [ax, lowest]
            steps = trajectory.steps()
            shade_regimes(shaded, regimes, (steps[0], steps[-1]))
    return ax


def _look(number: int, alpha: float) -> Look:
    color, dash, marker = (cycle[number % len(cycle)] for cycle in (COLORS, DASHES, MARKERS))
    return Look(color, dash, marker, 1.5 if number == 0 else 1.2, alpha)


def _drawn(ax: Axes, role: str) -> list[Line2D]:
    """The lines of a role, of every run so far: their gid is role-run, or role-run-index."""
    return [line for line in ax.lines if _gid(line).startswith(f"{role}-")]


def _gid(line: Line2D) -> str:
    return line.get_gid() or ""


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
