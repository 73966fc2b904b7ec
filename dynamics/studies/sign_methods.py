"""Sign methods put to the test: momentum, gradient transport, Lion, and where signs go wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..optimizers.sign import theoretical_rates
from .laboratory import Laboratory
from .result import Claim, Line, Panel
from .sign_experiments import (
    QUADRATIC,
    STEP,
    digits_tuned,
    exact_statements,
    mean_gradient_norm,
    quadratic_run,
    skewed_runs,
    text_tuned,
)
from .study import Study

PAPER = "Sun et al. 2023"
METHODS = ("signSGD", "Signum", "transport", "Lion")
DIGITS_LRS = {"AdamW": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "Lion": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)}
DIGITS_DECAYS = {"AdamW": (0.0, 0.1), "Lion": (0.0, 1.0)}
TEXT_LRS = {"AdamW": (1e-3, 3e-3, 1e-2, 2e-2, 4e-2), "Lion": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)}
TEXT_DECAYS = {"AdamW": (0.0, 0.1), "Lion": (0.0, 1.0)}


def investigate(lab: Laboratory) -> tuple[list[Claim], list[Panel]]:
    """All claims, and curves of the acceleration, the drift and the cycle."""
    accelerated, acceleration_panel = _acceleration(lab)
    drifts, drift_panel = _drift(lab)
    cycles, cycle_panel = _cycle(lab)
    claims = [*_exactness(lab), *accelerated, *drifts, *_digits(lab), *_text(lab), *cycles]
    return claims, [acceleration_panel, drift_panel, cycle_panel]


# --- exact statements -----------------------------------------------------------------------------------------------


def _exactness(lab: Laboratory) -> list[Claim]:
    found = lab.part("exact", exact_statements)
    parity = found["parity"]
    return [
        Claim(
            "Lion makes the steps of lion-pytorch, with weight decay",
            "Chen et al. 2023, program 1",
            "equal in 200 steps",
            "not compared" if parity is None else f"largest difference {parity:.1g}",
            None if parity is None else parity == 0.0,
            "the package lion-pytorch is not installed" if parity is None else "",
        ),
        Claim(
            "Lion's direction is an average of g + c (g − g_prev) with c = (b2 − b1)/(1 − b2) = 9",
            "derived here",
            "<= 1e-12 in float64",
            f"{found['identity']:.1e}",
            found["identity"] <= 1e-12,
        ),
        Claim(
            "on a quadratic without noise the transported momentum is the gradient at the weights, but for its start",
            "derived here",
            "<= 1e-12 in float64",
            f"{found['transport']:.1e}",
            found["transport"] <= 1e-12,
        ),
    ]


# --- acceleration ---------------------------------------------------------------------------------------------------


def slope(lengths: Sequence[int], norms: np.ndarray) -> tuple[float, float]:
    """Slope of log norm over log T, mean over seeds and its standard error; norms [T, seeds]."""
    x = np.log(np.asarray(lengths, dtype=float))
    slopes = np.polyfit(x, np.log(norms), 1)[0]
    return float(slopes.mean()), float(slopes.std(ddof=1) / math.sqrt(len(slopes)))


def _acceleration(lab: Laboratory) -> tuple[list[Claim], Panel]:
    lengths = (500, 1000, 2000) if lab.quick else (1000, 2000, 4000, 8000, 16000)
    seeds = 3 if lab.quick else 8
    norms = {
        method: np.array(
            [lab.part(f"norms-{method}-{T}", mean_gradient_norm, method=method, steps=T, seeds=seeds) for T in lengths]
        )
        for method in METHODS
    }
    shown = {method: "/".join(f"{x:.1f}" for x in values.mean(1)) for method, values in norms.items()}
    sign, signum, transport, lion = (norms[method] for method in METHODS)
    ordered = bool((sign > signum).all() and (signum > transport).all())
    margin = signum[-1].mean() / transport[-1].mean()
    apart = abs(lion[-1].mean() / transport[-1].mean() - 1)
    (a, a_error), (b, b_error) = slope(lengths, transport), slope(lengths, signum)
    differences = [slope(lengths, transport[:, [s, s]])[0] - slope(lengths, signum[:, [s, s]])[0] for s in range(seeds)]
    error = float(np.std(differences, ddof=1) / math.sqrt(seeds))
    T = lengths[-1]
    theta = theoretical_rates(T, 2)[1]
    c, full = (theta - 1 + T ** (-2 / 7)) / (1 - theta), theta / (1 - theta)
    where = f"T = {'/'.join(map(str, lengths))}, {seeds} seeds"
    claims = [
        Claim(
            "mean l1 gradient norm: signSGD > Signum > transport at the rates of the theory",
            f"{PAPER}, abstract; exponents of Cutkosky and Mehta 2020",
            "in every seed at every T",
            f"{where}: signSGD {shown['signSGD']}, Signum {shown['Signum']}, transport {shown['transport']}, "
            f"Lion {shown['Lion']}",
            ordered,
        ),
        Claim(
            f"transport is ahead of Signum by a tenth at T = {T}",
            PAPER,
            "Signum / transport >= 1.1" + (" at T = 16000" if lab.quick else ""),
            f"{margin:.3f}",
            None if lab.quick else bool(margin >= 1.1),
            "too short a run for the claim" if lab.quick else "",
        ),
        Claim(
            f"Lion is a cheap form of transport (T = {T})",
            f"{PAPER}, abstract",
            "within 5 % of transport" + (" at T = 16000" if lab.quick else ""),
            f"{100 * apart:.1f} %",
            None if lab.quick else bool(apart <= 0.05),
            f"Lion extrapolates by c = {c:.0f} steps, transport by {full:.0f}"
            + ("; too short a run" if lab.quick else ""),
        ),
        Claim(
            "the norm falls faster in T with transport",
            f"{PAPER}, rates T^(-2/7) and T^(-1/4)",
            "log-log slope more negative than Signum's",
            f"transport {a:.3f} ± {a_error:.3f}, Signum {b:.3f} ± {b_error:.3f}, difference {a - b:.3f} ± {error:.3f}",
            bool(a < b),
            "the exponents themselves are upper bounds and are not claimed",
        ),
    ]
    lines = [
        Line(method, lengths, values.mean(1).tolist(), values.std(1, ddof=1).tolist(), marker=True)
        for method, values in norms.items()
    ]
    panel = Panel("Rates of the theory", "steps T", "mean l1 norm of the gradient", lines, x_log=True, y_log=True)
    return claims, panel


# --- a skewed gradient ----------------------------------------------------------------------------------------------


def _drift(lab: Laboratory) -> tuple[list[Claim], Panel]:
    steps, runs = (4000 if lab.quick else 20000), 64
    paths = {
        name: np.array(lab.part(f"skewed-{name}", skewed_runs, momentum=beta, steps=steps, runs=runs))
        for name, beta in (("signSGD", 0.0), ("Signum", 0.99))
    }
    sign, signum = (paths[name][-1] for name in ("signSGD", "Signum"))
    expected = 0.5e-3 * steps
    claims = [
        Claim(
            f"signSGD without momentum climbs a slope of skewed gradients ({steps} steps)",
            "derived here: the median has the wrong sign",
            f"w ends at {expected:+g} ± 5 %, uphill",
            f"{sign.mean():+.2f} ± {sign.std(ddof=1):.2f} over {runs} runs",
            bool(abs(sign.mean() / expected - 1) <= 0.05),
        ),
        Claim(
            "an average over 1/(1 − 0.99) gradients descends",
            "Sun et al. 2023, Momentum ensures convergence of SIGNSGD under weaker assumptions",
            f"w < {-0.75e-3 * steps:g} in every run",
            f"{signum.mean():+.2f} ± {signum.std(ddof=1):.2f}, highest {signum.max():+.2f}",
            bool((signum < -0.75e-3 * steps).all()),
        ),
    ]
    times = np.linspace(0, steps, 101).tolist()
    lines = [Line(name, times, path.mean(1).tolist(), path.std(1, ddof=1).tolist()) for name, path in paths.items()]
    return claims, Panel("A slope of +0.25 with skewed gradients", "step", "w", lines)


# --- real data ------------------------------------------------------------------------------------------------------


def _digits(lab: Laboratory) -> list[Claim]:
    steps, seeds = (300, 2) if lab.quick else (600, 5)
    found = {
        name: lab.part(
            f"digits-{name}",
            digits_tuned,
            optimizer=name,
            lrs=list(DIGITS_LRS[name][2:] if lab.quick else DIGITS_LRS[name]),
            decays=list(DIGITS_DECAYS[name]),
            seeds=seeds,
            steps=steps,
        )
        for name in ("AdamW", "Lion")
    }
    means = {name: float(np.mean(part["accuracies"])) for name, part in found.items()}
    errors = {name: float(np.std(part["accuracies"], ddof=1)) for name, part in found.items()}
    told = "; ".join(
        f"{name} {means[name]:.2f} ± {errors[name]:.2f} (lr {part['lr']:g}, decay {part['weight_decay']:g})"
        for name, part in found.items()
    )
    rms = found["Lion"]["rms"]
    return [
        Claim(
            f"Lion does as well as AdamW on digits, both tuned over lr and decay ({steps} steps)",
            "Chen et al. 2023",
            "held-out accuracy within 1 point",
            f"{told}; {seeds} seeds",
            means["Lion"] >= means["AdamW"] - 1,
        ),
        Claim(
            "the RMS of Lion's updates is its learning rate, but for coordinates that stand still",
            "Chen et al. 2023",
            "relative deviation <= 1e-2 in float32",
            f"{rms:.1e}",
            rms <= 1e-2,
        ),
    ]


def _text(lab: Laboratory) -> list[Claim]:
    if lab.quick:
        return []
    found = {
        name: lab.part(
            f"text-{name}",
            text_tuned,
            optimizer=name,
            lrs=list(TEXT_LRS[name]),
            decays=list(TEXT_DECAYS[name]),
            seeds=3,
            steps=250,
        )
        for name in ("AdamW", "Lion")
    }
    means = {name: float(np.mean(part["losses"])) for name, part in found.items()}
    told = "; ".join(
        f"{name} {means[name]:.3f} ± {np.std(part['losses'], ddof=1):.3f} (lr {part['lr']:g}, "
        f"decay {part['weight_decay']:g})"
        for name, part in found.items()
    )
    return [
        Claim(
            "Lion does as well as AdamW on the character transformer, both tuned over lr and decay (250 steps)",
            "Chen et al. 2023",
            "held-out loss within 0.1 nats",
            f"{told} nats; 3 seeds",
            means["Lion"] <= means["AdamW"] + 0.1,
            "the best lr is at the edge of those tried" if any(part["at_edge"] for part in found.values()) else "",
        )
    ]


# --- near a minimum -------------------------------------------------------------------------------------------------


def _cycle(lab: Laboratory) -> tuple[list[Claim], Panel]:
    bound = 0.5 * STEP**2 * sum(QUADRATIC)
    straight = lab.part("quadratic", quadratic_run, rotation=None, steps=300)
    seeds = range(5 if lab.quick else 20)
    turned = [lab.part(f"quadratic-{seed}", quadratic_run, rotation=seed, steps=300) for seed in seeds]
    outside = [run["late"] for run in turned if run["largest"] > STEP * (1 + 1e-12)]
    above = [run["late"] for run in turned if run["late"] > bound]
    claims = [
        Claim(
            "with a constant step on a diagonal quadratic signSGD ends in a 2-cycle, so that no step size is unstable",
            "derived here",
            f"|w_i| <= {STEP:g}, loss <= γ² tr(H) / 2 = {bound:.1e}",
            f"|w_i| <= {straight['largest']:.4f}, loss {straight['late']:.1e}, period two: {straight['period2']}",
            straight["period2"] and straight["late"] <= bound and straight["largest"] <= STEP,
        ),
        Claim(
            "in a rotated basis that bound fails: signs depend on the coordinates",
            "derived here",
            "loss above the bound for some rotation",
            f"above in {len(above)} of {len(turned)} rotations, largest loss {max(run['late'] for run in turned):.1e}; "
            f"|w_i| > γ in {len(outside)}",
            len(above) > 0,
        ),
    ]
    worst = max(range(len(turned)), key=lambda i: turned[i]["late"])
    lines = [
        Line("diagonal", list(range(1, 301)), straight["losses"]),
        Line(f"rotated (worst of {len(turned)})", list(range(1, 301)), turned[worst]["losses"]),
    ]
    return claims, Panel("signSGD on a quadratic", "step", "loss", lines, y_log=True, levels={"γ² tr(H) / 2": bound})


STUDY = Study(
    name="sign-methods",
    title="Sign methods: momentum, gradient transport and Lion",
    paper="Sun, Chen, Qiao, Shen, Liu, Li, Rethinking SIGN Training: Provable Nonconvex Acceleration without First- "
    "and Second-Order Gradient Lipschitz, 2023; Chen et al., Symbolic Discovery of Optimization Algorithms, 2023",
    setting="Sum of 200 terms λ√(1 + w²) with unit gradient noise, up to 16000 steps, 8 seeds; digits MLP, 600 steps "
    "of batch 64, 5 seeds; character transformer, 250 steps, 3 seeds; a skewed slope, 64 runs; quadratics of size 3.",
    investigate=investigate,
)
