"""Accelerated SGD on least squares: what it gains in small eigendirections and loses in large ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..eigen_response import EigenResponse
from ..optimizers.accelerated import NesterovForm
from .accelerated_experiments import (
    PROBES,
    RULES,
    SPECTRUM,
    digits_run,
    exact_risks,
    growth,
    modes,
    recursions,
    simulated,
)
from .claim_numbers import listed
from .laboratory import Laboratory
from .result import Claim, Line, Panel
from .study import Study

PAPER = "Li et al. 2024"
DERIVED, OWN = "derived here", "own reference run"
STEPS, AVERAGE_FROM = 500, 251
MODULI, PLAIN = (0.94107, 0.98818, 0.99277, 0.99994413), (0.89765, 0.98977, 0.998977, 0.99998977)
FACTORS = [1.0, 2.0, 4.0, 6.0, 7.0, 8.0, 10.0, 15.0, 20.0, 30.0]
DIGITS_LR = 0.2


def investigate(lab: Laboratory) -> tuple[list[Claim], list[Panel]]:
    """All claims; the risk curves, the eigendirections, and the network."""
    claims, panel = _modes(lab)
    risk_claims, risk_panels = _risks(lab)
    digit_claim, digit_panels = _digits(lab)
    claims += [_simulation(lab), *risk_claims, _second_moments(lab), *_recursions(lab), digit_claim]
    return claims, [*risk_panels, panel, *digit_panels]


# --- modes ----------------------------------------------------------------------------------------------------------


def _modes(lab: Laboratory) -> tuple[list[Claim], Panel]:
    found = lab.part("modes", modes)
    low, high = found["range"]
    digits = [f"{value:.5f}" for value in found["moduli"][:3]] + [f"{found['moduli'][3]:.8f}"]
    plain = [f"{value:.5f}" for value in found["plain"][:2]] + [
        f"{found['plain'][2]:.6f}",
        f"{found['plain'][3]:.8f}",
    ]
    claims = [
        Claim(
            "The update of (w, v) has the eigenvalues of [[0, 1 − δλ], [−c, 1 + c − qλ]]",
            DERIVED,
            "<= 1e-12",
            f"{found['difference']:.1e} over 64 λ",
            found["difference"] <= 1e-12,
        ),
        Claim(
            f"Moduli of the modes at λ = {listed(PROBES)}",
            OWN,
            f"ASGD {listed(MODULI, '.8g')}; SGD {listed(PLAIN, '.8g')}, all digits",
            f"ASGD {', '.join(digits)}; SGD {', '.join(plain)}",
            all(
                abs(value - expected) <= 0.51 * 10.0 ** -len(f"{expected}".split(".")[1])
                for value, expected in zip(found["moduli"] + found["plain"], MODULI + PLAIN, strict=True)
            ),
        ),
        Claim(
            "The roots are complex for λ between λ_− and λ_+, and ASGD beats SGD there where δλ < 1 − c",
            OWN + "; " + DERIVED,
            "λ_− = 0.006686, λ_+ = 2.285, (1 − c)/δ = 0.131, all digits; the same k on both sides of it",
            f"{low:.6f}, {high:.3f}, {found['even']:.3f}; faster for k = "
            f"{', '.join(map(str, found['faster'])) or 'none'}",
            abs(low - 0.006686) < 5e-7
            and abs(high - 2.285) < 5e-4
            and abs(found["even"] - 0.131) < 5e-4
            and found["faster"] == found["below"],
        ),
        Claim(
            "For λ tending to 0, ASGD is as fast as SGD with the step (γ + δ)/2",
            DERIVED,
            "(q − cδ)/(1 − c) equal to it within 1e-12",
            f"{found['slow']:.1e} apart, relatively",
            abs(found["slow"]) <= 1e-12,
        ),
    ]
    values, response = np.geomspace(1e-4, 1, 60), EigenResponse(NesterovForm(*found["form"]))
    lines = [
        Line("ASGD", values.tolist(), (1 - response.modulus(values)).tolist()),
        Line("SGD", values.tolist(), (response.form.lr * values).tolist()),
    ]
    return claims, Panel("Decay of the mean error", "eigenvalue λ", "1 − |x| per step", lines, x_log=True, y_log=True)


# --- risk -----------------------------------------------------------------------------------------------------------


def _simulation(lab: Laboratory) -> Claim:
    seeds, runs, steps = (1 if lab.quick else 3), (1000 if lab.quick else 4000), 100
    found = [
        row
        for seed in range(seeds)
        for row in lab.part(f"simulated-{seed}", simulated, seed=seed, runs=runs, steps=steps)
    ]
    worst = max(found, key=lambda row: abs(row["sampled"] - row["exact"]) / row["error"])
    scores = [(row["sampled"] - row["exact"]) / row["error"] for row in found]
    return Claim(
        "The second moments of Gaussian least squares close in each eigendirection",
        DERIVED,
        f"exact and simulated risk ({runs} runs) within 4 standard errors",
        f"largest deviation {max(map(abs, scores)):.2g} in {len(found)} comparisons after {steps} steps, with and "
        f"without tail average, {seeds} seed{'s' if seeds > 1 else ''}; there ({worst['case']}) {worst['sampled']:.4g} "
        f"± {worst['error']:.1g} against {worst['exact']:.4g}; root mean square {_rms(scores):.2g}",
        max(map(abs, scores)) <= 4,
    )


def _risks(lab: Laboratory) -> tuple[list[Claim], list[Panel]]:
    found = lab.part("risks", exact_risks, steps=STEPS, average_from=AVERAGE_FROM)
    curves = {
        case: [np.array(found[f"{case}-{name}"]["curve"]) for name in RULES] for case in ("head", "tail", "variance")
    }
    head, tail, variance = (curve[0][1:] / curve[1][1:] for curve in curves.values())
    ahead = np.flatnonzero(tail < 1)
    crossed = f"ASGD is ahead from step {1 + int(ahead[0])}" if len(ahead) else f"never ahead in {STEPS} steps"
    claims = [
        Claim(
            "ASGD is slower than SGD on an error in a large eigendirection, e_1",
            PAPER + " (ii); " + OWN,
            "risk after 200 steps above 3 x that of SGD (4.2e-4 against 6.1e-5)",
            f"{_pair(curves['head'], 200)}, {head[199]:.2g} x",
            head[199] > 3,
        ),
        Claim(
            "ASGD is faster than SGD on an error in a small eigendirection, e_10",
            PAPER + " (i); " + OWN,
            "risk after 500 steps below 1/20 of that of SGD (2.3e-5 against 2.0e-3)",
            f"{_pair(curves['tail'], 500)}, 1/{1 / tail[499]:.3g}",
            tail[499] < 1 / 20,
        ),
        Claim(
            "On an error along e_10 both are equal near step 10",
            OWN,
            "ratio of the risks at step 10 in [0.95, 1.05]",
            f"{tail[9]:.3f}; {crossed}",
            0.95 <= tail[9] <= 1.05,
            "'equal' was read as within 5 %",
        ),
        Claim(
            "The variance of ASGD is always larger",
            PAPER + " (iii); " + OWN,
            "σ² = 0.01, w_0 = w*: above SGD at every t > 1, ratio in [2, 3] at t = 500 (1.23e-3 against 4.70e-4)",
            f"smallest ratio {variance[1:].min():.4f} for t > 1, {variance[499]:.3g} at t = 500 "
            f"({_pair(curves['variance'], 500)})",
            bool((variance[1:] > 1).all()) and 2 <= variance[499] <= 3,
            "at t = 1 both have made the same step w_1 = y_0 − δ g",
        ),
        _averaged(found),
        *_directions(found),
    ]
    return claims, _risk_panels(curves, found)


def _averaged(found: dict[str, Any]) -> Claim:
    ratios = {
        case: found[f"{case}-ASGD"]["average"] / found[f"{case}-SGD"]["average"]
        for case in ("head", "tail", "variance")
    }
    return Claim(
        "The three comparisons hold for the tail average as the output",
        PAPER,
        "risk of ASGD over that of SGD above 1 for e_1, below 1 for e_10, above 1 for the variance",
        ", ".join(f"{case} {ratio:.3g}" for case, ratio in ratios.items())
        + f"; average of w over steps {AVERAGE_FROM} to {STEPS}",
        ratios["head"] > 1 > ratios["tail"] and ratios["variance"] > 1,
    )


def _directions(found: dict[str, Any]) -> list[Claim]:
    early, late = np.array(found["early"]), np.array(found["ratios"])
    small = SPECTRUM < 0.131
    wrong = (early < 1) != small
    apart = (
        ""
        if not wrong.any()
        else f"not as claimed for k = {_ranges(wrong)}, ratios {early[wrong].min():.3g} to {early[wrong].max():.3g}"
    )
    return [
        Claim(
            "ASGD gains in all small eigendirections and loses in all large ones, after 200 steps",
            PAPER + " (i), (ii); the border (1 − c)/δ derived here from the mean error",
            "error along e_k: risk below that of SGD exactly for λ_k < (1 − c)/δ = 0.131, that is k >= 3",
            f"below for k = {_ranges(early < 1)}; smallest ratio {early.min():.3g} at k = {int(early.argmin()) + 1}",
            bool(((early < 1) == small).all()),
            apart,
        ),
        Claim(
            "The same after 500 steps",
            "derived here",
            "reported",
            f"below for k = {_ranges(late < 1)}; smallest ratio {late.min():.3g} at k = {int(late.argmin()) + 1}",
            None,
        ),
    ]


def _risk_panels(curves: dict[str, list[Any]], found: dict[str, Any]) -> list[Panel]:
    titles = {
        "head": "Error along e₁ (λ = 1)",
        "tail": "Error along e₁₀ (λ = 0.01)",
        "variance": "Label noise, σ² = 0.01",
    }
    panels = []
    for case, pair in curves.items():
        lines = [
            Line(name, list(range(1, STEPS + 1)), curve[1:].tolist()) for name, curve in zip(RULES, pair, strict=True)
        ]
        panels.append(Panel(titles[case], "step", "excess risk", lines, x_log=True, y_log=True))
    lines = [
        Line(f"after {steps} steps", SPECTRUM[::-1].tolist(), found[key][::-1], marker=True)
        for steps, key in ((200, "early"), (STEPS, "ratios"))
    ]
    title = "Error along one eigendirection"
    label = "risk of ASGD / risk of SGD"
    return [*panels, Panel(title, "eigenvalue λ", label, lines, x_log=True, y_log=True, levels={"equal": 1.0})]


def _second_moments(lab: Laboratory) -> Claim:
    found = lab.part("growth", growth, factors=FACTORS)
    diverging = [f for f, mean, second in zip(FACTORS, *found.values(), strict=True) if mean < 1 < second]
    return Claim(
        "With a large γ the risk diverges though the mean error is stable, and not with the γ of the paper's rule",
        DERIVED,
        "radius of the second moments below 1 at γ, above 1 at a larger one with the mean's below 1",
        ", ".join(f"{f:g} γ: {mean:.5f}/{second:.5f}" for f, mean, second in zip(FACTORS, *found.values(), strict=True))
        + " (mean/second moments)",
        found["second"][0] < 1 and len(diverging) > 0,
    )


# --- the class, and a network ---------------------------------------------------------------------------------------


def _recursions(lab: Laboratory) -> list[Claim]:
    seeds = 1 if lab.quick else 3
    found = [lab.part(f"recursions-{seed}", recursions, seed=seed, steps=300) for seed in range(seeds)]
    reduced, apart = (max(run[key] for run in found) for key in ("reduced", "torch"))
    return [
        Claim(
            "γ = δ is SGD, for any β",
            DERIVED,
            "iterates equal to 1e-12",
            f"{reduced:.1e} for β = 0, 0.00675, 0.3, 1 over 300 steps, {seeds} seeds",
            reduced <= 1e-12,
        ),
        Claim(
            "AcceleratedSGD on a linear model with batches of one follows the recursion",
            DERIVED,
            "w equal to 1e-10 in float64",
            f"{apart:.1e} over 300 steps, {seeds} seeds",
            apart <= 1e-10,
        ),
    ]


def _digits(lab: Laboratory) -> tuple[Claim, list[Panel]]:
    seeds, steps, every = (1, 200, 40) if lab.quick else (3, 600, 20)
    losses, sharpness, ends, thresholds = [], [], [], []
    for name in RULES:
        runs = [
            lab.part(f"digits-{name}-{seed}", digits_run, rule=name, lr=DIGITS_LR, seed=seed, steps=steps, every=every)
            for seed in range(seeds)
        ]
        loss, sharp = (np.array([run[key] for run in runs]) for key in ("loss", "sharpness"))
        thresholds.append(runs[0]["threshold"])
        losses.append(Line(name, runs[0]["step"], loss.mean(0).tolist(), loss.std(0).tolist()))
        sharpness.append(Line(name, runs[0]["step"], sharp.mean(0).tolist(), sharp.std(0).tolist()))
        ends.append(f"{name}: loss {_spread(loss[:, -1])}, sharpness {_spread(sharp[:, -1])}")
    claim = Claim(
        "A network on digits: ASGD against SGD at the same δ",
        "no claim in the paper",
        "reported",
        "; ".join(ends) + f" after {steps} steps, {seeds} seed{'s' if seeds > 1 else ''}; thresholds of a full-batch "
        f"step {thresholds[0]:.4g} and {thresholds[1]:.4g}",
        None,
        "γ/δ and β are those of the least squares; nothing was tuned",
    )
    panels = [
        Panel("Digits: loss", "step", "loss", losses, y_log=True),
        Panel("Digits: sharpness", "step", "largest Hessian eigenvalue", sharpness),
    ]
    return claim, panels


def _pair(curves: Sequence[Any], step: int) -> str:
    return f"{curves[0][step]:.3g} against {curves[1][step]:.3g}"


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))


def _spread(values: Any) -> str:
    return f"{values.mean():.3g}" + (f" ± {values.std(ddof=1):.1g}" if len(values) > 1 else "")


def _ranges(chosen: Any) -> str:
    """1-based runs of True, such as 3-57."""
    numbers = [int(k) + 1 for k in np.flatnonzero(chosen)]
    starts = [k for k in numbers if k - 1 not in numbers]
    ends = [k for k in numbers if k + 1 not in numbers]
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True)) or "none"


STUDY = Study(
    name="accelerated-sgd",
    title="Accelerated SGD: gains in small eigendirections, losses in large ones",
    paper="Li, Deng, Wu, Zhou, Gu, Risk Bounds of Accelerated SGD for Overparameterized Linear Regression, 2024",
    setting="Least squares with normal x, λ_k = k^−2, d = 60, batches of one; δ, γ, β, α by the paper's rule with ψ = "
    "3, k̃ = 5; excess risk ½ (w − w*)ᵀ H (w − w*), exact, and from 4000 runs of 100 steps for 3 seeds. Digits: "
    "64-100-100-10, tanh, squared error, 500 digits in batches of 50, δ = 0.2, float32, 3 seeds, 600 steps.",
    investigate=investigate,
)
