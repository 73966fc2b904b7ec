"""The figure of the phase diagram."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..regimes import Regime
from .phase_scan import CONSTANTS
from .result import Heat, Line, Panel

C_LABEL = "learning rate c = η λ_0"
SHAPE_LABEL = "depth / width"
Cells = Mapping[tuple[int, int], Sequence[Mapping[str, Any]]]


def numbers(found: Sequence[float | None], last: float = 64.0) -> str:
    """Critical constants by seed; those beyond the grid as such."""
    return ", ".join(f"> {last:g}" if c is None else f"{c:.3g}" for c in found)


def or_inf(c: float | None) -> float:
    """A constant that was not reached on the grid lies beyond it."""
    return math.inf if c is None else c


def diagram(cells: Cells, depth: int) -> list[Panel]:
    """λ_10 / λ_0 over shape and learning rate at one depth, with the boundaries; none for fewer than two widths."""
    widths = sorted((width for d, width in cells if d == depth), reverse=True)
    if len(widths) < 2:
        return []
    runs = [cells[depth, width] for width in widths]
    shapes = [depth / width for width in widths]
    cs = max((run["c"] for group in runs for run in group), key=len)
    values = [
        [_middle([dict(zip(run["c"], run["sharpness"], strict=True)).get(c) for run in group]) for group in runs]
        for c in cs
    ]
    lines = [Line("c = 2", [shapes[0], shapes[-1]], [2.0, 2.0])]
    for name in CONSTANTS:
        points = [(shape, [run["constants"][name] for run in group]) for shape, group in zip(shapes, runs, strict=True)]
        found = [
            (shape, statistics.median(kept))
            for shape, all_of in points
            if len(kept := [c for c in all_of if c is not None]) > len(all_of) / 2
        ]
        if found:
            x, y = (list(column) for column in zip(*found, strict=True))
            lines.append(Line(name, x, y, marker=True))
    title = f"Depth {depth}, medians over seeds; blank: diverged"
    heat = Heat(shapes, cs, values, "λ_10 / λ_0", log=False)
    return [Panel(title, SHAPE_LABEL, C_LABEL, lines, x_log=True, y_log=True, heat=heat)]


def shape_panel(cells: Cells) -> Panel:
    """c_loss and c_sharp of every run against depth over width."""
    lines = []
    for name in ("c_loss", "c_sharp"):
        for depth in sorted({d for d, _ in cells}):
            found = [(d / w, run["constants"][name]) for (d, w), runs in cells.items() if d == depth for run in runs]
            points = [(shape, c) for shape, c in found if c is not None]
            if points:
                x, y = (list(column) for column in zip(*points, strict=True))
                lines.append(Line(f"{name}, depth {depth}", x, y, points=True))
    return Panel("Every depth, width and seed", SHAPE_LABEL, C_LABEL, lines, x_log=True, y_log=True, levels={"2": 2.0})


def saturation_panel(cs: Sequence[float], ratios: Sequence[Sequence[float]], where: str, c_crit: float) -> Panel:
    """λ_τ / λ_0 against c, the mean over seeds with their standard deviation."""
    columns = list(zip(*ratios, strict=True))
    mean = [statistics.fmean(column) for column in columns]
    spread = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
    lines = [Line("mean over seeds", list(cs), mean, spread, marker=True)]
    if math.isfinite(c_crit):
        lines.append(Line(f"c_crit = {c_crit:.2f}", [c_crit, c_crit], [min(mean), max(mean)]))
    return Panel(f"Saturation: {where}", C_LABEL, "λ_τ / λ_0", lines, x_log=True)


def regime_panels(run: Mapping[str, Any], found: Sequence[Regime], title: str) -> list[Panel]:
    """Sharpness and loss of a run, a line for each regime."""
    steps = [step + 1 for step in run["step"]]
    parts = [
        (f"{i + 1}: {regime.label}", run["step"].index(regime.first_step), run["step"].index(regime.last_step) + 2)
        for i, regime in enumerate(found)
    ]
    eta = [2 * value / run["threshold"] for value in run["sharpness"]]

    def lines(values: Sequence[float]) -> list[Line]:
        return [Line(label, steps[first:last], values[first:last]) for label, first, last in parts]

    return [
        Panel(title, "step + 1", "η λ", lines(eta), x_log=True, y_log=True, levels={"edge": 2.0}),
        Panel("Loss of the same run", "step + 1", "loss", lines(run["loss"]), x_log=True, y_log=True),
    ]


def _middle(values: Sequence[float | None]) -> float | None:
    """The median, None where more than half are missing."""
    kept = [value for value in values if value is not None]
    return statistics.median(kept) if 2 * len(kept) > len(values) else None
