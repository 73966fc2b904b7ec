"""Why warm up the learning rate: catapults, natural trends of the sharpness, the boundary of training, GI-Adam."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from . import warmup_runs as runs
from . import warmup_training as training
from .claim_numbers import listed
from .laboratory import Laboratory
from .result import Claim, Panel
from .study import Study
from .warmup_mechanisms import mechanisms
from .warmup_training import BOUNDARY_STEPS, PAPER, REFERENCE, first_sharpness, seeds_of

# Largest η_c gᵀHg / (2 gᵀg) that the search gives with δ = 0.1 where the loss is a parabola.
PARABOLA = (1 + math.sqrt(1.1)) / 2


def investigate(lab: Laboratory) -> tuple[list[Claim], list[Panel]]:
    """All claims, and the six panels."""
    trends, mechanism_panels = mechanisms(lab)
    boundary, boundary_panel = training.boundary(lab)
    failure, failure_panel = training.failure(lab)
    edge, edge_panel = training.edge(lab)
    claims = [*_exact(lab), *_search(lab), *boundary, *trends, *failure, *edge, *_reach(lab)]
    return claims, [*mechanism_panels, boundary_panel, failure_panel, edge_panel]


# --- exact statements -----------------------------------------------------------------------------------------------


def _exact(lab: Laboratory) -> list[Claim]:
    seeds = seeds_of(lab)
    first = [lab.part(f"first-{s}", runs.first_step, seed=s) for s in seeds]
    ratios = [run["gi"] / run["adam"] for run in first]
    apart = max(lab.part(f"equal-{s}", runs.equal_sizes, steps=300, seed=s) for s in seeds)
    below, above = runs.companion_radius(1 - 1e-6), runs.companion_radius(1 + 1e-6)
    near = [runs.companion_radius(share) for share in (0.999, 1.001)]
    error = max(max(run["adam_error"], run["gi_error"]) for run in first)
    return [
        Claim(
            "GI-Adam divides the first preconditioned sharpness of Adam by 1/√(1 − β₂)",
            PAPER,
            "ratio √(1 − β₂) = 0.03162 within 0.5 %, where P of Adam is (1 − β₁)(|g| + eps)",
            "; ".join(
                f"{run['adam']:.1f} -> {run['gi']:.2f}, {ratio:.5f}" for run, ratio in zip(first, ratios, strict=True)
            )
            + f" (tanh 64-12-12-10, {first[0]['parameters']} weights, {len(seeds)} seeds; off the dense eigenvalue by "
            f"{error:.0e}, P off by {max(run['P_error'] for run in first):.0e})",
            all(abs(ratio / math.sqrt(0.001) - 1) < 0.005 for ratio in ratios)
            and all(r["P_error"] < 1e-9 for r in first),
            "the reference's 43072.6 -> 1363.3 is of other initial weights; eps is all that keeps the ratio from being "
            "exact",
        ),
        Claim(
            "A random second moment of the same size (RI-Adam) lowers it as well",
            f"{PAPER}, appendix",
            "reported",
            "RI-Adam over Adam: " + listed([run["ri"] / run["adam"] for run in first]),
            None,
        ),
        Claim(
            "With gradients of constant size GI-Adam is Adam with the rate η √(1 − β₂ᵗ)",
            "derived here",
            "to 1e-12 over 300 steps, eps = 0",
            f"{apart:.1e}",
            apart <= 1e-12,
        ),
        Claim(
            "Momentum as an average loses stability at (2 + 2β₁)/((1 − β₁) η)",
            f"{PAPER}; Cohen et al. 2022, section 2",
            "spectral radius of the companion matrix crosses 1 within ±1e-6 of it; 0.9487 and 1.0301 at ∓0.1 %",
            f"{below:.7f} and {above:.7f} at ∓1e-6; {near[0]:.4f} and {near[1]:.4f} at ∓0.1 %",
            below < 1 < above and abs(near[0] - 0.9487) < 1e-4 and abs(near[1] - 1.0301) < 1e-4,
        ),
    ]


# --- the initial learning rate --------------------------------------------------------------------------------------


def _search(lab: Laboratory) -> list[Claim]:
    seeds = seeds_of(lab)
    claims = []
    for small, name in ((True, "tanh 64-12-12-10"), (False, "ReLU 64-128-128-128-10")):
        found = [
            lab.part(
                f"search-{'small' if small else 'wide'}-{s}", runs.search, seed=s, rule="SGD", delta=0.1, small=small
            )
            for s in seeds
        ]
        ratios = [run["lr"] / run["along_gradient"] for run in found]
        holds = all(1 <= r <= 1.3 for r in ratios) and all(run["lr"] >= run["sharpest"] for run in found)
        claims.append(
            Claim(
                f"The search by forward passes finds the instability of gradient descent: {name}",
                f"{PAPER}, search of η_init; bounds of an {REFERENCE}",
                "η_c in [1, 1.3] times 2 gᵀg/(gᵀHg), and at least 2/λ_max",
                f"{listed(ratios)} times; in units of 2/λ_max "
                + ", ".join(
                    f"{run['lr'] / run['sharpest']:.3g} vs {run['along_gradient'] / run['sharpest']:.3g}"
                    for run in found
                ),
                holds,
                "the net of the reference is not stated (2.13 vs 2.06)" + ("" if holds else _bent(found)),
            )
        )
    lines = [
        lab.part(f"parabola-{l:g}-{d:g}", runs.parabola, curvature=l, delta=d)
        for l in (0.3, 1.7, 40.0)
        for d in (0.1, 0.01)
    ]
    claims.append(
        Claim(
            "On a parabola of curvature l the search ends in (2/l, (1 + √(1 + δ))/l]",
            "derived here from the loss ratio (1 − ηl)²",
            "for l = 0.3, 1.7, 40 and δ = 0.1, 0.01",
            "η l = " + ", ".join(f"{2 * line['lr'] / line['low']:.4f}" for line in lines),
            all(line["low"] * (1 - 1e-12) < line["lr"] <= line["high"] for line in lines),
        )
    )
    return claims


def _bent(found: Sequence[Mapping[str, Any]]) -> str:
    """What the searches that ended within δ = 0.1 say of the loss along the gradient."""
    ended = [run["lr"] / run["along_gradient"] for run in found if run["converged"]]
    beyond = sum(not 1 <= ratio <= PARABOLA for ratio in ended)
    return (
        f"; {len(ended)} of {len(found)} searches ended within δ, {beyond} of them outside [1, {PARABOLA:.4f}], where "
        "every one would end if the loss along so long a step were a parabola"
    )


def _budget(searches: Mapping[str, Sequence[Mapping[str, Any]]]) -> Claim:
    ended = [run["converged"] for some in searches.values() for run in some]
    passes = [
        f"{name} " + ", ".join(f"{run['passes']}{'' if run['converged'] else ' (unfinished)'}" for run in some)
        for name, some in searches.items()
    ]
    return Claim(
        "The search takes at most 20 forward passes",
        f"{PAPER}, search of η_init, some ten passes; bound of an {REFERENCE}",
        "it ends within δ before they are spent: gradient descent from 1e-4 with δ = 0.1, Adam from 1e-6 with δ = 0.01",
        f"{sum(ended)} of {len(ended)} searches; passes: {'; '.join(passes)}",
        all(ended),
        "" if all(ended) else "20 passes are the budget; an unfinished search has not met δ at the rate it returns",
    )


def _reach(lab: Laboratory) -> list[Claim]:
    seeds, warmup = seeds_of(lab), 256
    found = [lab.part(f"search-wide-{s}", runs.search, seed=s, rule="SGD", delta=0.1, small=False) for s in seeds]
    adam = [lab.part(f"search-adam-{s}", runs.search, seed=s, rule="Adam", delta=0.01, small=False) for s in seeds]
    first = [first_sharpness(lab, s, zero_output=False) for s in seeds]
    rows = []
    for run, sharpness in zip(found, first, strict=True):
        for c in (8, 32, 128):
            target = c / sharpness
            rows.append((runs.reached(target, run["lr"], warmup), warmup * (1 - min(1.0, run["lr"] / target))))
    small = [lab.part(f"search-small-{s}", runs.search, seed=s, rule="SGD", delta=0.1, small=True) for s in seeds]
    searches = {"gradient descent, tanh": small, "gradient descent, ReLU": found, "Adam, ReLU": adam}
    trained = [
        _from_threshold(lab, s, run["lr"], 32 / sharpness)
        for s, run, sharpness in zip(seeds, found, first, strict=True)
    ]
    jumps = [
        lab.part(f"persistent-{s}", runs.persistent, seed=s, rate=32 / sharpness, steps=150)
        for s, sharpness in zip(seeds, first, strict=True)
    ]
    return [
        Claim(
            "From η_init = η_c at the same rate the target comes after T_wrm (1 − η_c/η_trgt) steps",
            f"{PAPER}, search of η_init",
            "within one step, η_trgt = 8, 32, 128 / λ_0, T_wrm = 256",
            ", ".join(f"{measured} ({formula:.1f})" for measured, formula in rows),
            all(abs(measured - max(1.0, formula)) <= 1 for measured, formula in rows),
        ),
        _budget(searches),
        Claim(
            "To start from η_c does no harm",
            f"{PAPER}, search of η_init",
            "final loss at most 1.2 times that of a start from 0, T_wrm = 64, c = 32, 300 steps",
            "; ".join(f"{from_threshold:.2e} vs {from_zero:.2e}" for from_threshold, from_zero in trained),
            all(a <= 1.2 * b for a, b in trained),
        ),
        Claim(
            "Warmup by persistent catapults reaches c = 32 by itself",
            f"{PAPER}, persistent catapult warmup",
            "reported",
            "; ".join(
                f"at step {run['reached']} after {run['estimates']} searches, loss {run['loss'][-1]:.2e}"
                for run in jumps
            ),
            None,
            "δ = 0.1, 150 steps",
        ),
    ]


def _from_threshold(lab: Laboratory, seed: int, init: float, rate: float) -> tuple[float, float]:
    ends = []
    for name, start in (("threshold", init), ("zero", 0.0)):
        run = lab.part(
            f"from-{name}-{seed}", runs.warmed, seed=seed, rate=rate, warmup_steps=64, steps=BOUNDARY_STEPS, init=start
        )
        ends.append(run["loss"][-1])
    return ends[0], ends[1]


STUDY = Study(
    name="warmup",
    title="Why warm up the learning rate: catapults, the boundary of training, GI-Adam",
    paper="Kalra and Barkeshli, Why Warmup the Learning Rate? Underlying Mechanisms and Improvements, NeurIPS 2024",
    setting="ReLU 64-128-128-128-10 without biases, standard parametrisation or with a zero last layer, on 500 "
    "handwritten digits, half squared error averaged over examples and outputs, full batch, float64. Gradient descent: "
    "300 steps, 256 where the sharpness is followed (η_trgt = 64/λ_0); Adam and GI-Adam: 200. Preconditioned "
    "sharpness: the same net with tanh, 1000 steps. Seeds 0 to 2 of the weights; curves and cells are those of seed 0, "
    "Adam's points geometric means with one standard deviation.",
    investigate=investigate,
)
