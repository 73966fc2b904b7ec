"""SGD noise in a network on digits: lazy and feature learning, and the noise that leaves the lazy regime."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..power_law import crossing, crossover
from .laboratory import Laboratory
from .noise_fits import Table, law, line, listed, means, place, told
from .result import Claim, Heat, Panel
from .scaled_model import parity_runs

PAPER = "Sclocchi et al. 2023"
WIDTH, BATCH, NUM_TEST, MAX_UPDATES = 128, 8, 700, 60_000
ALPHAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
TEMPERATURES = (0.03, 0.1, 0.3, 1.0, 3.0)
LAZY, SMALL = (10.0, 30.0, 100.0), 0.1  # SMALL: T α where the noise is below the margin
FEATURE = 0.1  # the largest α of feature learning
SIZES, SWEPT_ALPHA, SWEPT = (128, 256, 512, 1024), 10.0, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
MAP_SIZE, ESCAPE = 512, 0.1


def network_claims(lab: Laboratory) -> tuple[list[Claim], list[Panel]]:
    """Checks of the weight change over α and T, and the (α, T) diagram."""
    seeds, num = (2, SIZES[0]) if lab.quick else (3, MAP_SIZE)
    alphas, temperatures = (ALPHAS[::2], TEMPERATURES[1:]) if lab.quick else (ALPHAS, TEMPERATURES)
    diagram = _runs(lab, "map", seeds, alphas, temperatures, num)
    regimes, regime_panel = _regimes(lab, seeds, num, diagram["change"][0], temperatures[0], alphas)
    noise, noise_panel = _noise(lab, seeds)
    diagram_claims, diagram_panels = _diagram(diagram, alphas, temperatures)
    return [*regimes, *noise, *diagram_claims], [*diagram_panels, regime_panel, noise_panel]


def _runs(
    lab: Laboratory, name: str, seeds: int, alphas: Sequence[float], temperatures: Sequence[float], num: int
) -> dict[str, Table]:
    """Values of "change", "error" and "time" as [T, α, seeds]; NaN where a run did not fit all examples."""
    common = {"width": WIDTH, "batch_size": BATCH, "num_test": NUM_TEST, "max_updates": MAX_UPDATES}
    rows = []
    for t in temperatures:
        for seed in range(seeds):
            settings: dict[str, Any] = {**common, "alphas": alphas, "temperatures": [t], "num_examples": num}
            rows.append(lab.part(f"digits-{name}-T{t:.3g}-{seed}", parity_runs, **settings, seed=seed)[0])
    found = {}
    for key in ("change", "error", "time"):
        values = np.array([[run[key] if run["fitted"] else math.nan for run in row] for row in rows])
        found[key] = values.reshape(len(temperatures), seeds, len(alphas)).transpose(0, 2, 1)
    return found


# --- over α ---------------------------------------------------------------------------------------------------------


def _regimes(
    lab: Laboratory, seeds: int, num: int, changes: Table, small: float, alphas: Sequence[float]
) -> tuple[list[Claim], Panel]:
    """`changes` [α, seeds] are those at T = `small`."""
    lazy = np.stack(
        [_runs(lab, f"lazy{alpha:g}", seeds, [alpha], [SMALL / alpha], num)["change"][0, 0] for alpha in LAZY]
    )
    low = [alpha for alpha in alphas if alpha <= FEATURE]
    feature = changes[: len(low)]
    steep, gentle = (law(x, y) for x, y in ((LAZY, lazy), (low, feature)))
    where = f"P = {num}, {seeds} seeds"
    lazies, features = (listed(means(y)) for y in (lazy, feature))
    claims = [
        Claim(
            "Digits parity: ‖w − w_0‖/‖w_0‖ falls as 1/α in lazy training",
            "derived here: the model is linear in the weights there",
            "slope over α in -1 ± 0.15 for α >= 10 at small T",
            f"{told(steep)} ({lazies} for α = {listed(LAZY)} at T = {SMALL:g}/α; {where})",
            abs(steep.exponent + 1) <= 0.15,
        ),
        Claim(
            "Digits parity: ‖w − w_0‖/‖w_0‖ does not depend on α in feature learning",
            "a guess made before any run, not of the paper",
            "slope over α in 0 ± 0.15 for α <= 0.1 at small T",
            f"{told(gentle)} ({features} for α = {listed(low)} at T = {small:g}; {where})",
            abs(gentle.exponent) <= 0.15,
            "f − f_0 has to reach 1/α, and f grows as ‖w‖ to the power D + 1 = 2: the weights have to grow with 1/α",
        ),
        Claim(
            "Digits parity: ‖w − w_0‖/‖w_0‖ grows as α^(−1/(D+1)) in feature learning",
            "derived here, from the homogeneity of a ReLU network with D = 1 hidden layers",
            "slope over α in -0.5 ± 0.15 for α <= 0.1 at small T",
            told(gentle),
            abs(gentle.exponent + 0.5) <= 0.15,
            "stated after the values of a first run were known",
        ),
    ]
    lines = [
        line(f"T = {SMALL:g}/α", LAZY, means(lazy), marker=True),
        line(f"∝ α^{steep.exponent:.2f}", LAZY, steep.at(LAZY)),
        line(f"T = {small:g}", low, means(feature), marker=True),
        line(f"∝ α^{gentle.exponent:.2f}", low, gentle.at(low)),
    ]
    title = "Digits: change of the weights, small T"
    return claims, Panel(title, "scale α", "‖w − w₀‖ / ‖w₀‖", lines, x_log=True, y_log=True)


# --- over T and P ---------------------------------------------------------------------------------------------------


def _noise(lab: Laboratory, seeds: int) -> tuple[list[Claim], Panel]:
    sizes = SIZES[:2] if lab.quick else SIZES
    runs = {num: _runs(lab, f"swept-P{num}", seeds, [SWEPT_ALPHA], SWEPT, num) for num in sizes}
    changes = {num: found["change"][:, 0] for num, found in runs.items()}  # [T, seeds]
    num = sizes[min(2, len(sizes) - 1)]
    raised = changes[num][SWEPT.index(0.3)] / changes[num][SWEPT.index(0.01)]
    critical = np.array([[place(crossover, SWEPT, y) for y in changes[size].T] for size in sizes])
    escape = np.array([[place(crossing, SWEPT, y, ESCAPE) for y in changes[size].T] for size in sizes])
    leaving, escaping = law(sizes, critical), law(sizes, escape)
    last = np.stack([changes[size][-1] for size in sizes])
    times = np.stack([runs[size]["time"][-1, 0] for size in sizes])
    gamma, duration = law(sizes, last), law(sizes, times)
    delta = law(SWEPT[-3:], changes[num][-3:])
    claims = [
        Claim(
            "Digits parity: noise takes the weights further in lazy training",
            PAPER,
            "‖w − w_0‖ at T = 0.3 above that at T = 0.01, α = 10, each seed",
            f"{listed(raised)} x at P = {num}",
            bool((raised > 1).all()),
        ),
        Claim(
            "Digits parity: T_c, where ‖w − w_0‖ is twice its plateau, falls with P",
            PAPER + " for T_c ~ P^(−a)",
            "exponent of P below 0 by more than two standard errors, α = 10",
            f"T_c ~ P^({told(leaving)}); T_c = {listed(means(critical))} for P = {listed(sizes)}, {seeds} seeds",
            leaving.exponent < -2 * leaving.error,
            f"the plateau is {listed([means(changes[size])[0] for size in sizes])} for P = {listed(sizes)}",
        ),
        Claim(
            f"Digits parity: the T at which ‖w − w_0‖/‖w_0‖ reaches {ESCAPE:g} falls with P",
            "derived here, as the T_c ~ P^(−a) of a lazy regime that ends at a fixed change of the weights",
            "exponent of P below 0 by more than two standard errors, α = 10",
            f"T ~ P^({told(escaping)}); T = {listed(means(escape))} for P = {listed(sizes)}, {seeds} seeds",
            escaping.exponent < -2 * escaping.error,
            "added after a short run had shown that the T_c above need not fall",
        ),
        Claim(
            "Digits parity: ‖w − w_0‖ ~ T^δ P^γ and t* ~ T P^b above T_c",
            PAPER,
            "reported",
            f"δ = {told(delta)} (T = {listed(SWEPT[-3:])}, P = {num}); γ = {told(gamma)}, b = {told(duration)} "
            f"(T = {SWEPT[-1]:g}); a = γ/δ would be {told(gamma.exponent / delta.exponent, '.2g')}; α = 10",
            None,
        ),
    ]
    lines = [line(f"P = {size}", SWEPT, means(changes[size]), marker=True) for size in sizes]
    title = f"Digits: change of the weights, α = {SWEPT_ALPHA:g}"
    return claims, Panel(title, "temperature T = η/B", "‖w − w₀‖ / ‖w₀‖", lines, x_log=True, y_log=True)


# --- the diagram ----------------------------------------------------------------------------------------------------


def _diagram(
    found: dict[str, Table], alphas: Sequence[float], temperatures: Sequence[float]
) -> tuple[list[Claim], list[Panel]]:
    change, error = (found[key].mean(-1) for key in ("change", "error"))
    lazy, noisy, feature = (0, -1), (-1, -1), (0, 0)  # T and α
    best = [temperatures[int(np.nanargmin(column))] if np.isfinite(column).any() else math.nan for column in error.T]
    spreads = found["error"].std(2)
    spread = float(spreads[np.isfinite(spreads)].mean()) if np.isfinite(spreads).any() else math.nan
    claims = [
        Claim(
            "Digits parity: raising T and lowering α both leave the lazy regime",
            PAPER,
            "‖w − w_0‖/‖w_0‖ above three times that at the largest α and the smallest T",
            f"{told(change[noisy] / change[lazy])} x at (α, T) = ({alphas[-1]:g}, {temperatures[-1]:g}), "
            f"{told(change[feature] / change[lazy])} x at ({alphas[0]:g}, {temperatures[0]:g})",
            bool(np.min([change[noisy], change[feature]]) > 3 * change[lazy]),  # NaN where one of them did not end
            "three was set here",
        ),
        Claim(
            "Digits parity: raising T and lowering α can change the test error in opposite directions",
            PAPER,
            "reported",
            f"error {told(100 * error[lazy], '.2g')} % at (α, T) = ({alphas[-1]:g}, {temperatures[0]:g}), "
            f"{told(100 * error[noisy], '.2g')} % at the largest T, {told(100 * error[feature], '.2g')} % at the "
            f"smallest α; spread over seeds {told(100 * spread, '.1g')} %",
            None,
        ),
        Claim(
            "Digits parity: for small α the best T is of order α^k with k = (D−1)/(D+1) = 0",
            PAPER,
            "reported",
            f"best T {listed(best)} for α = {listed(alphas)} of those tried",
            None,
        ),
    ]
    panels = [
        _heat("Digits parity: test error", alphas, temperatures, error, "test error", log=False),
        _heat("Digits parity: change of the weights", alphas, temperatures, change, "‖w − w₀‖ / ‖w₀‖", log=True),
    ]
    return claims, panels


def _heat(
    title: str, alphas: Sequence[float], temperatures: Sequence[float], values: Table, label: str, *, log: bool
) -> Panel:
    cells = [[None if math.isnan(value) else float(value) for value in row] for row in values]
    heat = Heat(list(alphas), list(temperatures), cells, label, log)
    return Panel(title, "scale α", "temperature T = η/B", [], x_log=True, y_log=True, heat=heat)
