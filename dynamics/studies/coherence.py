"""Where stochastic gradient descent diverges, predicted from the coherence of the examples' Hessians."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .coherence_claims import (
    BATCH_SIZES,
    LR,
    MOST,
    NET_BATCH_SIZES,
    boundary_claims,
    family_claims,
    largest,
    net_claim,
    order_claims,
    restart_claim,
    ten_outputs_claim,
    theorem1_boundary,
    theorem2_boundary,
    typical_boundary,
)
from .coherence_family import NUM_EXAMPLES, SAMPLINGS, diverged_for
from .coherence_networks import LOSSES, NUM_DIGITS, optimum
from .laboratory import Laboratory
from .result import Claim, Heat, Line, Panel
from .study import Study

LARGE_LR = 0.8
RUNS, STEPS = 10, 1000


def investigate(laboratory: Laboratory) -> tuple[list[Claim], list[Panel]]:
    seeds = [0] if laboratory.quick else [0, 1, 2]
    claims = [*family_claims(laboratory), *order_claims(laboratory)]
    simulated = {
        sampling: [
            laboratory.part(f"boundary-{sampling}-{seed}", diverged_for, **_runs(BATCH_SIZES, sampling, seed))
            for seed in seeds
        ]
        for sampling in SAMPLINGS
    }
    claims += boundary_claims({sampling: [largest(one) for one in found] for sampling, found in simulated.items()})
    nets = {
        loss: [
            laboratory.part(
                f"{loss.replace(', ', '-').replace(' ', '-')}-{seed}",
                optimum,
                loss=loss,
                seed=seed,
                batch_sizes=NET_BATCH_SIZES,
                runs=200 if loss == "squared error" else 0,
            )
            for seed in seeds
        ]
        for loss in LOSSES
    }
    claims += [net_claim(loss, nets[loss]) for loss in ("squared error", "logistic")]
    claims += [restart_claim(nets["squared error"]), ten_outputs_claim(nets["squared error, ten outputs"])]
    if laboratory.quick:
        panels = [_heat_panel(LR, BATCH_SIZES, simulated["bernoulli"][0])]
    else:
        panels = [_full_heat_panel(laboratory, lr) for lr in (LR, LARGE_LR)]
    return claims, [*panels, _threshold_panel(nets), _restart_panel(nets["squared error"][0]["restarts"])]


def _runs(batch_sizes: Sequence[int], sampling: str, seed: int, lr: float = LR) -> dict[str, Any]:
    settings = {"lr": lr, "most": MOST, "runs": RUNS, "steps": STEPS}
    return {**settings, "batch_sizes": list(batch_sizes), "sampling": sampling, "seed": seed}


def _full_heat_panel(laboratory: Laboratory, lr: float) -> Panel:
    groups = [list(range(first, first + 10)) for first in (1, 11, 21, 31)]
    found = []
    for group in groups:
        found += laboratory.part(f"heat-{lr:g}-{group[0]}", diverged_for, **_runs(group, "bernoulli", 0, lr))
    return _heat_panel(lr, [size for group in groups for size in group], found)


def _heat_panel(lr: float, sizes: Sequence[int], found: Sequence[Mapping[str, Sequence[float]]]) -> Panel:
    rows = [[one["end"][i] for one in found] for i in range(MOST)]
    curves = {
        "theorem 1: diverges below": [theorem1_boundary(lr, size) for size in sizes],
        "theorem 2 and mean square": [theorem2_boundary(lr, size) for size in sizes],
        "typical (Lyapunov)": [typical_boundary(lr, size, "bernoulli") for size in sizes],
    }
    lines = []
    for label, values in curves.items():
        shown = [(size, value) for size, value in zip(sizes, values, strict=True) if value <= MOST]
        lines.append(Line(label, [size for size, _ in shown], [value for _, value in shown]))
    return Panel(
        f"{NUM_EXAMPLES} examples, λ₁(H) = 2, η = {lr:g}",
        "batch size B [examples]",
        "coherence σ",
        lines,
        x_log=True,
        heat=Heat(sizes, list(range(1, MOST + 1)), rows, f"share of {RUNS} runs diverged"),
    )


def _threshold_panel(nets: Mapping[str, Sequence[Mapping[str, Any]]]) -> Panel:
    lines = []
    for label, loss, kind, i in (
        ("half squares", "squared error", "bernoulli", 0),
        ("half squares, no repl.", "squared error", "without_replacement", 0),
        ("logistic", "logistic", "bernoulli", 0),
        ("logistic, theorem 1", "logistic", "bernoulli", 2),
    ):
        shares = [t[i] / t[3] for t in nets[loss][0]["thresholds"][kind]]
        lines.append(Line(label, NET_BATCH_SIZES, shares, marker=True))
    return Panel(
        "exact thresholds of trained networks, seed 0",
        "batch size B [examples]",
        "learning rate / (2/λ₁(H))",
        lines,
        x_log=True,
    )


def _restart_panel(restarts: Mapping[str, Mapping[str, Sequence[float]]]) -> Panel:
    lines = []
    for share, run in restarts.items():
        steps = list(range(len(run["mean"])))
        lines.append(Line(f"{share} of the threshold", steps, run["mean"], run["error"]))
        lines.append(Line(f"{share}, linear theory", steps, run["predicted"]))
    return Panel("SGD from an optimum, B = 1, 200 runs, seed 0", "step", "mean loss", lines, y_log=True)


STUDY = Study(
    name="coherence",
    title="Stability of SGD from the coherence of Hessians",
    paper="Dexter et al., A Precise Characterization of SGD Stability Using Loss Surface Geometry, 2024",
    setting=f"Family of the paper: {NUM_EXAMPLES} rank-one Hessians, σ of them on one axis, λ₁(H) = 2; {STEPS} steps "
    f"of SGD, {RUNS} runs for each setting, diverged when the last ‖w‖² is above 1000 times the first; three seeds on "
    f"the boundary, one in the figure. Networks: tanh 64-16-1 on {NUM_DIGITS} handwritten digits (3 and 8), float64, "
    "trained by full-batch Adam (3e-3) to a loss of 4e-9 (half squared error) or 2.8e-5 (logistic); tanh 64-16-10 on "
    f"{NUM_DIGITS} digits to 4e-9; three initial weights.",
    investigate=investigate,
)
