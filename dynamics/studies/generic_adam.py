"""Generic Adam: the averaging schedule decides on the counterexample, and its conditions predict the rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optimizers.beta_phases import index_samples
from ..optimizers.convergence_condition import check_sufficient_condition
from ..optimizers.elementwise_adam import adam_paths
from ..optimizers.generic_adam import GenericAdam
from ..optimizers.schedules import PaperTheta, PolynomialTheta, PowerSchedule, Values, practical
from .counterexamples import reddi_stochastic
from .laboratory import Laboratory
from .result import Claim, Line, Panel
from .study import Study

PAPER, JOURNAL = "Zou et al. 2019", "Chen et al. 2022"
RS, BETAS = (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.9)
THETAS = ("0.9", "0.99", "0.999", "1 − 1/t")
BATCH_SIZES, TARGET = (1, 4, 16), 0.1
GRID = [(s, r) for s in (0.0, 0.25, 0.5, 0.75, 1.0) for r in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)]

SHOWN = [(0.5, 0.25), (0.5, 0.5), (0.5, 1.0), (0.75, 1.0), (0.5, 0.0)]


def investigate(lab: Laboratory) -> tuple[list[Claim], list[Panel]]:
    """All claims, and the four figures."""
    ends, end_panel = _ends(lab)
    long, long_panel = _long(lab)
    noise = _neighbourhood(lab)
    speedup, speedup_panel = _speedup(lab)
    conditions, ratio_panel = _conditions(lab)
    return [*_limits(lab), *ends, *long, *conditions, *noise, *speedup], [
        end_panel,
        long_panel,
        ratio_panel,
        speedup_panel,
    ]


# --- members of the family ------------------------------------------------------------------------------------------


def limits() -> dict[str, float]:
    """Largest distance over 200 steps from torch's Adam, RMSprop and Adagrad at the schedules that make them."""
    pairs: dict[str, tuple[Callable[[list[Tensor]], Optimizer], Callable[[list[Tensor]], Optimizer]]] = {
        "Adam": (
            lambda p: GenericAdam(p, lr=0.01, theta="corrected=0.999", lr_schedule="momentum=0.9"),
            lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
        ),
        "RMSprop": (
            lambda p: GenericAdam(p, lr=0.01, theta=0.99, beta=0.0, v0=0.0),
            lambda p: torch.optim.RMSprop(p, lr=0.01, foreach=False),
        ),
        "Adagrad": (
            lambda p: GenericAdam(p, lr=0.1, theta="r=1", beta=0.0, lr_schedule="s=0.5", eps=0.0),
            lambda p: torch.optim.Adagrad(p, lr=0.1, eps=0.0, foreach=False),
        ),
    }
    gradients = torch.randn(200, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    apart = {}
    for name, (ours, theirs) in pairs.items():
        p, q = (nn.Parameter(torch.zeros(30, dtype=torch.float64)) for _ in range(2))
        mine, other, apart[name] = ours([p]), theirs([q]), 0.0
        for g in gradients:
            p.grad, q.grad = g.clone(), g.clone()
            mine.step()
            other.step()
            apart[name] = max(apart[name], float((p - q).detach().abs().max()))
    return apart


def _limits(lab: Laboratory) -> list[Claim]:
    found = lab.part("limits", limits)
    return [
        Claim(
            "Adam, RMSProp and AdaGrad are members: corrections and means are schedules of θ and of the learning rate",
            f"{PAPER}, section 2; for Adam's corrections derived here",
            "<= 1e-12 from torch.optim over 200 steps",
            ", ".join(f"{name} {value:.0e}" for name, value in found.items()),
            max(found.values()) <= 1e-12,
        )
    ]


# --- the counterexample ---------------------------------------------------------------------------------------------


def counterexample(rs: Sequence[float], betas: Sequence[float], steps: int, seeds: int, stretches: int) -> list[Any]:
    """Mean of x over equal stretches of steps, [stretches, r, β, seeds]; from 0 with α_t = 0.5/√t."""
    problem, thetas = reddi_stochastic(), [PaperTheta(r, base=0.01) for r in rs]
    paths = adam_paths(
        problem.slope,
        index_samples(problem.n, seeds),
        np.zeros((len(rs), len(betas), seeds)),
        steps=steps,
        alpha=lambda t: 0.5 * t**-0.5,
        beta=np.asarray(betas)[:, None],
        theta=lambda t: np.stack([theta.values(t) for theta in thetas], axis=1)[:, :, None, None],
        corrected=False,
        v0=1e-16,
        box=problem.box,
        num_stretches=stretches,
    )
    return paths.means.tolist()


def _ends(lab: Laboratory) -> tuple[list[Claim], Panel]:
    steps, seeds = 200_000, 64
    settings = {"rs": RS, "betas": BETAS, "steps": steps, "seeds": seeds, "stretches": 100}
    means = np.array(lab.part("counterexample", counterexample, **settings))
    tail = means[-10:].mean(0)  # [r, β, seeds]
    average, error = tail.mean(-1), tail.std(-1, ddof=1) / math.sqrt(seeds)
    claims = []
    for j, beta in enumerate(BETAS):
        a = average[:, j]
        text = "; ".join(f"r = {r:g}: {x:.2f} ± {e:.2f}" for r, x, e in zip(RS, a, error[:, j], strict=True))
        claims.append(
            Claim(
                f"On the counterexample small r stays at the wrong end +1, r = 1 turns to −1 (β = {beta:g})",
                f"{PAPER}, experiment on the counterexample",
                "x >= 0.9 for r = 0 and 0.25; <= −0.2 for r = 1; not rising in r from 0.25 on, within 0.05",
                text + f" ({seeds} seeds, {steps} steps)",
                bool(a[0] >= 0.9 and a[1] >= 0.9 and a[-1] <= -0.2 and (np.diff(a[1:]) <= 0.05).all()),
            )
        )
    same = float(np.abs(average[:, 0] - average[:, 1]).max())
    claims.append(
        Claim(
            "Momentum does not change this",
            "derived here",
            "means at β = 0 and 0.9 within 0.05",
            f"at most {same:.3f} apart",
            same <= 0.05,
        )
    )
    lines = [
        Line(f"β = {b:g}", list(RS), average[:, j].tolist(), error[:, j].tolist(), marker=True)
        for j, b in enumerate(BETAS)
    ]
    return claims, Panel("counterexample, 200 000 steps", "r", "x at the end", lines, levels={"optimum": -1.0})


def _long(lab: Laboratory) -> tuple[list[Claim], Panel]:
    steps, seeds = (300_000, 16) if lab.quick else (1_500_000, 64)
    settings = {"rs": (0.25, 1.0), "betas": (0.0,), "steps": steps, "seeds": seeds, "stretches": 150}
    means = np.array(lab.part("long", counterexample, **settings))[:, :, 0]  # [150, 2, seeds]
    ends = np.linspace(0, steps, 151)[1:]
    marks = [steps * share for share in (2 / 15, 0.5, 1.0)]
    found = []
    for mark in marks:
        last = (ends > 0.9 * mark) & (ends <= mark * 1.001)
        x = means[last].mean(0)  # [2, seeds]
        found.append((x.mean(-1), x.std(-1, ddof=1) / math.sqrt(seeds), (x < 0).mean(-1)))
    drifting = [x[1] for x, _, _ in found]
    text = "; ".join(
        f"T = {mark:.3g}: {x[1]:.2f} ± {e[1]:.2f}, {100 * share[1]:.0f} % below 0 "
        f"(r = 0.25: {x[0]:.2f}, {100 * share[0]:.0f} %)"
        for mark, (x, e, share) in zip(marks, found, strict=True)
    )
    falls, kept = bool((np.diff(drifting) < 0).all()), min(x[0] for x, _, _ in found)
    enough = lab.quick or found[-1][2][1] >= 0.9
    claim = Claim(
        "With r = 1 the mean goes on towards −1, with r = 0.25 it stays at +1",
        f"{PAPER}, the condition Σ α √(1 − θ) / (T α_T) → 0 and the counterexample",
        "r = 1: mean falls with T"
        + ("" if lab.quick else ", >= 90 % of seeds below 0 at the end")
        + "; r = 0.25: >= 0.95",
        text + f" ({seeds} seeds, β = 0)",
        bool(falls and kept >= 0.95 and enough),
    )
    spread = means.std(-1, ddof=1) / math.sqrt(seeds)
    lines = [
        Line(f"r = {r:g}", ends.tolist(), means[:, j].mean(-1).tolist(), spread[:, j].tolist())
        for j, r in enumerate((0.25, 1.0))
    ]
    return [claim], Panel("counterexample, β = 0", "step", "x, mean over seeds", lines, levels={"optimum": -1.0})


# --- the condition --------------------------------------------------------------------------------------------------


def conditions(T: int) -> list[dict[str, Any]]:
    """For each (s, r) of the grid what the checker says, and where it holds the slope of the ratio of item 4."""
    found = []
    for s, r in GRID:
        schedules = PowerSchedule(s), 0.9, PolynomialTheta(r, c=0.15)
        checked = check_sufficient_condition(*schedules, 10_000)
        if checked.holds or (s, r) in SHOWN:
            checked = check_sufficient_condition(*schedules, T)
        kept = checked.horizons >= 1000
        slope = np.polyfit(np.log(checked.horizons[kept]), np.log(checked.ratios[kept]), 1)[0]
        row = {"s": s, "r": r, "holds": checked.holds, "rate": checked.rate, "slope": float(slope)}
        found.append({**row, "T": checked.horizons.tolist(), "ratios": checked.ratios.tolist()})
    return found


def _conditions(lab: Laboratory) -> tuple[list[Claim], Panel]:
    found = lab.part("conditions", conditions, T=1_000_000)
    wrong, gaps = [], []
    for row in found:
        s, r = row["s"], row["r"]
        should = 0 < r <= 2 * s < 2
        exponent, log = max(-r / 2, s - 1), s + r / 2 == 1
        rate = f"T^{exponent:g}" + (" log T" if log else "") if should else None
        if (row["holds"], row["rate"]) != (should, rate):
            wrong.append((s, r))
        if should:
            T = np.array([1e3, 1e6])
            predicted = exponent + (np.diff(np.log(np.log(T))) / np.diff(np.log(T)))[0] * log
            gaps.append(abs(row["slope"] - predicted))
    claims = [
        Claim(
            "The checker classifies polynomial schedules as the corollary does, with its rates",
            f"{PAPER}, corollary on polynomial schedules: 0 < r <= 2 s < 2",
            f"all {len(GRID)} pairs (s, r)",
            f"{len(GRID) - len(wrong)} of {len(GRID)}" + (f"; not {wrong}" if wrong else ""),
            not wrong,
        ),
        Claim(
            "The ratio of item 4 falls at the predicted rate",
            f"{PAPER}, same corollary",
            "log-log slope within 0.05 for T from 1e3 to 1e6, the logarithm included",
            f"at most {max(gaps):.3f} off, {len(gaps)} schedules",
            max(gaps) <= 0.05,
        ),
    ]
    lines = [
        Line(f"s = {row['s']:g}, r = {row['r']:g}", row["T"], row["ratios"])
        for row in found
        if (row["s"], row["r"]) in SHOWN
    ]
    return claims, Panel("item 4", "T", "Σ α √(1 − θ) / (T α_T)", lines, x_log=True, y_log=True)


# --- the neighbourhood ----------------------------------------------------------------------------------------------


def skewed_noise(seeds: int, dimension: int, seed: int) -> Callable[[int], Values]:
    """Samples [k, seeds, dimension] of mean 0 and variance 1: large once in a hundred times, else small, negative."""
    stream, p = np.random.default_rng(seed), 0.01

    def samples(k: int) -> Values:
        rare = stream.random((k, seeds, dimension)) < p
        return np.where(rare, math.sqrt((1 - p) / p), -math.sqrt(p / (1 - p)))

    return samples


def tail_gradients(steps: int, seeds: int) -> list[list[float]]:
    """Mean ‖∇f‖ over the last tenth for each θ and seed; curvatures 0.1 to 1, α_t = 0.1/√t, β = 0."""
    curvatures = np.linspace(0.1, 1.0, 20)

    def theta(t: Values) -> Values:
        rows = [np.full_like(t, 0.9), np.full_like(t, 0.99), np.full_like(t, 0.999), 1 - 1 / t]
        return np.stack(rows, axis=1)[:, :, None, None]

    paths = adam_paths(
        lambda x, noise: curvatures * x + noise,
        skewed_noise(seeds, 20, 0),
        np.ones((4, seeds, 20)),
        steps=steps,
        alpha=lambda t: 0.1 * t**-0.5,
        beta=0.0,
        theta=theta,
        corrected=False,
        v0=1e-16,
        watch=lambda x: np.linalg.norm(curvatures * x, axis=-1),
    )
    return paths.means[-10:].mean(0).tolist()


def _neighbourhood(lab: Laboratory) -> list[Claim]:
    steps, seeds = (30_000, 2) if lab.quick else (100_000, 8)
    found = np.array(lab.part("neighbourhood", tail_gradients, steps=steps, seeds=seeds))
    means, errors = found.mean(1), found.std(1, ddof=1) / math.sqrt(seeds)
    return [
        Claim(
            "A constant θ leaves a neighbourhood, the smaller the larger θ; rare large gradients show it",
            f"{PAPER}, item 4 with a constant θ",
            "‖∇f‖ falls along the list, the last two within 5 %, the first at least three times the last",
            "; ".join(f"θ = {t}: {m:.3f} ± {e:.3f}" for t, m, e in zip(THETAS, means, errors, strict=True))
            + f" ({seeds} seeds, {steps} steps)",
            bool(means[0] > means[1] > means[2] and means[3] <= 1.05 * means[2] and means[0] >= 3 * means[3]),
        )
    ]


# --- minibatches ----------------------------------------------------------------------------------------------------


def mean_square_gradients(batch_size: int, lr_batch: int, horizons: Sequence[int], seeds: int) -> list[float]:
    """Mean ‖∇f‖² over whole runs of each length, with the constants that `practical` gives for batches of `lr_batch`.

    Least squares in ten dimensions, a ~ N(0, I), y = aᵀx* + 3 N(0, 1); start at distance 1.
    """
    found = []
    for T in horizons:
        constants, stream = practical(T, 10.0, a=0.3, batch_size=lr_batch), np.random.default_rng([batch_size, T])

        def samples(k: int, stream: np.random.Generator = stream) -> Values:
            return stream.standard_normal((k, seeds, batch_size, 11))

        def gradient(x: Values, drawn: Values) -> Values:
            a = drawn[..., :10]
            residual = np.einsum("kbd,kd->kb", a, x) - 3 * drawn[..., 10]
            return np.einsum("kb,kbd->kd", residual, a) / batch_size

        paths = adam_paths(
            gradient,
            samples,
            np.full((seeds, 10), math.sqrt(0.1)),
            steps=T,
            alpha=lambda t, constants=constants: np.full_like(t, constants["lr"]),
            beta=0.0,
            theta=constants["theta"],
            corrected=False,
            v0=1e-16,
            watch=lambda x: np.square(x).sum(-1),
            num_stretches=1,
        )
        found.append(float(paths.means.mean()))
    return found


def _speedup(lab: Laboratory) -> tuple[list[Claim], Panel]:
    horizons = [2**k for k in range(6, 13 if lab.quick else 18)]
    seeds, target = (8, 3 * TARGET) if lab.quick else (16, TARGET)
    claims, lines = [], []
    for scaled, words in ((True, "α = a √(s/T)"), (False, "α = a/√T")):
        curves = {}
        for s in BATCH_SIZES:
            settings = {"batch_size": s, "lr_batch": s if scaled else 1, "horizons": horizons, "seeds": seeds}
            curves[s] = lab.part(f"batches-{s}-{'scaled' if scaled else 'plain'}", mean_square_gradients, **settings)
        needed = [_crossing(horizons, curves[s], target) for s in BATCH_SIZES]
        lines += [Line(f"{words}, s = {s}", horizons, curves[s], marker=scaled) for s in BATCH_SIZES]
        p = -math.log(needed[-1] / needed[0]) / math.log(BATCH_SIZES[-1])
        text = "; ".join(f"s = {s}: {T:.0f} steps" for s, T in zip(BATCH_SIZES, needed, strict=True))
        claims.append(
            Claim(
                f"Minibatches of s speed up the run in proportion, with θ = 1 − c/T and {words}",
                f"{JOURNAL}, corollary on minibatches, α ∝ √s" if scaled else "derived here from the noise of v",
                f"steps to a mean ‖∇f‖² of {target:g} fall as s^-p, p in [0.7, 1.2] from s = 1 to 16",
                f"p = {p:.2f}: {text} ({seeds} seeds)",
                0.7 <= p <= 1.2,
                "v falls as 1/s where noise dominates, so that a fixed α already gives steps that grow as √s; √s more "
                "is too much"
                if scaled
                else "",
            )
        )
    return claims, Panel(
        "minibatches of s", "T", "mean ‖∇f‖² of the run", lines, x_log=True, y_log=True, levels={"target": target}
    )


def _crossing(x: Sequence[int], y: Sequence[float], level: float) -> float:
    """Where y, falling, passes the level: straight lines between the logarithms, the last one going on."""
    i = next((i for i in range(1, len(y)) if y[i] <= level), len(y) - 1)
    slope = math.log(y[i] / y[i - 1]) / math.log(x[i] / x[i - 1])
    return x[i] * math.exp(math.log(level / y[i]) / slope)


STUDY = Study(
    name="generic-adam",
    title="Generic Adam: how long the second moment remembers decides where it goes",
    paper=(
        "Zou, Shen, Jie, Zhang, Liu: A Sufficient Condition for Convergences of Adam and RMSProp, CVPR 2019; "
        "Chen, Shen, Zou, Liu: Towards Practical Adam, JMLR 2022"
    ),
    setting=(
        "The stochastic example of Reddi et al. on [−1, 1] from 0, α = 0.5/√t, θ = 1 − (0.01 + 0.99 r)/t^r, 64 seeds, "
        "2e5 and 1.5e6 steps; a quadratic of 20 dimensions with skewed noise, 1e5 steps, 8 seeds; least squares of 10 "
        "dimensions with Gaussian noise, 16 seeds. float64."
    ),
    investigate=investigate,
)
