"""Adam converges or diverges by its betas: the phase transition in (β₁, β₂), and what moves it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data_order import DataOrder
from ..optimizers.affine_variance import affine_variance
from ..optimizers.beta_phases import index_samples, phase_diagram
from ..optimizers.elementwise_adam import adam_paths
from ..workloads.digits import digits
from ..workloads.models import digits_mlp
from .counterexamples import adam_counterexample, reddi_stochastic
from .laboratory import Laboratory
from .result import Claim, Line, Panel
from .study import Study

PAPER = "Zhang et al. 2022"
BETA1S, BETA2S = (0.0, 0.5, 0.9), (0.0, 0.5, 0.8, 0.9, 0.99, 0.999)
FINE = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995)
TERMS = (5, 10, 20, 50, 100)
STEPS = 50_000
LEAST_SQUARES = (0.5, 0.9, 0.99, 0.999)
BATCH_SIZES, DIGIT_BETA2S = (8, 64, 512), (0.5, 0.9, 0.99, 0.999)
REDDI_BETA2S = (0.99, 0.999, 0.9999, 0.99999)


def investigate(lab: Laboratory) -> tuple[list[Claim], list[Panel]]:
    """All claims, and the four figures."""
    phases, phase_panel = _phases(lab)
    rising, rising_panel = _critical(lab)
    noise, noise_panel = _neighbourhood(lab)
    batches, batch_panel = _batch_sizes(lab)
    claims = [*_exactness(lab), *phases, *rising, *_cyclic(lab), *noise, *batches, *_reddi(lab)]
    return claims, [phase_panel, rising_panel, noise_panel, batch_panel]


# --- what holds exactly ---------------------------------------------------------------------------------------------


def exact_statements() -> dict[str, Any]:
    """Distance of the vectorised runs from torch.optim.Adam, and the constants of the counterexample."""
    problem, steps, apart = adam_counterexample(10), 1000, 0.0
    diagram = phase_diagram(problem, [0.0, 0.9], [0.5, 0.99], steps=steps, seeds=1)
    indices = index_samples(10, 1)(steps)[:, 0]
    for row, beta1 in enumerate(diagram.beta1s):
        for column, beta2 in enumerate(diagram.beta2s):
            x = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
            adam = torch.optim.Adam([x], betas=(beta1, beta2), foreach=False)
            path = []
            for k, i in enumerate(indices, 1):
                adam.param_groups[0]["lr"] = 0.1 / k**0.5
                adam.zero_grad()
                problem.value(x, torch.tensor([int(i)])).backward()
                adam.step()
                path.append(float(x.detach()))
            means = np.array(path).reshape(100, -1).mean(1)
            apart = max(apart, float(np.abs(means - diagram.curves[:, row, column, 0]).max()))
    constants = {}
    for n in (10, 50):
        problem, x = adam_counterexample(n), np.linspace(-6, 6, 241)
        sums = np.square(problem.slope(x[:, None], np.arange(n))).sum(1)
        found = affine_variance(problem.full_slope(x) ** 2, sums, n)
        constants[str(n)] = [found.D1, found.D0]
    return {"apart": apart, "constants": constants}


def _exactness(lab: Laboratory) -> list[Claim]:
    found = lab.part("exact", exact_statements)
    constants = {int(n): pair for n, pair in found["constants"].items()}
    text = "; ".join(f"n = {n}: D1 = {d1:.1f} = {d1 / n**2:.3f} n², D0 = {d0:.1e}" for n, (d1, d0) in constants.items())
    return [
        Claim(
            "The runs of the phase diagram are those of torch.optim.Adam",
            "derived here",
            "<= 1e-12 over 1000 steps, four pairs",
            f"{found['apart']:.1e}",
            found["apart"] <= 1e-12,
        ),
        Claim(
            "The counterexample lies in the class of the theorems: affine variance with D1 <= 2 n² and D0 = 0",
            f"{PAPER}, divergence theorem",
            "D1 <= 2 n², D0 <= 1e-9, on a grid of x",
            text,
            all(d1 <= 2 * n**2 and abs(d0) <= 1e-9 for n, (d1, d0) in constants.items()),
        ),
    ]


# --- the phase diagram ----------------------------------------------------------------------------------------------


def phases(n: int, steps: int, seeds: int) -> dict[str, Any]:
    """The phase diagram of the counterexample on the grid of the paper's figure."""
    diagram = phase_diagram(adam_counterexample(n), BETA1S, BETA2S, steps=steps, seeds=seeds)
    return {
        "final": diagram.final.tolist(),
        "labels": diagram.labels,
        "curves": diagram.curves[:, 0].mean(-1).tolist(),  # [100, B2] at β₁ = 0
        "ends": diagram.ends.tolist(),
        "critical": list(diagram.critical_beta2(0.0)),
    }


