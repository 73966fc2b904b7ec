"""The study of the UV model, its route to chaos, and how far nets on digits follow it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import uv_experiments as uv
from . import uv_real_nets as nets
from .laboratory import Laboratory
from .result import Claim, Line, Panel

PAPER = "Kalra et al. 2025"
EXPECTED_DOUBLINGS = (1.0, 1.23607, 1.28802, 1.29922)
BOUNDED = {1.5: 1.0, 1.6: 1.0, 1.7: 1.0, 1.8: 0.95, 1.9: 0.55, 1.96: 0.0, 1.98: 0.0}
STARTS = (0.02, 0.2, 1.0)
LABEL_SEARCH = {"steps": 1500, "start": 0.03, "factor": 1.1}
CLASS_SEARCH = {"steps": 1500, "start": 0.5, "factor": 1.1}
CODE_SEARCH = {"steps": 1200, "start": 0.4, "factor": 1.1}
OVER = 1.5
EDGE = (1.9, 2.3)


def listed(values: Sequence[float], digits: int) -> str:
    return ", ".join(f"{value:.{digits}g}" if digits < 4 else f"{value:.{digits}f}" for value in values)


# --- the route to chaos ---------------------------------------------------------------------------------------------


def cascade(lab: Laboratory) -> tuple[list[Claim], list[Panel]]:
    """Doublings, what stays bounded, the bifurcation diagram and the Lyapunov exponent."""
    brackets = lab.part("doublings", uv.doublings, burn_in=20000 if lab.quick else 60000, width=1e-4)
    middles = [(a + b) / 2 for a, b in brackets]
    exact = uv.exact_doublings()
    gaps = uv.ratios(middles)
    Ys = list(BOUNDED)
    steps, starts = (2000, 100) if lab.quick else (20000, 400)
    shares = {
        size: lab.part(f"bounded-{size:g}", uv.bounded, Ys=Ys, largest_start=size, starts=starts, steps=steps, seed=0)
        for size in STARTS
    }
    shown = "; ".join(
        f"starts up to {size:g}: " + ", ".join(f"{share:.2f}" for share in found) for size, found in shares.items()
    )
    error = 3 * 0.5 / math.sqrt(starts)
    small = dict(zip(Ys, shares[uv.LARGEST_START], strict=True))
    claims = [
        Claim(
            "The orbit doubles its period at Y = 1, √5 − 1, 1.28802, 1.29922",
            f"{PAPER}, route to chaos; values derived here",
            "within 5e-4, for the map of (F, L) by iteration",
            listed(middles, 5) + "; where the multiplier on the manifold is −1: " + listed(exact, 6),
            all(abs(a - b) < 5e-4 for a, b in zip(middles, EXPECTED_DOUBLINGS, strict=True)),
        ),
        Claim(
            "The distances of the doublings shrink by Feigenbaum's ratio",
            f"{PAPER}, route to chaos; Feigenbaum's constant 4.669",
            "ratios 4.54 and 4.64, to 0.2",
            f"{listed(gaps, 3)} by iteration, {listed(uv.ratios(exact), 4)} from the multipliers",
            all(abs(a - b) < 0.2 for a, b in zip(gaps, (4.54, 4.64), strict=True)),
        ),
        Claim(
            "Every small start stays bounded up to Y = 1.7",
            "own reference run",
            "share 1.0 at Y = 1.5, 1.6, 1.7",
            f"{listed([small[Y] for Y in (1.5, 1.6, 1.7)], 2)} of {starts} starts, A and B uniform up to "
            f"{uv.LARGEST_START:g}, {steps} steps",
            all(small[Y] == 1.0 for Y in (1.5, 1.6, 1.7)),
        ),
        Claim(
            "Beyond it a share of small random starts is lost",
            "own reference run, of unknown start sizes",
            "0.95 at Y = 1.8, 0.55 at 1.9, 0 from 1.96 on",
            f"at Y = {', '.join(f'{Y:g}' for Y in Ys)}: {shown} ({starts} starts, {steps} steps)",
            all(abs(small[Y] - BOUNDED[Y]) <= error for Y in (1.8, 1.9, 1.96, 1.98)),
            "the basin is fractal and the share is set by how large the starts are, which the reference does not say; "
            "on the manifold itself the interval is lost at Y = 2",
        ),
    ]
    return claims, _diagrams(lab)


def _diagrams(lab: Laboratory) -> list[Panel]:
    Ys = [float(Y) for Y in np.linspace(0.8, 1.98, 60 if lab.quick else 237)]
    found = lab.part("diagram", uv.diagram, Ys=Ys, burn_in=1000 if lab.quick else 4000, keep=48)
    kept = [(Y, e) for Y, e in zip(Ys, found["exponents"], strict=True) if e is not None and e > -3]
    lines = [Line("last 48 steps", found["x"], found["y"], points=True)]
    lines += [Line(f"Y = {Y:.4f}", [Y, Y], [0.0, 1.0]) for Y in uv.exact_doublings(3)]
    return [
        Panel("UV model: route to chaos", "η / η_c", "η λ_max at late steps", lines, levels={"2": 2.0}),
        Panel(
            "UV model: largest Lyapunov exponent",
            "η / η_c",
            "exponent (1/step)",
            [Line("", [Y for Y, _ in kept], [e for _, e in kept])],
            levels={"0": 0.0},
        ),
    ]


# --- nets on digits -------------------------------------------------------------------------------------------------


def real_nets(lab: Laboratory) -> tuple[list[Claim], list[Panel]]:
    """Nets on digits beyond their largest convergent learning rate."""
    seeds = [0] if lab.quick else [0, 1, 2]
    searches = {"label": LABEL_SEARCH, "classes": CLASS_SEARCH, "autoencoder": CODE_SEARCH}
    found: dict[str, list[dict[str, Any]]] = {task: [] for task in searches}
    limits: dict[str, list[float]] = {task: [] for task in searches}
    for task, search in searches.items():
        search = {**search, "steps": 600} if lab.quick else search
        for seed in seeds:
            limit = lab.part(f"limit-{task}-{seed}", nets.largest_convergent, task=task, seed=seed, **search)
            limits[task].append(limit)
            for factor in (OVER, 2.5, 4.0) if task == "autoencoder" else (OVER,):
                found[task].append(_late(lab, task, seed, round(factor * limit, 6)))
    return _net_claims(found, limits, len(seeds)), _net_panels(lab, limits)


def _late(lab: Laboratory, task: str, seed: int, lr: float) -> dict[str, Any]:
    burn_in = 600 if lab.quick else 1500 if task == "autoencoder" else 4000
    keep = 24 if lab.quick else 48
    return lab.part(f"late-{task}-{seed}-{lr:g}", nets.late, task=task, seed=seed, lr=lr, burn_in=burn_in, keep=keep)


def _net_claims(
    found: Mapping[str, Sequence[Mapping[str, Any]]], limits: Mapping[str, Sequence[float]], num_seeds: int
) -> list[Claim]:
    label = [run for run in found["label"] if run["fate"] == "trains"]
    codes = [run for run in found["autoencoder"] if run["fate"] == "trains"]
    lost = [f"η = {run['lr']:g} {run['fate']}" for run in found["autoencoder"] if run["fate"] != "trains"]
    rates = f"largest convergent η {listed(limits['label'], 3)}"
    alternate = len(label) == num_seeds and all(run["alternating"] >= 0.9 for run in label)
    return [
        Claim(
            "Beyond the largest convergent η a tanh net settles at the edge",
            f"{PAPER}, real nets",
            f"late mean of η λ_max in [{EDGE[0]:g}, {EDGE[1]:g}] at {OVER:g} times it",
            f"{listed([run['mean'] for run in label], 4)}; {rates} ({num_seeds} seeds)",
            len(label) == num_seeds and all(EDGE[0] <= run["mean"] <= EDGE[1] for run in label),
            "one output, the label, like the UV model's; chosen after a look at ten outputs, reported below. The "
            "largest convergent η is sought from below in steps of 10 %: a first search by bisection had found 0.21 at "
            "seed 0, where the net converges again after a catapult",
        ),
        Claim(
            "There the gradient along the top eigenvector changes its sign at every step, as D does in the UV model",
            f"{PAPER}, real nets",
            "at >= 95 % of the steps",
            listed([100 * run["projection"] for run in label], 3) + " %",
            len(label) == num_seeds and all(run["projection"] >= 0.95 for run in label),
        ),
        Claim(
            "There the loss rises and falls in turn",
            f"{PAPER}, real nets",
            "its changes alternate in sign at >= 90 % of the steps",
            listed([100 * run["alternating"] for run in label], 3) + " %",
            alternate,
            ""
            if alternate
            else "near the onset the residual is nearly the same on both sides but for its sign, so the loss, its "
            "square, hardly alternates, and a slow fall in other directions can hide it; the sign itself is above",
        ),
        _classes(found["classes"], limits["classes"]),
        Claim(
            "A ReLU autoencoder follows the first step of the route: late sharpness of period two, blurred by slow "
            "fluctuations",
            f"{PAPER}, bifurcation diagrams of real nets",
            "at 2.5 times the largest convergent η more than half of the variance of the late η λ_max is at period "
            "two, and no orbit has an exact period (tolerance 1e-6)",
            "; ".join(
                f"η = {run['lr']:.3g}: {100 * run['period_two']:.0f} %, period {run['period']}, mean η λ_max "
                f"{run['mean']:.3f}"
                for run in codes
            )
            + (f"; {', '.join(lost)}" if lost else "")
            + f" (largest convergent η {listed(limits['autoencoder'], 3)})",
            _alternates(found["autoencoder"], limits["autoencoder"]),
            "chosen as a task whose targets lie along the largest directions of the data, after tanh nets on labels "
            "had shown period two with a small amplitude only",
        ),
    ]


def _classes(runs: Sequence[Mapping[str, Any]], limits: Sequence[float]) -> Claim:
    shown = [
        f"{run['mean']:.4f}, {100 * run['projection']:.3g} %, {100 * run['alternating']:.3g} %"
        if run["fate"] == "trains"
        else run["fate"]
        for run in runs
    ]
    return Claim(
        "The same net with ten outputs, one for each class",
        f"{PAPER}, real nets",
        f"reported, at {OVER:g} times the largest convergent η: late mean of η λ_max, share of the steps at which the "
        "gradient along the top eigenvector changes its sign, share at which the loss alternates",
        f"{'; '.join(shown)} (largest convergent η {listed(limits, 3)}, {len(runs)} seeds)",
        None,
    )


def _alternates(runs: Sequence[Mapping[str, Any]], limits: Sequence[float]) -> bool:
    middle = [run for run in runs if any(abs(run["lr"] / limit - 2.5) < 1e-3 for limit in limits)]
    return len(middle) == len(limits) and all(
        run["fate"] == "trains" and run["period_two"] > 0.5 and run["period"] is None for run in middle
    )


def _net_panels(lab: Laboratory, limits: Mapping[str, Sequence[float]]) -> list[Panel]:
    late = []
    for task, name, highest, num in (("autoencoder", "ReLU autoencoder", 6.0, 22), ("label", "tanh, label", 5.0, 12)):
        limit = limits[task][0]
        factors = [float(f) for f in np.geomspace(0.8, highest, 5 if lab.quick else num)]
        runs = [(f, _late(lab, task, 0, round(f * limit, 6))) for f in factors]
        dots = [(f, value) for f, run in runs if run["fate"] == "trains" for value in run["edge"]]
        late.append(Line(name, [f for f, _ in dots], [value for _, value in dots], points=True))
    curves = []
    for factor in (0.8, 1.5, 3.0):
        lr, steps = round(factor * limits["autoencoder"][0], 6), 40 if lab.quick else 120
        settings = {"task": "autoencoder", "seed": 0, "lr": lr, "steps": steps, "every": 1}
        run = lab.part(f"sharpening-{factor:g}", nets.sharpening, **settings)
        curves.append(Line(f"η = {lr:.2g}", run["step"], run["edge"]))
    axis = "η / largest convergent η"
    return [
        Panel("ReLU autoencoder: sharpness of a run", "step", "η λ_max", curves, levels={"2": 2.0}),
        Panel("Nets on digits: late sharpness", axis, "η λ_max at late steps", late, levels={"2": 2.0}),
    ]
