"""Training beyond the first steps: the saturation regime, and whole runs cut into regimes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..regimes import Regime, regimes
from ..saturation import SteepestDrop, steepest_drop
from .laboratory import Laboratory
from .phase_panels import numbers, or_inf, regime_panels, saturation_panel
from .phase_scan import long_run, saturation
from .result import Claim, Panel

SOURCE = "Kalra and Barkeshli 2023"
SATURATION_GRID = [2 ** (0.25 * i) for i in range(-4, 15)]
TIME = 100
# Steps and steps from record to record, in turn.
STAGES = [[20, 1], [180, 10], [1800, 60], [18000, 300]]
SHUFFLED_STAGES = [[20, 1], [180, 6], [7800, 60]]
FOUR = ["transient", "saturation", "progressive sharpening", "edge of stability"]
EDGE = (1.9, 2.3)
STEEPEST = (1.5, 4.0)  # where the drop of the saturation regime is to be
NEVER = SteepestDrop(math.nan, math.nan, math.nan, math.nan)


class EndRatio(NamedTuple):
    """η·λ over the records of the last tenth of the steps; NaN where the run diverged."""

    low: float
    mean: float
    high: float

    def at_edge(self) -> bool:
        return EDGE[0] <= self.low and self.high <= EDGE[1]

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "diverged"
        return f"{self.low:.3f} to {self.high:.3f}, mean {self.mean:.3f}"


def saturation_claims(laboratory: Laboratory, width: int, c_loss: Sequence[float | None]) -> tuple[list[Claim], Panel]:
    """λ_τ / λ_0 at c·τ = 100 and depth 4, where c_loss by seed is known."""
    seeds = [0] if laboratory.quick else [0, 1, 2]
    parts = {"depth": 4, "width": width, "cs": SATURATION_GRID, "time": TIME}
    ratios = [laboratory.part(f"saturation-{seed}", saturation, seed=seed, **parts)["ratio"] for seed in seeds]
    at = {c: SATURATION_GRID.index(c) for c in (1.0, 4.0)}
    drops = [row[at[1.0]] - row[at[4.0]] for row in ratios]
    # A training that diverges has no sharpness; the curve is that up to the c before.
    num = next((i for i, column in enumerate(zip(*ratios, strict=True)) if not np.isfinite(column).all()), None)
    grid, kept = SATURATION_GRID[:num], [row[:num] for row in ratios]
    steepest = steepest_drop(grid, kept) if grid[-1:] >= [STEEPEST[1]] else NEVER
    found = math.isfinite(steepest.c)
    catapult = statistics.median(map(or_inf, c_loss))
    where = f"depth 4, width {width}, c·τ = {TIME}"
    quick_note = "short version: another width" if laboratory.quick else ""
    ended = "" if num is None else f"some training diverges at c = {SATURATION_GRID[num]:.3g}; smaller c only"
    note = "; ".join(filter(None, [quick_note, ended]))
    claims = [
        Claim(
            f"The sharpness of the saturation regime falls with c ({where})",
            f"{SOURCE}; tolerance of the reference setting",
            "λ_τ/λ_0 at c = 1 minus that at c = 4 >= 0.3",
            ", ".join(f"{drop:.3f}" if math.isfinite(drop) else "diverged" for drop in drops),
            None if laboratory.quick else all(drop >= 0.3 for drop in drops),
            quick_note,
        ),
        Claim(
            f"It falls most steeply near c = 2 ({where})",
            f"{SOURCE}; tolerance of the reference setting",
            f"c_crit in [{STEEPEST[0]:g}, {STEEPEST[1]:g}]",
            f"{steepest.c:.2f} ({steepest.low:.2f} to {steepest.high:.2f} by bootstrap over {len(seeds)} seeds)"
            if found
            else "never",
            None if laboratory.quick else STEEPEST[0] <= steepest.c <= STEEPEST[1],
            note,
        ),
        Claim(
            "c_crit is at or below c_loss",
            SOURCE,
            "c_crit <= c_loss",
            f"{f'{steepest.c:.2f}' if found else 'never'}; c_loss {numbers(c_loss)}, its median counts",
            None if laboratory.quick else steepest.c <= catapult,
            note,
        ),
    ]
    return claims, saturation_panel(grid, kept, where, steepest.c)


def regime_claims(laboratory: Laboratory) -> tuple[list[Claim], list[Panel]]:
    """Whole runs, cut into regimes."""
    quick, seeds = laboratory.quick, [0] if laboratory.quick else [0, 1, 2]
    num = 40 if quick else 200
    plain: dict[str, Any] = {"depth": 4, "width": 64, "c": 0.5, "num": num, "stages": STAGES[:3] if quick else STAGES}
    stages = [*SHUFFLED_STAGES[:2], [1200, 60]] if quick else SHUFFLED_STAGES
    other = {**plain, "c": 8.0, "stages": stages, "shuffled": True}
    runs = [laboratory.part(f"run-{seed}", long_run, seed=seed, **plain) for seed in seeds]
    shuffled = [laboratory.part(f"shuffled-{seed}", long_run, seed=seed, **other) for seed in seeds]
    cut, cut_shuffled = ([_regimes(run) for run in group] for group in (runs, shuffled))
    shown = "; ".join(_listed(found) for found in cut)
    lowest = [float(np.nanmin(run["sharpness"])) / run["sharpness"][0] for run in runs]
    highest = [2 * float(np.nanmax(run["sharpness"])) / run["threshold"] for run in runs]
    learnt = [run["loss"][-1] / run["loss"][0] for run in runs]
    has = [{regime.label for regime in found} for found in cut]
    ends, shuffled_ends = ([_at_end(run) for run in group] for group in (runs, shuffled))
    setting = f"depth 4, width 64, c = 0.5, {num} digits, {runs[0]['step'][-1]} steps"
    source = f"{SOURCE}; setting of the reference"
    reached = (
        f"largest η·λ of a record {', '.join(f'{x:.3g}' for x in highest)}; last loss over first "
        f"{', '.join(f'{x:.2g}' for x in learnt)}"
    )
    in_tenth = f"η·λ in [{EDGE[0]}, {EDGE[1]}] at every record of the last tenth of the steps"

    def verdict(holds: bool) -> bool | None:
        return None if quick else holds

    complete = [[regime.label for regime in found] == FOUR for found in cut_shuffled]
    missing = [
        f"seed {seed} without {' and '.join(label for label in FOUR if label not in {r.label for r in found})}"
        for seed, found, whole in zip(seeds, cut_shuffled, complete, strict=True)
        if not whole
    ]
    shown_seed = complete.index(True) if any(complete) else 0
    choice = "the first with all four regimes" if any(complete) else "none has all four regimes"
    claims = [
        Claim(
            f"In one run ({setting}) the sharpness first falls",
            source,
            "below λ_0, a transient",
            f"smallest λ/λ_0 {', '.join(f'{x:.2f}' for x in lowest)}",
            verdict(all("transient" in labels for labels in has) and max(lowest) < 1),
        ),
        Claim("There it is constant for a while", source, "a saturation", shown, verdict(_all_have(has, "saturation"))),
        Claim(
            "There it rises again",
            source,
            "a progressive sharpening",
            shown,
            verdict(_all_have(has, "progressive sharpening")),
            reached,
        ),
        Claim(
            "There it ends at the edge of stability",
            source,
            in_tenth,
            "; ".join(map(str, ends)),
            verdict(all(end.at_edge() for end in ends)),
            reached,
        ),
        Claim(
            "With shuffled labels, which take longer to learn, all four regimes follow each other at c = 8",
            f"{SOURCE}; this setting was chosen here after the one above had failed",
            "transient, saturation, progressive sharpening, edge of stability, for each seed",
            "; ".join(_listed(found) for found in cut_shuffled),
            verdict(all(complete)),
            "; ".join([f"{shuffled[0]['step'][-1]} steps, otherwise as above", *missing]),
        ),
        Claim(
            "Those runs end at the edge of stability",
            SOURCE,
            in_tenth,
            "; ".join(map(str, shuffled_ends)),
            verdict(all(end.at_edge() for end in shuffled_ends)),
        ),
    ]
    title = f"depth 4, width 64, {num} digits"
    return claims, [
        *regime_panels(
            shuffled[shown_seed],
            cut_shuffled[shown_seed],
            f"{title}, shuffled labels, c = 8, seed {shown_seed} of {len(seeds)}: {choice}",
        ),
        *regime_panels(runs[0], cut[0], f"{title}, c = 0.5, seed 0")[:1],
    ]


def _regimes(run: Mapping[str, Any]) -> list[Regime]:
    return regimes(run["step"], run["loss"], run["sharpness"], run["threshold"])


def _at_end(run: Mapping[str, Any]) -> EndRatio:
    last = [v for step, v in zip(run["step"], run["sharpness"], strict=True) if step >= 0.9 * run["step"][-1]]
    ratios = 2 * np.asarray(last) / run["threshold"]
    return EndRatio(*(float(f(ratios)) for f in (np.min, np.mean, np.max)))


def _listed(found: Sequence[Regime]) -> str:
    return ", ".join(f"{regime.label} {regime.first_step}-{regime.last_step}" for regime in found)


def _all_have(labels: Sequence[set[Any]], label: str) -> bool:
    return all(label in one for one in labels)
