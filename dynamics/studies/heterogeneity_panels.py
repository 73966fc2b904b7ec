"""The panels of the study of block heterogeneity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .result import Heat, Line, Panel

# Below this a density is drawn as nothing, and every so many points of its grid one is kept.
FLOOR, EVERY = 1e-2, 2


def density_panel(title: str, record: Mapping[str, Any]) -> Panel:
    """A line for each block: the density of log10 |λ|."""
    lines = []
    for block, density in zip(record["blocks"], record["density"], strict=True):
        points = list(zip(record["grid"], density, strict=True))[::EVERY]
        kept = [i for i, (_, height) in enumerate(points) if height > FLOOR]
        seen = points[kept[0] : kept[-1] + 1] if kept else []
        lines.append(Line(block, [10**x for x, _ in seen], [height for _, height in seen]))
    return Panel(f"Block spectra: {title}", "|λ| (loss / weight²)", "share per decade", lines, x_log=True)


def distance_panel(title: str, record: Mapping[str, Any]) -> Panel:
    """Jensen-Shannon divergence of all pairs of blocks."""
    numbers = list(range(1, len(record["blocks"]) + 1))
    heat = Heat(numbers, numbers, record["js"], "JS divergence (nats)")
    names = ", ".join(f"{i} {block}" for i, block in enumerate(record["blocks"], 1))
    return Panel(f"{title}: {names}", "block", "block", [], heat=heat)


def gap_panel(models: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Panel:
    """A point for each model and seed: ratio of blocks, gap."""
    lines = [Line(name, ratios, gaps, points=True) for name, (ratios, gaps) in models.items()]
    return Panel(
        "Heterogeneity at the start and the gap",
        "largest over smallest max |λ| of blocks",
        "train loss, SGD − Adam (nats)",
        lines,
        x_log=True,
    )


def ratio_panel(records: Mapping[str, Mapping[str, Any]]) -> Panel:
    """Ratio of the blocks' largest eigenvalues along training."""
    lines = []
    for name, found in records.items():
        steps = sorted(map(int, found))
        lines.append(Line(name, steps, [found[str(step)]["ratio"] for step in steps], marker=True))
    return Panel("Along training with Adam (seed 0)", "step", "largest over smallest max |λ|", lines, y_log=True)


def curve_panel(title: str, gap: Mapping[str, Any]) -> Panel:
    """Train loss of the tuned optimizers."""
    lines = [
        Line(f"{rule}, lr {found['lr']:g}", [step for step, _ in found["curve"]], [loss for _, loss in found["curve"]])
        for rule, found in gap.items()
    ]
    return Panel(f"{title}: tuned (seed 0)", "step", "train loss (nats per character)", lines)


def quadratic_panel(cases: Mapping[str, Sequence[Sequence[float]]]) -> Panel:
    """Loss of gradient descent and of Adam with a fixed second moment, by step."""
    lines = []
    for case, curve in cases.items():
        for i, rule in ((1, "GD"), (2, "Adam")):
            points = [(row[0], row[i]) for row in curve if row[0] > 0 and row[i] >= 1e-12]
            lines.append(Line(f"{rule}, {case}", [t for t, _ in points], [loss for _, loss in points]))
    return Panel("Quadratics, κ = 5000", "step", "loss / initial loss", lines, x_log=True, y_log=True)
