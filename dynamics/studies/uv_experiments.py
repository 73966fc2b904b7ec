"""What the study of the UV model measures on the model itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...hessian.curvature import Hessian
from ...hessian.eigs import top_eigenvalues
from ...hessian.tracking import EigenTracker
from ...landscape.objective import Objective
from ..bifurcation import bifurcation, detect_period, late_orbit, lyapunov_exponent, onset
from ..regimes import regimes
from ..uv_model import UVModel, balanced_map, balanced_slope, uv_jacobian, uv_map, uv_sharpness

WIDTH, INPUTS = 7, 5
# Of the scaled variables A = L + 2F and B = L − 2F at a small random start.
LARGEST_START = 0.2
DOUBLING_BRACKETS = ((0.98, 1.02), (1.2, 1.27), (1.26, 1.296), (1.29, 1.2999))

State = tuple[float, float, float]


def small_start(
    random: np.random.Generator, shape: tuple[int, ...] = (), largest: float = LARGEST_START
) -> tuple[np.ndarray, np.ndarray]:
    """F and L for A and B uniform up to `largest`."""
    A, B = largest * random.random((2, *shape))
    return (A - B) / 4, (A + B) / 2


def states(Y: float, start: Sequence[float]) -> Iterator[State]:
    """(F, L, Y) from a start on."""
    F, L = start
    while True:
        yield F, L, Y
        F, L = uv_map(F, L, Y)


def f_of(state: State) -> float:
    return state[0]


def edge_of(state: State) -> float:
    """η λ_max."""
    return float(uv_sharpness(*state))


# --- the closed forms -----------------------------------------------------------------------------------------------


def setting(seed: int, Y: float, scale: float = 0.25) -> tuple[UVModel, Tensor, float, float]:
    """A model, its example and target, and the step Y η_c."""
    random = torch.Generator().manual_seed(1000 + seed)
    model = UVModel(WIDTH, INPUTS, scale=scale, seed=seed)
    x = torch.randn(INPUTS, generator=random, dtype=torch.float64)
    y = 1.0 + float(torch.rand((), generator=random))
    return model, x, y, Y * model.eta_c(x, y)


def objective_of(model: UVModel, x: Tensor, y: float) -> Objective:
    def loss(module: Any, batch: Tensor) -> Tensor:
        return 0.5 * (module(batch) - y).square().mean()

    return Objective(model, loss, x[None])


def closure(seed: int, Y: float, steps: int) -> dict[str, float]:
    """Largest errors of the map, of the trace and of the sharpness along gradient descent by autograd."""
    model, x, y, lr = setting(seed, Y)
    F, L, scaled_y = model.scaled(x, y, lr)
    errors, largest = {"map": 0.0, "trace": 0.0, "sharpness": 0.0}, 0.0
    unit = lr * math.sqrt(float(x.square().sum()) / model.N)  # F over f
    for _ in range(steps):
        actual_f, actual_l, _ = model.scaled(x, y, lr)
        errors["map"] = max(errors["map"], abs(F - actual_f) / unit, abs(L - actual_l) / lr)
        dense = dense_hessian(model, x, y)
        values = np.linalg.eigvalsh(dense)
        errors["trace"] = max(errors["trace"], abs(float(np.trace(dense)) - model.ntk_exact(x)))
        errors["sharpness"] = max(errors["sharpness"], abs(float(values[-1]) - model.sharpness_exact(x, y)))
        largest = max(largest, abs(actual_f - scaled_y))
        descend_once(model, x, y, lr)
        F, L = uv_map(F, L, scaled_y)
    return {**errors, "residual": largest}


def far_from_minimum(seed: int, points: int) -> float:
    """Largest error of the sharpness relative to it, at random weights and targets up to ±100 away."""
    random, worst = np.random.default_rng(seed), 0.0
    for i in range(points):
        model, x, _, _ = setting(1000 * seed + i, 1.0, scale=float(random.uniform(0.05, 2)))
        y = float(random.normal()) * 10 ** float(random.uniform(-2, 2))
        largest = float(np.linalg.eigvalsh(dense_hessian(model, x, y))[-1])
        worst = max(worst, abs(largest - model.sharpness_exact(x, y)) / abs(largest))
    return worst


def dense_hessian(model: UVModel, x: Tensor, y: float) -> np.ndarray:
    """By autograd, [n, n]."""
    U, v = model.U.detach(), model.v.detach()
    flat = torch.cat([U.flatten(), v])

    def loss(theta: Tensor) -> Tensor:
        f = theta[U.numel() :] @ (theta[: U.numel()].view_as(U) @ x) / math.sqrt(model.N)
        return 0.5 * (f - y).square()

    return torch.autograd.functional.hessian(loss, flat).numpy()


def descend_once(model: UVModel, x: Tensor, y: float, lr: float) -> None:
    gradients = torch.autograd.grad(model.loss(x, y), list(model.parameters()))
    with torch.no_grad():
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p -= lr * gradient


def tracked(seed: int, Y: float, burn_in: int, steps: int) -> dict[str, Any]:
    """Largest error of the library's sharpness, and of its tracker's, along an orbit at the edge."""
    model, x, y, lr = setting(seed, Y)
    objective, tracker = objective_of(model, x, y), EigenTracker(tol=1e-11)
    errors, residuals, lowest = {"search": 0.0, "tracker": 0.0}, [], 0.0
    for step in range(burn_in + steps):
        if step >= burn_in:
            exact, hessian = model.sharpness_exact(x, y), Hessian(objective)
            found = {"search": top_eigenvalues(hessian, tol=1e-11), "tracker": tracker.measure(hessian)}
            for name, pairs in found.items():
                errors[name] = max(errors[name], abs(float(pairs.values[0]) - exact))
            residuals.append(float(model(x).detach()) - y)
            lowest = min(lowest, float(np.linalg.eigvalsh(dense_hessian(model, x, y))[0]) / exact)
        descend_once(model, x, y, lr)
    return {**errors, "above": sum(r > 0 for r in residuals), "below": sum(r < 0 for r in residuals), "lowest": lowest}


def far_negative(seed: int) -> dict[str, float]:
    """The sharpness found where the lowest eigenvalue is nearly as large as the largest, and that of the loss minus
    c ‖θ‖²/2, where it is larger.

    Two eigenvalues of the model's Hessian have the sum λ >= 0, the others are zero or come in pairs ±|D|, so that
    without the quadratic the lowest is never larger in magnitude. With it all are lower by c, half the sharpness.
    """
    model, x, _, _ = setting(seed, 1.0, scale=0.1)
    with torch.no_grad():
        # A = L + 2F = 0: F < 0, and the target is far above.
        model.v.copy_(-(model.U @ x) / x.norm())
        y = float(model(x)) + 50.0
    lowest = float(np.linalg.eigvalsh(dense_hessian(model, x, y))[0])
    exact = model.sharpness_exact(x, y)
    c = exact / 2

    def lowered(module: Any, batch: Tensor) -> Tensor:
        return 0.5 * (module(batch) - y).square().mean() - 0.5 * c * sum(p.square().sum() for p in module.parameters())

    plain, shifted = Hessian(objective_of(model, x, y)), Hessian(Objective(model, lowered, x[None]))
    return {
        "found": float(top_eigenvalues(plain, tol=1e-11).values[0]),
        "exact": exact,
        "lowest": lowest,
        "shifted_search": float(top_eigenvalues(shifted, tol=1e-11).values[0]),
        "shifted_tracker": float(EigenTracker(tol=1e-11).measure(shifted).values[0]),
        "shifted_exact": exact - c,
        "shifted_lowest": lowest - c,
    }


def signs(num: int, seed: int) -> dict[str, int]:
    """Disagreements of the sign of λ' − λ with that of D (ηDλ − 4f), and of the first change from a zero output."""
    random = np.random.default_rng(seed)
    A, B = random.exponential(1.0, (2, num))
    F, L, Y = (A - B) / 4, (A + B) / 2, random.normal(0, 1, num)
    grown, D = uv_map(F, L, Y)[1] - L, F - Y
    wrong = int((np.sign(grown) != np.sign(D * (D * L - 4 * F))).sum())
    silent = sum(uv_map(0.0, lam, y)[1] <= lam for lam, y in zip(L, Y, strict=True))
    # Gradient flow: the kernel grows where f lies between 0 and y. A step of 1e-6 shows it.
    small = 1e-6
    flow = uv_map(small * F, small * L, small * Y)[1] - small * L
    inside = (F * (Y - F)) > 0
    return {"wrong": wrong, "silent": int(silent), "flow": int(((flow > 0) != inside).sum()), "num": num}


