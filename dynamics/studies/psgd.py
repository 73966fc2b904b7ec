"""PSGD: does its preconditioner become the inverse Hessian, how fast, how steadily, and what does it cost?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from .laboratory import Laboratory
from .psgd_parts import equivariance, kronecker, low_rank, noise_response, overhead, rosenbrock_descent, x_shaped
from .result import Claim, Line, Panel
from .study import Study

PAPER = "Pooladzandi, Li: Curvature-Informed SGD via General Purpose Lie-Group Preconditioners, 2024"
SOURCE = "Pooladzandi, Li 2024"


def investigate(lab: Laboratory) -> tuple[list[Claim], list[Panel]]:
    quick = lab.quick
    instances = 1 if quick else 5
    marks = [10, 30, 100, 300, 1000, 2000, 4000]
    definite = lab.part("x-definite", x_shaped, indefinite=False, decay=False, instances=instances, marks=marks)
    mixed = lab.part("x-indefinite", x_shaped, indefinite=True, decay=False, instances=instances, marks=marks)
    decayed = lab.part(
        "x-indefinite-decay", x_shaped, indefinite=True, decay=True, instances=instances,
        marks=marks if quick else [*marks, 20000],
    )  # fmt: skip
    rank_marks = [10, 100, 1000, 2500, 5000] if quick else [10, 100, 1000, 5000, 20000, 40000]
    ranked = lab.part("low-rank", low_rank, instances=1 if quick else 3, marks=rank_marks)
    products = lab.part("kronecker", kronecker, instances=instances, marks=[10, 100, 1000, 4000])
    descents = {
        kind: [
            lab.part(f"rosenbrock-{kind}-{seed}", rosenbrock_descent, kind=kind, steps=3000, every=25, seed=seed)
            for seed in range(1 if quick else 3)
        ]
        for kind in ("xmat", "lra")
    }
    moved = lab.part("equivariance", equivariance, normalizer="2nd", steps=200, seeds=2 if quick else 5)
    moved_first = lab.part("equivariance-1st", equivariance, normalizer="1st", steps=200, seeds=2 if quick else 5)
    rates = [0.1, 0.05, 0.025]
    noisy = {
        noise: [
            lab.part(
                f"noise-{noise}-{i}",
                noise_response,
                rates=rates,
                probes=4000 if quick else 20000,
                noise=noise,
                instance=i,
            )
            for i in range(1 if quick else 3)
        ]
        for noise in (0.5, 43.0)
    }
    cost = lab.part("overhead", overhead, repeats=30 if quick else 200)
    claims = [
        *_convergence_claims(definite, mixed, decayed, ranked, products, rank_marks, quick),
        *_training_claims(descents, moved, moved_first, noisy, rates, cost),
    ]
    return claims, _panels(marks, definite, mixed, ranked, rank_marks, descents, noisy, rates)


def _convergence_claims(
    definite: Any, mixed: Any, decayed: Any, ranked: Any, products: Any, rank_marks: list[int], quick: bool
) -> list[Claim]:
    ends = [curve[-1] for curve in definite]
    mixed_ends, decayed_ends = [curve[-1] for curve in mixed], [curve[-1] for curve in decayed]
    kron_ends = [curve[-1] for curve in products]
    claims = [
        Claim(
            "XMat becomes the inverse of a positive definite X-shaped Hessian (n = 10, condition number 86)",
            f"{SOURCE}, section 3; limit set here",
            "||P H - I||_2 <= 1e-3 after 4000 probes",
            _spread(ends),
            max(ends) <= 1e-3,
        ),
        Claim(
            "XMat becomes |H|^-1 of an indefinite X-shaped Hessian, both signs in every pair, at the constant rate 0.1",
            f"{SOURCE}, section 2: minimum of the criterion",
            "relative error <= 0.02 after 4000 probes, in every instance",
            _spread(mixed_ends),
            max(mixed_ends) <= 0.02,
            "at |H|^-1 the update vanishes in the mean only: Q h and Q^-T v differ where the signs do, so a constant "
            "rate leaves fluctuations of order sqrt(rate)",
        ),
        Claim(
            "The same with a rate that falls as 0.1 / sqrt(1 + t/100)",
            "derived here",
            f"relative error <= 0.02 after {4000 if quick else 20000} probes, median instance",
            _spread(decayed_ends),
            median(decayed_ends) <= 0.02 if not quick else None,
            "" if not quick else "4000 probes are too few to judge",
        ),
        Claim(
            "Kron becomes the inverse of a Kronecker product of Hessians (4 x 5)",
            "Li, Preconditioned Stochastic Gradient Descent, 2018, section 4",
            "||P H - I||_2 <= 1e-3 after 4000 probes",
            _spread(kron_ends),
            max(kron_ends) <= 1e-3,
        ),
    ]
    conditions = f"condition number of H {min(ranked['conditions']):.0f} to {max(ranked['conditions']):.0f}"
    for mark, limit in ((1000, 4.0), (5000, 1.6), (20000, 1.1), (40000, 1.1)):
        if mark in rank_marks:
            values = [curve[rank_marks.index(mark)] for curve in ranked["results"]]
            claims.append(
                Claim(
                    f"LRA of rank 3 on diagonal + rank 3 (n = 30) has conditioned the Hessian after {mark} probes",
                    f"{SOURCE}, section 3; limits set here, from one Hessian of condition number 153"
                    if mark < 40000
                    else "derived here: pairs without noise leave no fluctuation",
                    f"median cond(Q H Q^T) <= {limit}",
                    f"{_spread(values)}; {conditions}",
                    median(values) <= limit,
                    "how fast depends on the instance",
                )
            )
    return claims


def _training_claims(
    descents: Any, moved: float, moved_first: float, noisy: Any, rates: list[float], cost: Any
) -> list[Claim]:
    claims = []
    for kind, curves in descents.items():
        ends = [curve[-1][1] for curve in curves]
        claims.append(
            Claim(
                f"{kind}, learning rate 0.5, descends 50 Rosenbrock valleys (100 coordinates) from 50",
                f"{SOURCE}, experiments; limit set here",
                "loss < 0.5 after 3000 steps, every seed",
                _spread(ends),
                max(ends) < 0.5,
            )
        )
    claims += [
        Claim(
            "XMat is equivariant under diagonal changes of coordinates, normalizer '2nd'",
            f"{SOURCE}, section 2: Lie group; derived here: Q' = Q D has the same Q h and Q^-T v",
            "|theta - D theta'| <= 1e-10 over 200 steps",
            f"{moved:.1e}",
            moved <= 1e-10,
        ),
        Claim(
            "So it is with the normalizer '1st'",
            "derived here",
            "|theta - D theta'| <= 1e-10 over 200 steps",
            f"{moved_first:.1e}",
            moved_first <= 1e-10,
        ),
    ]
    for noise, runs in noisy.items():
        size = "half the smallest eigenvalue" if noise < 1 else "half the largest eigenvalue"
        ratios = [run["fluctuation"][i] / run["fluctuation"][i + 1] for run in runs for i in range(len(rates) - 1)]
        sizes = ", ".join(f"{median(r['fluctuation'][i] for r in runs):.3f} at {rate}" for i, rate in enumerate(rates))
        worst, secant = max(max(run["worst"]) for run in runs), [run["secant"] for run in runs]
        claims += [
            Claim(
                f"With noisy pairs (h = H v + {noise:g} w, {size}) P fluctuates in proportion to sqrt(rate)",
                "derived here",
                "every halving of the rate divides the rms by 1.35 to 1.7",
                f"{_spread(ratios)}; rms / ||P*||: {sizes}",
                all(1.35 <= ratio <= 1.7 for ratio in ratios),
            ),
            Claim(
                f"On these pairs (noise {noise:g}) the fit stays near P*, and BFGS secant updates diverge",
                f"{SOURCE}, introduction: robustness to noise",
                "largest ||P - P*|| / ||P*|| < 1 for PSGD, > 10 for BFGS, both begun at P*",
                f"PSGD {worst:.2f}; BFGS {_spread(secant)}",
                worst < 1 and min(secant) > 10,
                "" if noise > 1 else "noise below every eigenvalue leaves vᵀ h positive, so BFGS survives it",
            ),
        ]
    parts = {name: cost[name] / cost["SGD"] for name in ("product", "hvp", "difference", "whiten")}
    shown = f"SGD {1e3 * cost['SGD']:.2f} ms; "
    claims.append(
        Claim(
            "A step of XMat with an exact Hessian product costs at most three of SGD (digits network, full batch)",
            f"{SOURCE}, abstract: small overhead; limit derived here",
            "processor time ratio <= 3",
            shown + ", ".join(f"{name} {ratio:.2f}" for name, ratio in parts.items()),
            parts["hvp"] <= 3,
            "least processor time of many steps, taken in turns; 'product' is a gradient and a Hessian product "
            "without an optimizer",
        )
    )
    return claims


def _panels(
    marks: list[int], definite: Any, mixed: Any, ranked: Any, rank_marks: list[int], descents: Any, noisy: Any,
    rates: list[float],
) -> list[Panel]:  # fmt: skip
    fit = [
        Line("definite: ||P H - I||", marks, [median(c[i] for c in definite) for i in range(len(marks))], marker=True),
        Line("indefinite: to |H|^-1", marks, [median(c[i] for c in mixed) for i in range(len(marks))], marker=True),
    ]
    condition = [median(c[i] for c in ranked["results"]) for i in range(len(rank_marks))]
    valleys = [
        Line(f"{kind}, seed {seed}", [s for s, _ in curve], [loss for _, loss in curve])
        for kind, curves in descents.items()
        for seed, curve in enumerate(curves[:2])
    ]
    fluctuations = []
    for noise, runs in noisy.items():
        sizes = [median(run["fluctuation"][i] for run in runs) for i in range(len(rates))]
        fluctuations.append(Line(f"noise {noise:g}", rates, sizes, marker=True))
        fluctuations.append(Line("sqrt(rate)", rates, [sizes[0] * math.sqrt(rate / rates[0]) for rate in rates]))
    return [
        Panel("XMat on X-shaped Hessians", "probes", "error", fit, x_log=True, y_log=True),
        Panel(
            "LRA on diagonal + rank 3", "probes", "condition number of Q H Qᵀ",
            [Line("median", rank_marks, condition, marker=True)], x_log=True, y_log=True,
        ),
        Panel("Rosenbrock, 100 coordinates", "step", "loss", valleys, y_log=True, levels={"0.5": 0.5}),
        Panel(
            "Fluctuation under noisy pairs", "rate of the fit", "rms of P / ||P*||",
            fluctuations, x_log=True, y_log=True,
        ),
    ]  # fmt: skip


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"median {median(values):.3g}, {min(values):.3g} to {max(values):.3g} in {len(values)}"


STUDY = Study(
    name="psgd",
    title="Preconditioners on Lie groups (PSGD)",
    paper=PAPER,
    setting=(
        "Quadratics of 10 to 30 coordinates with known Hessians, 50 Rosenbrock functions side by side, and the digits "
        "network, 64-100-100-10, full batch; float64 but for the network; rate of the fit 0.1, normalizer '2nd'; up to "
        "five instances."
    ),
    investigate=investigate,
)
