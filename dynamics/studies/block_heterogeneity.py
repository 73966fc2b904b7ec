"""Block heterogeneity: spectra of the Hessian's diagonal blocks, and what SGD loses to Adam where they differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from .claim_numbers import listed
from .heterogeneity_claims import (
    CNN,
    MLP,
    OWN,
    PAPER,
    REFERENCE,
    TRANSFORMER,
    by_seed,
    correlation_claims,
    divergence_claims,
    gap_claims,
    ratio_claims,
    training_claims,
)
from .heterogeneity_experiments import grid_sums, known_spectrum, limit_cycles, quadratics, sampled_against_exact
from .heterogeneity_panels import curve_panel, density_panel, distance_panel, gap_panel, quadratic_panel, ratio_panel
from .laboratory import Laboratory
from .optimizer_gap import MODELS, data, installed_text, spectra_along, trained, tuned
from .quadratic_suite import most_steps
from .result import Claim, Panel
from .study import Study

# Examples of the Hessian: digits, digits cut into 16 patches, windows of text.
NUM = {"digits": 256, "patches": 32, "text": 8}
OVER_PATCHES = ("mixer", "ViT, 0.02")
# After these numbers of steps of Adam the spectra are taken; of other seeds than the first only at the ends.
STEPS, AT = 400, {TRANSFORMER: (0, 20, 100, 400), MLP: (0, 20, 100, 400), CNN: (0, 20, 100, 400)}
SHORT_STEPS = 60
SEEDS = (0, 1, 2)
POINTS = [1_000, 10_000, 50_000]
LEARNING_RATES = [1e-2, 3e-3]


def investigate(lab: Laboratory) -> tuple[list[Claim], list[Panel]]:
    quadratic, panel = _quadratics(lab)
    gaps = {name: _gap(lab, name) for name in _models(lab)}
    records = {name: _records(lab, name, gaps[name]) for name in gaps}
    claims = [
        *quadratic,
        *_quadrature(lab),
        *ratio_claims(records),
        *divergence_claims(records),
        *_sampled(lab),
        *training_claims(records),
        *gap_claims(gaps, steps=SHORT_STEPS if lab.quick else STEPS, quick=lab.quick, origins=_origins(gaps)),
        *([] if lab.quick else correlation_claims(records, gaps)),
    ]
    first = {name: found[0] for name, found in records.items()}
    panels = [
        density_panel(f"{CNN}, start", first[CNN]["0"]),
        density_panel(f"{TRANSFORMER}, start", first[TRANSFORMER]["0"]),
        distance_panel(CNN, first[CNN]["0"]),
        distance_panel(TRANSFORMER, first[TRANSFORMER]["0"]),
        gap_panel({name: ([one["0"]["ratio"] for one in records[name]], by_seed(gaps[name])) for name in gaps}),
        ratio_panel({name: found for name, found in first.items() if len(found) > 1}),
        curve_panel(TRANSFORMER, gaps[TRANSFORMER]),
        panel,
    ]
    return claims, panels


def _models(lab: Laboratory) -> list[str]:
    return [MLP, CNN, TRANSFORMER] if lab.quick else list(MODELS)


def _gap(lab: Laboratory, name: str) -> dict[str, Any]:
    seeds, steps = (SEEDS[:1], SHORT_STEPS) if lab.quick else (SEEDS, STEPS)

    def best(optimizer: str) -> dict[str, Any]:
        def attempt(lr: float, seed: int) -> dict[str, Any]:
            part = f"{_slug(name)}-{optimizer}-lr{lr:g}-{seed}"
            settings = {"optimizer": optimizer, "lr": lr, "seed": seed, "steps": steps}
            return lab.part(part, trained, model=name, **settings, **_text(name))

        return tuned(optimizer, attempt, seeds=seeds)

    return {optimizer: best(optimizer) for optimizer in ("SGD", "Adam")}


def _records(lab: Laboratory, name: str, gap: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Block spectra by step, for each seed."""
    found = []
    for seed in SEEDS[:1] if lab.quick else SEEDS:
        ends = (0,) if name in OVER_PATCHES else (0, STEPS)
        if lab.quick:
            ends = (0,) if name == TRANSFORMER else (0, SHORT_STEPS)
        at = ends if lab.quick or seed != SEEDS[0] else AT.get(name, ends)
        found.append(
            lab.part(
                f"{_slug(name)}-blocks-{seed}",
                spectra_along,
                model=name,
                lr=gap["Adam"]["lr"],
                seed=seed,
                at=list(at),
                num=_num(lab, name),
                **_text(name),
            )
        )
    return found