# --- orbits ---------------------------------------------------------------------------------------------------------


def attractor(Y: float, seeds: Sequence[int], burn_in: int, keep: int) -> list[dict[str, Any]]:
    """The late orbit from several small starts."""
    found = []
    for seed in seeds:
        start = [float(number) for number in small_start(np.random.default_rng(seed))]
        late = list(islice(states(Y, start), burn_in, burn_in + keep))
        F, L = np.array([state[0] for state in late]), np.array([state[1] for state in late])
        found.append(
            {
                "period": detect_period(F, 1e-7),
                "F": sorted({round(float(value), 9) for value in F[:64]})[:4],
                "L": float(L.mean()),
                "L_range": [float(L.min()), float(L.max())],
                "sharpness": float(np.mean([edge_of(state) for state in late])),
                "unbalance": float(np.abs(L - 2 * F).max()),
                "transverse": float(np.log(np.abs(1 + F - Y)).mean()),
                "finite": bool(np.isfinite(F).all()),
            }
        )
    return found


def doublings(burn_in: int, width: float) -> list[list[float]]:
    """Brackets of Y at which the orbit of the whole map loses period 1, 2, 4, 8."""

    def period(Y: float) -> int | None:
        return detect_period(late_orbit(states(Y, (0.04, 0.1)), burn_in=burn_in, keep=64, observable=f_of), 1e-5)

    return [
        list(onset(lambda Y, p=2**k: period(Y) != p, low, high, width=width))
        for k, (low, high) in enumerate(DOUBLING_BRACKETS)
    ]


