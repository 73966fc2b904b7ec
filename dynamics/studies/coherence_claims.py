"""The claims of the study of coherence, each from what was measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...hessian.mean_square import MeanSquareStability
from .claim_numbers import listed
from .coherence_family import (
    LAMBDA1,
    NUM_EXAMPLES,
    SAMPLINGS,
    dense_agreement,
    family,
    family_values,
    monte_carlo_growth,
    shared_axis,
    threshold_order,
    typical_exponents,
)
from .laboratory import Laboratory
from .result import Claim

PAPER = "Dexter et al. 2024"
OWN_RUN = "own reference run"
DERIVED = "derived here"

LR = 0.5
MOST = 50  # copies of one Hessian, at most
BATCH_SIZES = [1, 2, 5, 10, 20, 40]
# Largest diverging σ at η = 0.5 for those batch sizes, whichever the sampling; as two reference runs found it.
REFERENCE, BOUNDARY_TOLERANCE = [50, 28, 11, 5, 2, 1], 2
REFERENCE_RUNS = {"bernoulli": "50, 29, 11, 5, 2, 1", "without_replacement": "49, 27, 11, 5, 2, 1"}
THEOREM1_REFERENCE = [9.9, 7.0, 4.4, 3.0, 2.0, 1.2]
TYPICAL_AT_5 = 11.5
MEAN_SQUARE_REFERENCE = [99, 49, 19, 9, 4, 1.5]
RATIO = (0.2, 1.0)
NET_BATCH_SIZES = [1, 2, 4, 8, 16]
AXIS_GRID = [(s, b, lr) for s in (1, 2, 5, 20, 50) for b in (1, 4, 20, 90) for lr in (0.05, 0.3, 0.5, 0.8, 0.95)]


def largest(found: Sequence[Mapping[str, Sequence[float]]], kind: str = "end") -> list[int]:
    """Per batch size the largest σ at which most runs diverged; 0 for none."""
    return [max((i + 1 for i, share in enumerate(one[kind]) if share > 0.5), default=0) for one in found]


def theorem1_boundary(lr: float, batch_size: float) -> float:
    """Coherence below which λ_1(H) > (σ/η) (n/B − 1)^(−1/2)."""
    return lr * LAMBDA1 * math.sqrt(NUM_EXAMPLES / batch_size - 1)


def theorem2_boundary(lr: float, batch_size: float) -> float:
    """Coherence above which λ_1(H) ≤ (2σ/η) / (σ + n/B − 1)."""
    return (NUM_EXAMPLES / batch_size - 1) / (2 / (lr * LAMBDA1) - 1)


def typical_boundary(lr: float, batch_size: int, sampling: str) -> float:
    """Half a step above the largest σ, up to `MOST`, at which some axis grows typically."""
    exponents = typical_exponents(lr, batch_size, sampling, MOST)
    return max((i + 1 for i, value in enumerate(exponents) if value > 1e-12), default=0) + 0.5


def family_claims(laboratory: Laboratory) -> list[Claim]:
    copies, draws = [1, 5, 20], 100 if laboratory.quick else 1000
    found = laboratory.part("family", family_values, copies=copies)
    exact = [[c, LAMBDA1, LAMBDA1 * NUM_EXAMPLES / c] for c in copies]
    errors = [max(abs(a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(found, exact, strict=True)]
    dense = laboratory.part("dense", dense_agreement, num=draws)
    return [
        Claim(
            "the family with σ = 1, 5, 20 has that coherence, λ₁(H) = 2 and max λ₁(H_i) = 200, 40, 10",
            f"{PAPER}, synthetic experiment; {DERIVED}",
            "error <= 1e-10",
            f"largest error {max(errors):.1e}",
            max(errors) <= 1e-10,
        ),
        Claim(
            "S and σ from factors are those from matrix square roots, for random rank-2 Hessians (d = 6, n = 8)",
            f"{PAPER}, the coherence measure",
            "relative error <= 1e-8",
            f"S {dense['S']:.1e} of its largest entry, σ {dense['sigma']:.1e} ({draws} draws)",
            max(dense["S"], dense["sigma"]) <= 1e-8,
        ),
        Claim(
            "λ₁(H) <= σ max λ₁(H_i) / n",
            f"{PAPER}, proof of theorem 1",
            "no violation",
            f"{dense['violations']} violations in {draws} draws",
            dense["violations"] == 0,
        ),
    ]


def order_claims(laboratory: Laboratory) -> list[Claim]:
    num, runs = 200, 20_000 if laboratory.quick else 100_000
    order = laboratory.part("order", threshold_order, num=num)
    growth_seeds = range(3 if laboratory.quick else 10)
    away = [laboratory.part(f"growth-{seed}", monte_carlo_growth, seed=seed, runs=runs) for seed in growth_seeds]
    farthest = max(abs(z) for one in away for z in one)
    axis = laboratory.part("axis", shared_axis, grid=AXIS_GRID)
    low, high = order["ratios"]
    return [
        Claim(
            "learning rates: exact <= condition D <= theorem 1 <= 2/λ₁(H)",
            f"{PAPER}, theorem 1; condition D and both without replacement: {DERIVED}",
            "no violation in 200 random instances, for both samplings",
            f"{order['violations']} violations in {num} instances; exact / theorem 1 in [{low:.2g}, {high:.2g}]",
            order["violations"] == 0,
        ),
        Claim(
            "E‖w‖² after five steps is what the map on second moments says",
            DERIVED,
            "mean over runs within 4 standard errors",
            f"farthest of {4 * len(away)} means {farthest:.2f} standard errors away ({runs} runs each; two samplings, "
            "learning rates 0.7 and 1.3 of the threshold)",
            farthest < 4,
        ),
        Claim(
            "on the axis of σ copies the radius is (1 − ηλ)² + η² (n/B − 1) λ²/σ",
            f"{PAPER}, theorem 2 (construction)",
            "error <= 1e-12",
            f"largest error {axis['radius']:.1e} on {len(AXIS_GRID)} settings",
            axis["radius"] <= 1e-12,
        ),
        Claim(
            "that radius crosses 1 at λ = (2σ/η) / (σ + n/B − 1)",
            f"{PAPER}, theorem 2",
            "relative error of the learning rate <= 1e-12",
            f"largest relative error {axis['threshold']:.1e} on {len(AXIS_GRID)} settings",
            axis["threshold"] <= 1e-12,
        ),
    ]


def boundary_claims(boundaries: Mapping[str, Sequence[Sequence[int]]]) -> list[Claim]:
    claims = []
    for sampling, found in boundaries.items():
        claims.append(
            Claim(
                f"largest σ at which most runs diverge, for B = {listed(BATCH_SIZES)}, η = {LR:g}, "
                f"{sampling.replace('_', ' ')}",
                f"{PAPER}, synthetic experiment; numbers: {OWN_RUN}",
                f"{listed(REFERENCE)} (σ up to {MOST}), each ± {BOUNDARY_TOLERANCE}",
                _seeds(found),
                _within(found, REFERENCE, BOUNDARY_TOLERANCE),
                f"the reference run of this sampling found {REFERENCE_RUNS[sampling]}",
            )
        )
    theorem1 = [theorem1_boundary(LR, size) for size in BATCH_SIZES]
    mean_square = [theorem2_boundary(LR, size) for size in BATCH_SIZES]
    last_unstable = [_last_unstable_copies(size) for size in BATCH_SIZES]
    bernoulli = boundaries["bernoulli"]
    typical = [typical_boundary(LR, size, "bernoulli") for size in BATCH_SIZES]
    below = all(all(s + 1 > t for s, t in zip(one, theorem1, strict=True)) for one in bernoulli)
    return [
        *claims,
        Claim(
            f"theorem 1 guarantees divergence up to σ = {listed(THEOREM1_REFERENCE)} only, below the simulation",
            f"{PAPER}, theorem 1",
            "those values to two digits, and no whole σ below them above the simulated boundary",
            f"{listed(theorem1)}; simulated {_seeds(bernoulli)}",
            below and all(abs(t - r) < 0.06 for t, r in zip(theorem1, THEOREM1_REFERENCE, strict=True)),
        ),
        Claim(
            f"in the mean square the shared axis diverges up to σ = {listed(MEAN_SQUARE_REFERENCE)}",
            f"{PAPER}, theorem 2 (construction)",
            "those values; the radius of the map is at least 1 at the last whole σ below each, and less at the next",
            f"{listed(mean_square)}; last whole σ by the radius {listed(last_unstable)}",
            last_unstable == [math.floor(r) for r in MEAN_SQUARE_REFERENCE]
            and all(abs(m - r) < 1e-9 for m, r in zip(mean_square, MEAN_SQUARE_REFERENCE, strict=True)),
        ),
        Claim(
            "the simulation follows the typical boundary, E log|factor| = 0 (σ near 11.5 at B = 5), and not that in "
            "the mean square",
            DERIVED,
            f"simulated within {BOUNDARY_TOLERANCE} of the typical boundary at every B, and short of the mean-square "
            f"one by more than that where B <= 10; typical within 0.5 of {TYPICAL_AT_5} at B = 5",
            f"typical {listed(typical)}; simulated {_seeds(bernoulli)}; mean square {listed(mean_square)}",
            _within(bernoulli, typical, BOUNDARY_TOLERANCE)
            and abs(typical[BATCH_SIZES.index(5)] - TYPICAL_AT_5) <= 0.5
            and all(
                m - s > BOUNDARY_TOLERANCE
                for one in bernoulli
                for s, m, size in zip(one, mean_square, BATCH_SIZES, strict=True)
                if size <= 10
            ),
            "the typical boundary is the last whole σ with a positive exponent on some axis, and a half; the mean "
            "grows beyond it through runs that are too rare for ten to show",
        ),
    ]


def _last_unstable_copies(batch_size: int) -> int:
    """The largest number of copies with which the shared axis alone diverges in the mean square."""
    unstable = 0
    for copies in range(1, NUM_EXAMPLES):
        stability = MeanSquareStability(family(copies)[:, :1])
        unstable = copies if stability.radius(LR, batch_size) >= 1 - 1e-9 else unstable
    return unstable


def net_claim(loss: str, found: Sequence[Mapping[str, Any]]) -> Claim:
    ordered = all(
        all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(t))
        for one in found
        for kind in SAMPLINGS
        for t in one["thresholds"][kind]
    )
    ratios = [t[0] / t[2] for one in found for kind in SAMPLINGS for t in one["thresholds"][kind]]
    first = found[0]
    at_one = {kind: first["thresholds"][kind][0] for kind in SAMPLINGS}
    later = "; ".join(
        f"B = {size}: exact {one[0]:.4g} ({other[0]:.4g}), theorem 1 {one[2]:.4g}"
        for size, one, other in zip(NET_BATCH_SIZES, *(first["thresholds"][kind] for kind in SAMPLINGS), strict=False)
        if size in (4, 16)
    )
    pilot = {
        "squared error": "σ 21.2, λ₁ 9.88, max λ₁(H_i) 14.9, exact 0.0918 (0.1471 without replacement) at B = 1, "
        "0.1627 (0.1963) at 4, 0.1961 (0.2022) at 16",
        "logistic": "σ 2.40, exact 403 (418) at B = 1, 1421 at 4",
    }[loss]
    return Claim(
        f"trained network, {loss}: thresholds are in order, and theorem 1 is within a factor of five of the exact one",
        f"{PAPER}, theorem 1; {DERIVED}",
        f"exact <= D <= theorem 1 <= 2/λ₁; exact / theorem 1 in [{RATIO[0]:g}, {RATIO[1]:g}], for B = "
        f"{listed(NET_BATCH_SIZES)} and both samplings",
        f"ratios {min(ratios):.3g} to {max(ratios):.3g}; σ {_of(found, 'sigma')}, λ₁ {_of(found, 'lambda1')}, max "
        f"λ₁(H_i) {_of(found, 'max_lambda1')}; seed 0 at B = 1: exact {at_one['bernoulli'][0]:.4g} "
        f"({at_one['without_replacement'][0]:.4g} without replacement), D {at_one['bernoulli'][1]:.4g}, theorem 1 "
        f"{at_one['bernoulli'][2]:.4g}, 2/λ₁ {at_one['bernoulli'][3]:.4g}; {later}; loss {_of(found, 'loss')}, "
        f"largest gradient of an example {_of(found, 'gradient')}",
        ordered and all(RATIO[0] <= ratio <= RATIO[1] * (1 + 1e-9) for ratio in ratios),
        f"the reference run, with other initial weights and another way of training, found {pilot}",
    )


def restart_claim(found: Sequence[Mapping[str, Any]]) -> Claim:
    texts, holds = [], True
    for share in ("0.7", "1.3"):
        runs = [one["restarts"][share] for one in found]
        factors = [run["mean"][-1] / run["mean"][0] for run in runs]
        errors = [run["error"][-1] / run["mean"][0] for run in runs]
        expected = [run["predicted"][-1] / run["predicted"][0] for run in runs]
        holds = holds and all(factor > 1 if share == "1.3" else factor < 1 for factor in factors)
        means = ", ".join(f"{factor:.3g} ± {error:.1g}" for factor, error in zip(factors, errors, strict=True))
        texts.append(f"at {share} η: {means} (linear theory {listed(expected)})")
    return Claim(
        "restarted from the optimum of squared error with noise of 1e-4, SGD with one example a step loses ground "
        "beyond the exact threshold η and gains below it",
        DERIVED,
        "mean loss of 200 runs after 20 steps over that at the start: > 1 at 1.3 η, < 1 at 0.7 η",
        "; ".join(texts),
        holds,
        "a random example each step, which is sampling without replacement for B = 1; ± is the standard error, which a "
        "heavy tail makes too small at 1.3 η",
    )


def ten_outputs_claim(found: Sequence[Mapping[str, Any]]) -> Claim:
    at_one = [one["thresholds"]["bernoulli"][0] for one in found]
    shares = [t[2] / t[0] for t in at_one]
    return Claim(
        "with ten outputs, S_ii = ‖H_i‖_F inflates σ: theorem 1 says no more than 2/λ₁ while the exact threshold is "
        "much smaller",
        OWN_RUN,
        "at B = 1 theorem 1 = 2/λ₁, at least twice the exact threshold (5 times in the reference run; twice is chosen "
        "here, after the ratios had been seen)",
        f"theorem 1 / exact {listed(shares)}; σ {_of(found, 'sigma')} with n = 32",
        all(t[2] == t[3] and t[2] >= 2 * t[0] for t in at_one),
    )


def _within(found: Sequence[Sequence[float]], reference: Sequence[float], tolerance: float) -> bool:
    return all(abs(a - b) <= tolerance for one in found for a, b in zip(one, reference, strict=True))


def _seeds(found: Sequence[Sequence[int]]) -> str:
    return "; ".join(f"{listed(one)} (seed {seed})" for seed, one in enumerate(found))


def _of(found: Sequence[Mapping[str, Any]], key: str) -> str:
    return listed([one[key] for one in found])