def _quadratics(lab: Laboratory) -> tuple[list[Claim], Panel]:
    draws = 100 if lab.quick else 1000
    found = lab.part("quadratics", quadratics, draws=draws)
    cycles = lab.part("limit-cycles", limit_cycles, lrs=LEARNING_RATES, beta2=0.99, steps=4000, draws=10)
    medians = {case: {rule: statistics.median(one[rule]) for rule in ("gd", "adam")} for case, one in found.items()}
    shares = {case: sum(r <= 1000 for r in one["r"]) / draws for case, one in found.items()}
    apart, mixed = medians["heterogeneous"], medians["homogeneous"]
    gains = [one["gd"] / one["adam"] for one in (apart, mixed)]
    bound = most_steps(5000, 1e-8)
    floors = [last for _, last in cycles]
    text = f"of {draws} random rotations and Gaussian starts"
    claims = [
        Claim(
            "Gradient descent at 2 / (L + μ) takes about κ steps on the quadratics, whatever their blocks",
            f"{PAPER}, quadratic models; number: {REFERENCE}",
            f"median to 1e-8 of the initial loss 2e4 ± 25 % (tolerance chosen here), never above "
            f"ln 1e8 / (2 ln((κ + 1) / (κ − 1))) = {bound}",
            f"heterogeneous {apart['gd']:.0f}, homogeneous {mixed['gd']:.0f}; medians {text}",
            all(1.5e4 <= m["gd"] <= 2.5e4 for m in medians.values())
            and all(max(one["gd"]) <= bound for one in found.values()),
            "κ = 5000; steps are exact, from the closed form of the linear recursion",
        ),
        Claim(
            "Adam with its second moment held at the first gradient's is fast where blocks are heterogeneous",
            f"{PAPER}, quadratic models; number: {REFERENCE}, 68",
            "median <= 500",
            f"{apart['adam']:.0f}, median {text}",
            apart["adam"] <= 500,
            "β1 = 0, v = g0², best constant lr",
        ),
        Claim(
            "It gains nothing where they are homogeneous",
            f"{PAPER}, quadratic models; number: {REFERENCE}, 3.1e4",
            "median at least that of gradient descent",
            f"{mixed['adam']:.0f} against {mixed['gd']:.0f}, medians {text}",
            mixed["adam"] >= mixed["gd"],
        ),
        Claim(
            "Steps of gradient descent over those of Adam",
            f"{PAPER}, quadratic models; bounds: {REFERENCE}",
            "heterogeneous >= 20, homogeneous <= 1.5",
            f"heterogeneous {gains[0]:.0f}, homogeneous {gains[1]:.2f}, of medians",
            gains[0] >= 20 and gains[1] <= 1.5,
        ),
        Claim(
            "What Adam descends has a condition number of at most r times the largest of a block, r <= 1000",
            f"{PAPER}, theorem on Adam",
            "for at least 2/3 of the starts",
            ", ".join(f"{case} {share:.1%}" for case, share in shares.items()) + f", {text}",
            min(shares.values()) >= 2 / 3,
        ),
        Claim(
            "With β2 < 1 and a constant learning rate Adam ends in a cycle, not at the minimum",
            f"{PAPER}, quadratic models; scaling: {OWN}",
            "last quarter of the loss >= 0.5 times the quarter before; proportional to lr² within 10 %",
            f"{cycles[0][1] / cycles[0][0]:.3f} and {cycles[1][1] / cycles[1][0]:.3f}; "
            f"loss {floors[0]:.2e} at lr {LEARNING_RATES[0]:g}, {floors[1]:.2e} at {LEARNING_RATES[1]:g}",
            all(last >= 0.5 * before for before, last in cycles)
            and abs(floors[0] / floors[1] / (LEARNING_RATES[0] / LEARNING_RATES[1]) ** 2 - 1) <= 0.1,
            "torch's Adam, β1 = 0, β2 = 0.99, heterogeneous case, 10 starts, 4000 steps",
        ),
    ]
    return claims, quadratic_panel({case: one["curves"] for case, one in found.items()})