@cache
def exact_doublings(num: int = 4) -> tuple[float, ...]:
    """Y at which the multiplier of the orbit of period 2, 4, ... on the manifold is −1, after 1 for the first one."""
    from scipy.optimize import brentq

    def beyond(Y: float, p: int) -> float:
        """The multiplier plus one, of the orbit by iteration and then by Newton's method, which finds unstable ones."""
        F = 1.0
        for _ in range(4000):
            F = balanced_map(F, Y)
        for _ in range(30):
            end, slope = F, 1.0
            for _ in range(p):
                slope, end = slope * balanced_slope(end, Y), balanced_map(end, Y)
            F -= (end - F) / (slope - 1)
        slope = 1.0
        for _ in range(p):
            slope, F = slope * balanced_slope(F, Y), balanced_map(F, Y)
        return slope + 1

    found = [1.0]
    for k in range(1, num):
        low, high = DOUBLING_BRACKETS[k]
        root: Any = brentq(beyond, low + 0.02 * (high - low), high, args=(2**k,), xtol=1e-13)
        found.append(float(root))
    return tuple(found)


def bounded(Ys: Sequence[float], largest_start: float, starts: int, steps: int, seed: int) -> list[float]:
    """Share of random starts, A and B uniform up to `largest_start`, that stay finite, for each Y."""
    F, L = small_start(np.random.default_rng(seed), (len(Ys), starts), largest_start)
    Y = np.asarray(Ys)[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(steps):
            F, L = uv_map(F, L, Y)
    return np.isfinite(F).mean(1).tolist()


def diagram(Ys: Sequence[float], burn_in: int, keep: int) -> dict[str, Any]:
    """The bifurcation diagram of η λ_max, and the Lyapunov exponent."""

    def run(Y: float) -> Iterator[State]:
        return states(Y, (0.04, 0.1))

    found = bifurcation(run, Ys, burn_in=burn_in, keep=keep, observable=edge_of)
    dots = sorted({(x, round(y, 4)) for x, y in zip(*found.points(), strict=True)})
    exponents = [
        None if gone else lyapunov_exponent(run(Y), lambda s: uv_jacobian(*s), burn_in=500, steps=1500)
        for Y, gone in zip(Ys, found.diverged, strict=True)
    ]
    return {"x": [x for x, _ in dots], "y": [y for _, y in dots], "periods": found.periods, "exponents": exponents}


def path(Y: float, start: Sequence[float], steps: int) -> dict[str, Any]:
    """Loss in units of y², scaled residual D, η λ and η λ_max along a run, and the labels of its regimes."""
    along = list(islice(states(Y, start), steps))
    loss, sharpness = [0.5 * ((F - Y) / Y) ** 2 for F, _, _ in along], [edge_of(state) for state in along]
    return {
        "regimes": [regime.label for regime in regimes(list(range(steps)), loss, sharpness, 2.0)],
        "loss": loss,
        "D": [F - Y for F, _, _ in along],
        "L": [L for _, L, _ in along],
        "sharpness": sharpness,
    }


def fixed_points(Ys: Sequence[float]) -> list[dict[str, Any]]:
    """Residuals of the four families of fixed points, and moduli of the multipliers of each, larger first."""
    found = []
    for Y in Ys:
        families = {
            "I": (Y, 2 * Y + 0.5 * max(0.0, 2 - 2 * Y)),
            "II": (0.0, 0.0),
            "III": (Y + 2, 2 * (Y + 2)),
            "IV": (Y - 2, 2 * (2 - Y)),
        }
        for name, (F, L) in families.items():
            after = uv_map(F, L, Y)
            moduli = sorted(np.abs(np.linalg.eigvals(uv_jacobian(F, L, Y))), reverse=True)
            residual = max(abs(after[0] - F), abs(after[1] - L))
            found.append({"family": name, "Y": Y, "L": L, "residual": residual, "moduli": [float(m) for m in moduli]})
    return found


def ratios(Ys: Sequence[float]) -> list[float]:
    """Of successive distances, which tend to Feigenbaum's 4.669."""
    gaps = [b - a for a, b in pairwise(Ys)]
    return [a / b for a, b in pairwise(gaps)]
