"""The UV model: fixed points, edge of stability manifold, the route to chaos, and what of it real nets show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..uv_model import period_two
from . import uv_experiments as uv
from .laboratory import Laboratory
from .result import Claim, Line, Panel
from .study import Study
from .uv_route import PAPER, cascade, listed, real_nets

DERIVED = "derived here from the model"
BELOW, ABOVE, BEYOND = (0.5, 0.9, 0.99), (1.05, 1.1, 1.2), (1.01, 1.5, 1.8)
# Mean of log|1 + D| on the attractor of an earlier run; the first four also follow from `period_two`.
TRANSVERSE = {1.01: -0.010, 1.05: -0.053, 1.1: -0.112, 1.2: -0.255, 1.5: -0.76, 1.8: -0.35}
# F and L of small weights, and of an output above the target; steps of the runs shown.
SMALL, PATH = (0.001, 0.01), 40
LARGE = (0.8, 1.7)


def investigate(lab: Laboratory) -> tuple[list[Claim], list[Panel]]:
    """All claims, and the six panels."""
    attractors, plane = _attractors(lab)
    doublings, bifurcations = cascade(lab)
    real, real_panels = real_nets(lab)
    return [*_exact(lab), *attractors, *doublings, *real], [plane[0], plane[1], *bifurcations, *real_panels]


# --- what holds exactly ---------------------------------------------------------------------------------------------


def _exact(lab: Laboratory) -> list[Claim]:
    seeds = range(1 if lab.quick else 3)
    runs = [lab.part(f"closure-{s}-{Y:g}", uv.closure, seed=s, Y=Y, steps=40) for s in seeds for Y in (0.9, 1.15)]
    worst = {key: max(run[key] for run in runs) for key in ("map", "trace", "sharpness", "residual")}
    far = max(lab.part(f"far-{s}", uv.far_from_minimum, seed=s, points=20 if lab.quick else 100) for s in seeds)
    tracked = [lab.part(f"tracked-{s}", uv.tracked, seed=s, Y=1.15, burn_in=100, steps=10) for s in seeds]
    negative = [lab.part(f"negative-{s}", uv.far_negative, seed=s) for s in seeds]
    signs = [lab.part(f"signs-{s}", uv.signs, num=1000, seed=s) for s in seeds]
    fixed = lab.part("fixed", uv.fixed_points, Ys=[0.5, 0.9, 1.1, 1.5])
    size = f"n = {uv.WIDTH}, d = {uv.INPUTS}, float64, 40 steps at 0.9 and 1.15 η_c, {len(seeds)} seeds"
    tracker = max(max(run["search"], run["tracker"]) for run in tracked)
    return [
        Claim(
            "Gradient descent by autograd is the map of (f, λ)",
            DERIVED,
            "largest error < 1e-12",
            f"{worst['map']:.1e} ({size})",
            worst["map"] < 1e-12,
        ),
        Claim(
            "The trace of the Hessian is λ, its largest eigenvalue the closed form, also far from the minimum",
            DERIVED,
            "errors < 1e-10, relative to the sharpness at random points",
            f"trace {worst['trace']:.1e}, sharpness {worst['sharpness']:.1e} along the runs (ηD√(z/N) up to "
            f"{worst['residual']:.2f}); {far:.1e} at random weights and targets up to 100 away",
            max(worst["trace"], worst["sharpness"], far) < 1e-10,
        ),
        Claim(
            "The library's search and tracker give the closed form along an orbit at the edge",
            DERIVED,
            "error < 1e-8 with residuals of both signs",
            f"{tracker:.1e} over {sum(r['above'] for r in tracked)} points above the target and "
            f"{sum(r['below'] for r in tracked)} below it",
            tracker < 1e-8 and all(run["above"] and run["below"] for run in tracked),
        ),
        _largest(negative),
        Claim(
            "The kernel grows in a step exactly where D (ηDλ − 4f) > 0; a zero output always sharpens first; in "
            "gradient flow it grows exactly where f lies between 0 and y",
            DERIVED,
            "no exception among 1000 random (f, λ, y) a seed",
            f"{sum(s['wrong'] for s in signs)}, {sum(s['silent'] for s in signs)} and {sum(s['flow'] for s in signs)} "
            f"exceptions, {len(seeds)} seeds",
            not any(s["wrong"] or s["silent"] or s["flow"] for s in signs),
        ),
        _fixed_points(fixed),
    ]


def _largest(found: Sequence[Mapping[str, float]]) -> Claim:
    near = max(abs(run["found"] - run["exact"]) / run["exact"] for run in found)
    names = ("shifted_search", "shifted_tracker")
    far = max(abs(run[name] - run["shifted_exact"]) / run["shifted_exact"] for run in found for name in names)
    first = found[0]
    return Claim(
        "They take the largest eigenvalue, not that of largest magnitude",
        DERIVED,
        "relative error < 1e-8 far from the target, where the lowest is nearly as large, and of the loss there minus "
        "c ‖θ‖²/2, where it is larger in magnitude",
        f"{near:.1e} with lowest {first['lowest']:.2f}, largest {first['exact']:.2f} "
        f"(ratio {min(-run['lowest'] / run['exact'] for run in found):.3f} or more); "
        f"{far:.1e} with lowest {first['shifted_lowest']:.2f}, largest {first['shifted_exact']:.2f} "
        f"(ratio {min(-run['shifted_lowest'] / run['shifted_exact'] for run in found):.2f} or more); "
        f"{len(found)} seeds",
        near < 1e-8 and far < 1e-8 and all(-run["shifted_lowest"] > run["shifted_exact"] for run in found),
        "of the UV model's own Hessian the lowest is never larger in magnitude, hence the quadratic",
    )


def _fixed_points(found: Sequence[Mapping[str, Any]]) -> Claim:
    residual = max(point["residual"] for point in found)
    right = residual < 1e-12
    for point in found:
        largest = point["moduli"][0]
        # On line I one multiplier is 1, along the line, and the other 1 − L.
        stable = point["family"] == "I" and point["L"] < 2
        right &= largest <= 1 + 1e-9 if stable else largest > 1
    text = "; ".join(
        f"{p['family']} at Y = {p['Y']:g}, ηλ = {p['L']:g}: {p['moduli'][0]:.3g}, {p['moduli'][1]:.3g}" for p in found
    )
    return Claim(
        "Four families of fixed points: the line of minima (I), stable where ηλ < 2; origin (II), B = 0 with D = 2 "
        "(III), A = 0 with D = −2 (IV), all unstable",
        f"{PAPER}, fixed point analysis; multipliers derived here",
        "residuals < 1e-12; no multiplier beyond 1 on the stable part of I, one beyond 1 elsewhere",
        f"residual {residual:.0e}; moduli of multipliers: {text}",
        right,
    )


# --- attractors -----------------------------------------------------------------------------------------------------


def _attractors(lab: Laboratory) -> tuple[list[Claim], list[Panel]]:
    seeds, burn_in = ([0], 5000) if lab.quick else ([0, 1, 2], 20000)
    Ys = sorted((*BELOW, *ABOVE, *BEYOND))
    late = {Y: lab.part(f"late-{Y:g}", uv.attractor, Y=Y, seeds=seeds, burn_in=burn_in, keep=4000) for Y in Ys}
    starts = f"{len(seeds)} small random starts"
    quiet = all(
        run["period"] == 1
        and abs(run["F"][0] - Y) < 1e-6
        and 2 * Y - 1e-9 <= run["L_range"][0] <= run["L_range"][1] < 2
        for Y in BELOW
        for run in late[Y]
    )
    excess = max(run["L_range"][1] - 2 * Y for Y in BELOW for run in late[Y])
    twos = [(period_two(Y), run) for Y in ABOVE for run in late[Y]]
    points = max(abs(a - b) for orbit, run in twos for a, b in zip(orbit.F, run["F"], strict=False))
    flat = max(run["unbalance"] for _, run in twos)
    means = max(abs(orbit.mean_ntk - run["L"]) for orbit, run in twos)
    edge = max(abs(orbit.mean_sharpness - run["sharpness"]) for orbit, run in twos)
    transverse = {Y: [run["transverse"] for run in late[Y]] for Y in TRANSVERSE}
    chaotic = late[1.5]
    claims = [
        Claim(
            "Below η_c training converges to the minimum, no sharper than 2/η and no flatter than the flattest",
            DERIVED,
            "Y = 0.5, 0.9, 0.99: period 1, F = Y, 2Y <= ηλ < 2",
            "; ".join(f"Y = {Y:g}: ηλ {listed([r['L'] for r in late[Y]], 5)}" for Y in BELOW) + f" ({starts})",
            quiet,
            f"ηλ ends at most {excess:.2g} above 2Y, the flattest minimum; at the start B = ηλ − 2F is at most "
            f"{uv.LARGEST_START:g}",
        ),
        Claim(
            "Above η_c orbits collapse onto balanced weights, B = 0, and alternate between two points",
            DERIVED,
            "Y = 1.05, 1.1, 1.2: |ηλ − 2F| < 1e-6; period 2; F = (0.8, 1.25), (0.72984, 1.37016), (0.64174, 1.55826) "
            "to 1e-5",
            f"|ηλ − 2F| at most {flat:.0e}; F off by {points:.0e} at most; periods "
            f"{sorted({run['period'] or 0 for _, run in twos})} ({starts})",
            flat < 1e-6 and points < 1e-5 and all(run["period"] == 2 and len(run["F"]) == 2 for _, run in twos),
        ),
        Claim(
            "There the kernel's mean is ηλ = 1 + Y, the sharpness' (3 + Y)/2: both 2 at the onset only",
            DERIVED,
            "ηλ 2.05, 2.10, 2.20; ηλ_max 2.025, 2.05, 2.10; to 1e-4",
            "; ".join(f"Y = {Y:g}: {late[Y][0]['L']:.5f}, {late[Y][0]['sharpness']:.5f}" for Y in ABOVE),
            means < 1e-4 and edge < 1e-4,
        ),
        Claim(
            "Balanced weights attract: mean log|1 + D| < 0 on the attractor",
            f"{DERIVED}; numbers of an own reference run",
            "; ".join(f"{value:g} at Y = {Y:g}" for Y, value in TRANSVERSE.items())
            + ": to 0.001 up to 1.2, to 0.03 where chaotic",
            "; ".join(f"Y = {Y:g}: {listed(values, 3)}" for Y, values in transverse.items()),
            all(
                value < 0 and abs(value - TRANSVERSE[Y]) < (0.001 if Y <= 1.2 else 0.03)
                for Y, values in transverse.items()
                for value in values
            ),
            "up to √5 − 1 it is log|3 − 2Y| / 2 exactly; the tolerances are chosen here: one digit of the last place, "
            "and the scatter of a mean over 4000 chaotic steps",
        ),
        Claim(
            "At Y = 1.5 the orbit is bounded and not periodic",
            DERIVED,
            "finite, no period up to 2000",
            f"finite {[run['finite'] for run in chaotic]}, period {[run['period'] for run in chaotic]}",
            all(run["finite"] and run["period"] is None for run in chaotic),
        ),
    ]
    return [*claims, _regimes(lab)], _orbit_panels(lab)


def _path(lab: Laboratory, Y: float, start: tuple[float, float]) -> dict[str, Any]:
    return lab.part(f"path-{Y:g}-{start[0]:g}", uv.path, Y=Y, start=list(start), steps=PATH)


def _orbit_panels(lab: Laboratory) -> list[Panel]:
    runs = {Y: _path(lab, Y, SMALL) for Y in (0.9, 1.1)}
    curves = [Line(f"η = {Y:g} η_c", list(range(PATH)), run["sharpness"]) for Y, run in runs.items()]
    curves.append(Line("η = 0.5 η_c, large output", list(range(PATH)), _path(lab, 0.5, LARGE)["sharpness"]))
    Y = 1.05
    small, unbalanced = _path(lab, Y, SMALL), _path(lab, Y, (0.6, 2.6))
    plane = [
        Line("from a small output", small["D"], small["L"], points=True),
        Line("from unbalanced weights", unbalanced["D"], unbalanced["L"], points=True),
        Line("balanced weights, L = 2F", [-Y, 0.6], [0.0, 2 * (0.6 + Y)]),
        Line("minima, stable below 2", [0.0, 0.0], [2 * Y, 3.4]),
    ]
    return [
        Panel("UV model: sharpness of a run", "step", "η λ_max", curves, levels={"2": 2.0}),
        Panel(f"UV model: phase plane, η = {Y:g} η_c", "scaled residual D", "η λ (tangent kernel)", plane),
    ]


def _regimes(lab: Laboratory) -> Claim:
    edge, large = _path(lab, 1.02, SMALL)["regimes"], _path(lab, 0.5, LARGE)["regimes"]
    return Claim(
        "One example shows the regimes of training: from a small output saturation, progressive sharpening and the "
        "edge; from a large one the sharpness falls first, and saturates",
        f"{PAPER}, four regimes",
        "labels at η = 1.02 η_c: saturation, progressive sharpening, edge of stability, in this order; at 0.5 η_c "
        "with f > y: first a transient, last saturation",
        f"{', '.join(edge)}; {', '.join(large)}",
        edge == ["saturation", "progressive sharpening", "edge of stability"]
        and large[0] == "transient"
        and large[-1] == "saturation",
        "starts and rates chosen after a look at six pairs: further above η_c the edge is reached in so few steps that "
        "no sharpening is seen before",
    )


STUDY = Study(
    name="uv-model",
    title="The UV model: from the edge of stability to chaos, and nets on digits",
    paper="Kalra, He and Barkeshli, Universal Sharpness Dynamics in Neural Network Training, ICLR 2025",
    setting="UV model of width 7 on one example of 5 inputs, float64, Y = η/η_c; orbits after 20000 steps from three "
    "small starts. Nets without biases, initial weights 0.3 times the standard ones, full batch, half mean "
    "squared error, 200 handwritten digits, float64, seeds 0 to 2 (figure: seed 0): tanh 64-32-1 onto the standardised "
    "label and 64-32-10 onto ten classes, after 4000 steps; ReLU autoencoder 64-32-64, after 1500.",
    investigate=investigate,
)