def _quadrature(lab: Laboratory) -> list[Claim]:
    runs = [lab.part(f"spectrum-{seed}", known_spectrum, seed=seed) for seed in range(5 if lab.quick else 20)]
    num = len(runs)
    inside = {key: sum(abs(run[key]) <= 3 for run in runs) for key in ("trace", "frobenius")}
    spread = math.sqrt(statistics.fmean(run["stderr"] ** 2 for run in runs))
    setting = "400 known eigenvalues, 100 Lanczos steps, 10 probes"
    top, integral = (
        max(run["top"] for run in runs),
        max(abs(run["integral"] - 1) for run in runs),
    )
    return [
        Claim(
            "Lanczos quadrature finds the largest eigenvalue, once",
            OWN,
            "relative error <= 1e-6, one copy",
            f"at most {top:.1e}, {max(run['copies'] for run in runs)} copy in each probe; {num} matrices",
            top <= 1e-6 and max(run["copies"] for run in runs) == 1,
            setting,
        ),
        Claim(
            "Its trace and squared Frobenius norm are right within their standard errors",
            OWN,
            f"within 3 in at least {num - 1} of {num} matrices",
            f"trace {inside['trace']}, Frobenius {inside['frobenius']} of {num}",
            min(inside.values()) >= num - 1,
            "one may fall outside by chance: a mean of ten probes does in 1.5 % of cases",
        ),
        Claim(
            "The standard error of the trace is about √(2 / probes) ‖A‖_F",
            OWN,
            "ratio in [0.8, 1.2], root mean square over matrices",
            f"{spread:.3f}, {num} matrices",
            0.8 <= spread <= 1.2,
            "signs as probes leave the diagonal of A out of ‖A‖_F",
        ),
        Claim(
            "The smoothed density integrates to 1",
            OWN,
            "± 1e-3",
            f"off by at most {integral:.1e}, {num} matrices",
            integral <= 1e-3,
        ),
    ]


def _sampled(lab: Laboratory) -> list[Claim]:
    sums = lab.part("grid-sums", grid_sums, points=POINTS)
    growth = [total / num for total, num in zip(sums["sum"], POINTS, strict=True)]
    name = CNN if lab.quick else TRANSFORMER
    sampled = lab.part("sampled", sampled_against_exact, model=name, seed=0, num=_num(lab, name), **_text(name))
    return [
        Claim(
            "Summed over a grid without the spacing, the divergence of two spectra grows with the number of points",
            OWN,
            f"in proportion within 1 % at {', '.join(map(str, POINTS))} points; times the spacing ours within 0.1 %",
            f"sums {listed(sums['sum'])}; times the spacing {listed(sums['times spacing'])}; "
            f"ours {sums['divergence'][0]:.3g} nats",
            max(growth) <= 1.01 * min(growth)
            and all(abs(value / sums["divergence"][0] - 1) <= 1e-3 for value in sums["times spacing"]),
            "two spectra of 50 eigenvalues, linear axis, σ² = 1e-5; published values above ln 2 are such sums",
        ),
        Claim(
            f"Sampled spectra of blocks of more than 320 coordinates are near the exact ones: {name}",
            OWN,
            "Wasserstein-1 distance <= 0.02 times the range, largest eigenvalue to 1e-3",
            f"distance {listed(list(sampled['w1'].values()))}, eigenvalue within {max(sampled['top'].values()):.1e}; "
            f"{sampled['products'][0]} products instead of {sampled['products'][1]}",
            max(sampled["w1"].values()) <= 0.02 and max(sampled["top"].values()) <= 1e-3,
            f"mean divergence on the log axis {sampled['js']:.3f} ± {sampled['stderr']:.3f} nats instead of "
            f"{sampled['exact_js']:.3f}, on the linear one {sampled['linear']:.4f} instead of "
            f"{sampled['exact_linear']:.4f}; neither is judged",
        ),
    ]


def _text(name: str) -> dict[str, str]:
    """Of the parts with a model of text: which one it is."""
    return {"text": installed_text()} if MODELS[name][0] == "text" else {}


def _origins(names: Iterable[str]) -> dict[str, str]:
    """Where the data of a model come from."""
    return {name: data(MODELS[name][0], **_text(name)).source for name in names}


def _num(lab: Laboratory, name: str) -> int:
    """Examples of the Hessian."""
    num = NUM["patches" if name in OVER_PATCHES else MODELS[name][0]]
    return max(2, num // 4) if lab.quick else num


def _slug(name: str) -> str:
    return name.replace(", ", "-").lower()


STUDY = Study(
    "block-heterogeneity",
    "The Hessian's blocks, and what SGD loses to Adam",
    PAPER,
    "Networks of width 16 whose weight tensors have at most 1024 entries each. Digits: MLP 64-16-16-10, CNN with "
    "BatchNorm, mixer and ViT on 16 patches; text, the King James Bible where its program is installed and else the "
    "manual inside CPython (claims on train losses name it): one-layer transformer with 2 heads on windows "
    "of 64 characters, "
    "starting from N(0, 0.02²) or variance 1 / fan-in. Batches of 64 digits or 32 windows, 400 steps, seeds 0 to 2. "
    "SGD with momentum 0.9 and Adam at constant learning rates from half decades, four each and more until the best "
    "was not at an end. Exact block Hessians in float64 of 256 digits, 32 digits (networks on patches) or 8 windows "
    "of 32 characters.",
    investigate,
)
