"""Training beyond the first steps: the saturation regime, and whole runs cut into regimes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..regimes import Regime, regimes
from ..saturation import steepest_drop
from .laboratory import Laboratory
from .phase_panels import or_inf, regime_panels, saturation_panel
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


def saturation_claims(laboratory: Laboratory, width: int, c_loss: Sequence[float | None]) -> tuple[list[Claim], Panel]:
    """λ_τ / λ_0 at c·τ = 100 and depth 4, where c_loss by seed is known."""
    seeds = [0] if laboratory.quick else [0, 1, 2]
    parts = {"depth": 4, "width": width, "cs": SATURATION_GRID, "time": TIME}
    ratios = [laboratory.part(f"saturation-{seed}", saturation, seed=seed, **parts)["ratio"] for seed in seeds]
    at = {c: SATURATION_GRID.index(c) for c in (1.0, 4.0)}
    drops = [row[at[1.0]] - row[at[4.0]] for row in ratios]
    steepest = steepest_drop(SATURATION_GRID, ratios)
    catapult = statistics.median(map(or_inf, c_loss))
    where = f"depth 4, width {width}, c·τ = {TIME}"
    quick_note = "short version: another width" if laboratory.quick else ""
    claims = [
        Claim(
            f"The sharpness of the saturation regime falls with c ({where})",
            f"{SOURCE}; tolerance of the reference setting",
            "λ_τ/λ_0 at c = 1 minus that at c = 4 >= 0.3",
            ", ".join(f"{drop:.3f}" for drop in drops),
            None if laboratory.quick else all(drop >= 0.3 for drop in drops),
            quick_note,
        ),
        Claim(
            f"It falls most steeply near c = 2 ({where})",
            f"{SOURCE}; tolerance of the reference setting",
            "c_crit in [1.5, 4]",
            f"{steepest.c:.2f} ({steepest.low:.2f} to {steepest.high:.2f} by bootstrap over {len(seeds)} seeds)",
            None if laboratory.quick else 1.5 <= steepest.c <= 4,
            quick_note,
        ),
        Claim(
            "c_crit is at or below c_loss",
            SOURCE,
            "c_crit <= c_loss",
            f"{steepest.c:.2f} and {catapult:.2f}",
            None if laboratory.quick else steepest.c <= catapult,
            quick_note,
        ),
    ]
    return claims, saturation_panel(SATURATION_GRID, ratios, where, steepest.c)


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
    lowest = [min(run["sharpness"]) / run["sharpness"][0] for run in runs]
    has = [{regime.label for regime in found} for found in cut]
    ends, shuffled_ends = ([2 * _last_ratio(run) for run in group] for group in (runs, shuffled))
    setting = f"depth 4, width 64, c = 0.5, {num} digits, {runs[0]['step'][-1]} steps"
    source = f"{SOURCE}; setting of the reference"
    why = "" if quick else "what digits ask of this net is learnt while the sharpness is still far below 2/η"

    def verdict(holds: bool) -> bool | None:
        return None if quick else holds

    complete = [[regime.label for regime in found] == FOUR for found in cut_shuffled]
    missing = [
        f"seed {seed} without {' and '.join(label for label in FOUR if label not in {r.label for r in found})}"
        for seed, found, whole in zip(seeds, cut_shuffled, complete, strict=True)
        if not whole
    ]
    shown_seed = complete.index(True) if any(complete) else 0
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
            "" if _all_have(has, "progressive sharpening") else why,
        ),
        Claim(
            "There it ends at the edge of stability",
            source,
            f"mean of η·λ over the last tenth of the steps in [{EDGE[0]}, {EDGE[1]}]",
            ", ".join(f"{end:.3f}" for end in ends),
            verdict(all(EDGE[0] <= end <= EDGE[1] for end in ends)),
            "" if all(EDGE[0] <= end <= EDGE[1] for end in ends) else why,
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
            f"mean of η·λ over the last tenth of the steps in [{EDGE[0]}, {EDGE[1]}]",
            ", ".join(f"{end:.3f}" for end in shuffled_ends),
            verdict(all(EDGE[0] <= end <= EDGE[1] for end in shuffled_ends)),
        ),
    ]
    title = f"depth 4, width 64, {num} digits"
    return claims, [
        *regime_panels(
            shuffled[shown_seed], cut_shuffled[shown_seed], f"{title}, shuffled labels, c = 8, seed {shown_seed}"
        ),
        *regime_panels(runs[0], cut[0], f"{title}, c = 0.5, seed 0")[:1],
    ]


def _regimes(run: Mapping[str, Any]) -> list[Regime]:
    return regimes(run["step"], run["loss"], run["sharpness"], run["threshold"])


def _last_ratio(run: Mapping[str, Any]) -> float:
    """Mean of sharpness over threshold in the last tenth of the steps."""
    last = [v for step, v in zip(run["step"], run["sharpness"], strict=True) if step >= 0.9 * run["step"][-1]]
    return statistics.fmean(last) / run["threshold"]


def _listed(found: Sequence[Regime]) -> str:
    return ", ".join(f"{regime.label} {regime.first_step}-{regime.last_step}" for regime in found)


def _all_have(labels: Sequence[set[Any]], label: str) -> bool:
    return all(label in one for one in labels)