def _phases(lab: Laboratory) -> tuple[list[Claim], Panel]:
    seeds = 3 if lab.quick else 8
    found = {n: lab.part(f"phases-{n}", phases, n=n, steps=STEPS, seeds=seeds) for n in (10, 50)}
    final = {n: np.array(part["final"]) for n, part in found.items()}
    high, low = [BETA2S.index(b) for b in (0.99, 0.999)], [BETA2S.index(b) for b in (0.0, 0.5)]
    worst = {n: float(np.abs(x[:, high] + 2).max()) for n, x in final.items()}
    least = {n: float(x[0, low].min()) for n, x in final.items()}
    critical = {n: part["critical"] for n, part in found.items()}
    k = np.arange(1, STEPS + 1)
    way = float(0.1 * np.cumsum(k**-0.5)[-STEPS // 10 :].mean())
    drift = {n: (1 + (n - 2) / n * way, float(x[0, 0].mean()), _stderr(x[0, 0])) for n, x in final.items()}
    claims = [
        Claim(
            "Plain Adam converges once β₂ is large, whatever β₁",
            f"{PAPER}, convergence theorem and phase diagram",
            "|x + 2| <= 0.05 for β₂ >= 0.99, β₁ <= 0.9, n = 10 and 50, every seed",
            "; ".join(f"n = {n}: at most {value:.4f}" for n, value in worst.items()) + f" ({seeds} seeds)",
            all(value <= 0.05 for value in worst.values()),
        ),
        Claim(
            "It diverges where β₂ is small",
            f"{PAPER}, divergence theorem and phase diagram",
            "x >= 2 for β₁ = 0, β₂ <= 0.5, every seed (start 1, minimum −2)",
            "; ".join(f"n = {n}: at least {value:.1f}" for n, value in least.items()) + f" ({seeds} seeds)",
            all(value >= 2 for value in least.values()),
        ),
        Claim(
            "The critical β₂ at β₁ = 0 rises with the number of minibatches n",
            f"{PAPER}, phase diagram",
            "between 0.5 and 0.8 at n = 10, between 0.9 and 0.99 at n = 50",
            "; ".join(f"n = {n}: between {a} and {b}" for n, (a, b) in critical.items()),
            critical == {10: [0.5, 0.8], 50: [0.9, 0.99]},
        ),
        Claim(
            "At β₁ = β₂ = 0 Adam is the sign method and drifts at (n − 2)/n of its speed, away from the minimum",
            "derived here from the mechanism of the divergence theorem",
            "within four standard errors of 1 + (n − 2)/n Σ η",
            "; ".join(f"n = {n}: {x:.2f} ± {e:.2f}, predicted {p:.2f}" for n, (p, x, e) in drift.items()),
            all(abs(x - p) <= 4 * e for p, x, e in drift.values()),
        ),
        Claim(
            "At β₁ = 0.9, β₂ = 0 single runs end anywhere",
            "derived here",
            "reported",
            "; ".join(f"n = {n}: {', '.join(f'{v:.1f}' for v in x[-1, 0])}" for n, x in final.items()),
            None,
            "momentum over the size of one tiny gradient: erratic jumps, neither convergence nor a drift",
        ),
    ]
    lines = []
    for j, beta2 in enumerate(BETA2S):
        lines.append(Line(f"β₂ = {beta2:g}", found[50]["ends"], [row[j] for row in found[50]["curves"]]))
    panel = Panel("n = 50, β₁ = 0", "step", "x, mean over seeds", lines, x_log=True, levels={"minimum": -2.0})
    return claims, panel


def critical(n: int, steps: int, seeds: int) -> list[float | None]:
    """Largest β₂ of the fine grid that diverges at β₁ = 0, and the next."""
    return list(phase_diagram(adam_counterexample(n), [0.0], FINE, steps=steps, seeds=seeds).critical_beta2(0.0))


def _critical(lab: Laboratory) -> tuple[list[Claim], Panel]:
    terms = (5, 20, 100) if lab.quick else TERMS
    seeds = 3 if lab.quick else 8
    found = {n: lab.part(f"critical-{n}", critical, n=n, steps=STEPS, seeds=seeds) for n in terms}
    lower = [0.0 if pair[0] is None else pair[0] for pair in found.values()]
    upper = [1.0 if pair[1] is None else pair[1] for pair in found.values()]
    claim = Claim(
        "The critical β₂ rises with n, on a finer grid",
        f"{PAPER}, convergence theorem: the bound on β₂ rises to 1 with n",
        "does not fall from any n to the next, and rises from first to last",
        "; ".join(f"n = {n}: {a:g} to {b:g}" for n, a, b in zip(found, lower, upper, strict=True))
        + f" ({seeds} seeds)",
        bool(all(np.diff(lower) >= 0) and lower[-1] > lower[0]),
    )
    sizes = [float(n) for n in found]
    lines = [
        Line("1 − largest β₂ that diverges", sizes, [1 - b for b in lower], marker=True),
        Line("1 − next β₂ of the grid", sizes, [1 - b for b in upper], marker=True),
    ]
    return [claim], Panel("critical β₂ at β₁ = 0", "n", "1 − β₂", lines, x_log=True, y_log=True)


def cyclic(n: int, steps: int) -> dict[str, Any]:
    """Final x at β₁ = 0 with the terms in turn."""
    diagram = phase_diagram(adam_counterexample(n), [0.0], [0.5, 0.99], steps=steps, seeds=1, order="cyclic")
    return {"x": diagram.final[0, :, 0].tolist(), "labels": diagram.labels[0]}


def _cyclic(lab: Laboratory) -> list[Claim]:
    found = {n: lab.part(f"cyclic-{n}", cyclic, n=n, steps=STEPS) for n in (10, 50)}
    (low, high), (small, _) = found[50]["x"], found[10]["x"]
    return [
        Claim(
            "The transition is there in cyclic order too, n = 50",
            f"{PAPER}: sampling may be uniform, cyclic or reshuffled",
            "β₂ = 0.5 diverges, β₂ = 0.99 within 0.05 of −2 (β₁ = 0)",
            f"x = {low:.1f} ({found[50]['labels'][0]}), {high:.4f}",
            found[50]["labels"][0] == "diverged" and abs(high + 2) <= 0.05,
        ),
        Claim(
            "Cyclic order at n = 10, β₁ = 0, β₂ = 0.5",
            "derived here",
            "reported",
            f"x = {small:.2f}; uniform sampling diverges",
            None,
            "the boundary depends on the order",
        ),
    ]


# --- the neighbourhood ----------------------------------------------------------------------------------------------


def least_squares(steps: int, seeds: int) -> list[list[list[float]]]:
    """Mean |ℓ'| over the last tenth, [2, β₂, seeds]: with D0 > 0 (one target differs) and with D0 = 0 (none does)."""
    curvatures = np.array([1.0, 1.0, 1.0, 1.0, 10.0])
    pulls = curvatures * np.array([[0.0, 0.0, 0.0, 0.0, 1.0], [0.0] * 5])  # curvature times target, [2, terms]
    which = np.arange(2)[:, None, None]
    paths = adam_paths(
        lambda x, i: curvatures[i] * x - pulls[which, i],
        index_samples(5, seeds),
        np.ones((2, len(LEAST_SQUARES), seeds)),
        steps=steps,
        alpha=lambda t: 0.1 * t**-0.5,
        beta=0.9,
        theta=np.array(LEAST_SQUARES)[:, None],
        corrected=True,
        watch=lambda x: np.abs(14 * x - pulls.sum(1)[:, None, None]) / 5,
    )
    return paths.means[-10:].mean(0).tolist()


def _neighbourhood(lab: Laboratory) -> tuple[list[Claim], Panel]:
    found = lab.part("least-squares", least_squares, steps=200_000, seeds=4 if lab.quick else 8)
    noise, none = np.array(found)
    means, errors, clean = noise.mean(1), [_stderr(row) for row in noise], float(none.max())
    claims = [
        Claim(
            "With D0 > 0 Adam stalls at a gradient that shrinks as β₂ grows",
            f"{PAPER}, convergence theorem: the term (1 − β₂) √D0",
            "falls from β₂ = 0.5 over 0.9 to 0.99, and 0.999 is at most that of 0.99 plus 20 %",
            "; ".join(f"β₂ = {b:g}: {m:.3f} ± {e:.3f}" for b, m, e in zip(LEAST_SQUARES, means, errors, strict=True)),
            bool(means[0] > means[1] > means[2] and means[3] <= 1.2 * means[2]),
            "from 0.99 on the step size decides, not β₂",
        ),
        Claim(
            "With D0 = 0 it reaches the critical point",
            f"{PAPER}, convergence theorem under strong growth",
            "mean |ℓ'| <= 5e-4 for every β₂ and seed",
            "; ".join(f"β₂ = {b:g}: at most {v:.1e}" for b, v in zip(LEAST_SQUARES, none.max(1), strict=True)),
            clean <= 5e-4,
            "with a small β₂ the steps keep the size of η whatever the gradient, so |ℓ'| falls only as 1/√k",
        ),
    ]
    x = [1 - b for b in LEAST_SQUARES]
    lines = [
        Line("D0 > 0", x, means.tolist(), errors, marker=True),
        Line("D0 = 0", x, np.maximum(none.mean(1), 1e-16).tolist(), marker=True),
    ]
    return claims, Panel("least squares, β₁ = 0.9", "1 − β₂", "mean |ℓ'| at the end", lines, x_log=True, y_log=True)


# --- batch sizes ----------------------------------------------------------------------------------------------------


def digits_loss(batch_size: int, beta2: float, steps: int, seed: int) -> float:
    """Training loss of a network on digits after a run of Adam with β₁ = 0.9 and η_k = 0.02/√k."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data = digits().train
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = digits_mlp()
        adam = torch.optim.Adam(model.parameters(), betas=(0.9, beta2))
        order = DataOrder(len(data.targets), batch_size, seed)
        for step in range(steps):
            batch = order.at(step)
            assert batch is not None  # there are several batches
            adam.param_groups[0]["lr"] = 0.02 / (step + 1) ** 0.5
            adam.zero_grad()
            F.cross_entropy(model(data.inputs[batch]), data.targets[batch]).backward()
            adam.step()
        with torch.no_grad():
            return float(F.cross_entropy(model(data.inputs), data.targets))
    finally:
        torch.set_num_threads(threads)


def digits_losses(steps: int, seeds: int) -> list[list[list[float]]]:
    """For each batch size and β₂, the losses of all seeds."""
    return [
        [[digits_loss(size, beta2, steps, seed) for seed in range(seeds)] for beta2 in DIGIT_BETA2S]
        for size in BATCH_SIZES
    ]


def _batch_sizes(lab: Laboratory) -> tuple[list[Claim], Panel]:
    steps, seeds = (200, 1) if lab.quick else (1000, 5)
    losses = np.array(lab.part("digits", digits_losses, steps=steps, seeds=seeds))  # [batch sizes, β₂, seeds]
    means = losses.mean(-1)
    smallest = [next(b for b, loss in zip(DIGIT_BETA2S, row, strict=True) if loss <= 1.1 * row.min()) for row in means]
    text = "; ".join(
        f"batches of {size}: {least:g} (losses {', '.join(f'{v:.2g}' for v in row)})"
        for size, least, row in zip(BATCH_SIZES, smallest, means, strict=True)
    )
    claim = Claim(
        "Smaller batches need a larger β₂: the smallest β₂ within 10 % of the best loss, digits network, β₁ = 0.9",
        f"{PAPER}, experiment on batch size and β₂",
        f"does not rise with the batch size, among β₂ = {', '.join(map(str, DIGIT_BETA2S))}",
        text + f" (mean of {seeds} seeds, {steps} steps)",
        bool(all(np.diff(smallest) <= 0)),
    )
    x = [1 - b for b in DIGIT_BETA2S]
    lines = [
        Line(f"batches of {size}", x, row.mean(-1).tolist(), [_stderr(v) for v in row], marker=True)
        for size, row in zip(BATCH_SIZES, losses, strict=True)
    ]
    return [claim], Panel("digits network", "1 − β₂", "training loss", lines, x_log=True, y_log=True)


# --- the older counterexample ---------------------------------------------------------------------------------------


def reddi_ends(steps: int, seeds: int) -> list[list[float]]:
    """Mean x over the last tenth for each β₂ and seed at β₁ = 0.9, from 0, with η_k = 0.5/√k."""
    diagram = phase_diagram(reddi_stochastic(), [0.9], REDDI_BETA2S, steps=steps, seeds=seeds, lr=0.5, start=0.0)
    return diagram.final[0].tolist()


def _reddi(lab: Laboratory) -> list[Claim]:
    steps, most = (200_000, 0.0) if lab.quick else (1_000_000, -0.5)
    seeds = 16
    found = np.array(lab.part("reddi", reddi_ends, steps=steps, seeds=seeds))
    means, errors = found.mean(1), [_stderr(row) for row in found]
    return [
        Claim(
            "The constrained example of Reddi et al. goes to the wrong end at β₂ = 0.99, to the right one near 1",
            f"{PAPER}: problem first, betas afterwards",
            f"x >= 0.9 at β₂ = 0.99; x <= {most:g} at β₂ = 0.99999 (minimum −1)",
            "; ".join(f"β₂ = {b:g}: {m:.2f} ± {e:.2f}" for b, m, e in zip(REDDI_BETA2S, means, errors, strict=True))
            + f" ({seeds} seeds, {steps} steps)",
            bool(means[0] >= 0.9 and means[-1] <= most),
        )
    ]


def _stderr(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


STUDY = Study(
    name="adam-convergence",
    title="Adam converges without any modification, if β₂ is large enough for the problem",
    paper="Zhang, Chen, Shi, Sun, Luo: Adam Can Converge Without Any Modification On Update Rules, NeurIPS 2022",
    setting=(
        "Plain Adam with bias correction and η = 0.1/√k in float64 on the paper's one-dimensional counterexample with "
        "n minibatches, start 1, minimum −2, 50 000 steps, 8 seeds; least squares of five terms, 200 000 steps; the "
        "64-100-100-10 tanh network on 1500 digits, 1000 steps, 5 seeds; the example of Reddi et al., 1e6 steps."
    ),
    investigate=investigate,
)
