"""What the study of heavy-tailed noise measures: samplers, stationary laws, coupled chains, tail indices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...landscape.tail_index import TailIndex, tail_index
from ..coupled_runs import coupled_runs
from ..optimizers.heavy_tailed import HeavyTailedSGD
from ..optimizers.stable import isotropic_stable, stable, stable_abs_mean, stable_ou_scale
from .digit_problems import digit_examples

FREQUENCIES = (0.2, 0.5, 1.0, 1.5, 2.0)
MARKS = (0.5, 1.0, 2.0, 5.0, 20.0)  # where distribution functions are compared
DIMENSION = 3
CONTRACTION, RELATIVE_CHANGE = 0.05, 0.05  # η a' of the more curved chain, (a' − a) / a


def samplers(alpha: float, num: int, seed: int) -> dict[str, Any]:
    """Deviations of cos(u·ξ) from exp(−‖u‖^α) in standard errors: in one dimension, and for each direction in three."""
    random = torch.Generator().manual_seed(seed)
    line = stable((num,), alpha, generator=random)
    vectors = isotropic_stable(num, DIMENSION, alpha, generator=random)
    directions = torch.tensor([[1.0, 0, 0], [1, 1, 1], [1, -2, 0.5]], dtype=torch.float64)
    projected = vectors @ (directions / directions.norm(dim=1, keepdim=True)).T
    found = {
        "line": [_deviation(line, alpha, u) for u in FREQUENCIES],
        "largest": max(abs(float(torch.cos(u * line).mean()) - math.exp(-(u**alpha))) for u in FREQUENCIES),
        "directions": [_deviation(x, alpha, u) for x in projected.T for u in FREQUENCIES],
    }
    if alpha == 2:
        ranks = torch.arange(1, num + 1, dtype=torch.float64) / num
        normal = (1 + torch.erf(line.sort().values / 2)) / 2  # variance 2
        found["kolmogorov"] = float((ranks - normal).abs().max()) * math.sqrt(num)
    return found


def _deviation(x: Tensor, alpha: float, u: float) -> float:
    expected = math.exp(-(u**alpha))
    variance = (1 + math.exp(-((2 * u) ** alpha))) / 2 - expected**2
    return (float(torch.cos(u * x).mean()) - expected) / math.sqrt(variance / len(x))


def absolute_values(alpha: float, num: int, seed: int) -> dict[str, Any]:
    """Mean of |ξ|, and deviations of P(|ξ| <= x) from the inverted characteristic function in standard errors."""
    random, total, below = torch.Generator().manual_seed(seed), 0.0, torch.zeros(len(MARKS), dtype=torch.float64)
    marks, part = torch.tensor(MARKS, dtype=torch.float64), num // 4
    for _ in range(4):
        sizes = stable((part,), alpha, generator=random).abs_()
        total += float(sizes.sum())
        below += (sizes.unsqueeze(1) <= marks).sum(dim=0)
    share = torch.tensor([absolute_share(alpha, x) for x in MARKS], dtype=torch.float64)
    deviations = (below / (4 * part) - share) / (share * (1 - share) / (4 * part)).sqrt()
    return {"mean": total / (4 * part), "expected": stable_abs_mean(alpha), "deviations": deviations.tolist()}


def absolute_share(alpha: float, x: float) -> float:
    r"""P(|ξ| <= x) = (2/π) ∫_0^∞ sin(ux)/u exp(−u^α) du, by the trapezoidal rule.

    Source: Gil-Pelaez, Note on the Inversion Theorem, 1951.
    """
    u = torch.linspace(0, 36 ** (1 / alpha), 40001, dtype=torch.float64)
    return float(torch.trapezoid(x * torch.sinc(x * u / math.pi) * torch.exp(-(u**alpha)), u)) * 2 / math.pi


def absolute_median(alpha: float) -> float:
    low, high = 0.5, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if absolute_share(alpha, middle) < 0.5 else (low, middle)
    return (low + high) / 2


def stationary(alpha: float, curvature: float, lr: float, chains: int, steps: int, seed: int) -> dict[str, float]:
    """The characteristic function of `HeavyTailedSGD` on a θ²/2 after many steps, at u = 0.8 / its predicted scale."""
    theta = nn.Parameter(torch.zeros(chains, dtype=torch.float64))
    rule = HeavyTailedSGD([theta], lr=lr, alpha=alpha, sigma=1.0, isotropic=False, seed=seed)
    for _ in range(steps):
        theta.grad = curvature * theta.detach()
        rule.step()
    scale, flow = stable_ou_scale(alpha, curvature, lr=lr), stable_ou_scale(alpha, curvature)
    return {
        "measured": float(torch.cos(0.8 / scale * theta.detach()).mean()),
        "expected": math.exp(-(0.8**alpha)),
        "of the equation": math.exp(-((0.8 * flow / scale) ** alpha)),
    }


class Chains(nn.Module):
    """Independent weights [d] of linear classifiers, a parameter each."""

    def __init__(self, num: int, dim: int) -> None:
        super().__init__()
        self.rows = nn.ParameterList(nn.Parameter(torch.zeros(dim, dtype=torch.float64)) for _ in range(num))

    def forward(self) -> Tensor:
        return torch.stack(list(self.rows))


def logistic_stability(
    num: int, ridge: float, lr: float, alpha: float, sigma: float, chains: int, windows: int, seed: int
) -> dict[str, Any]:
    """Distance of chains whose data differ in one example: means over windows of 5/m, the first of which is left out.

    Ridge logistic regression of even against odd digits on the first `num` of the same order of images for every
    `num`. Chain r has example r replaced by one that is not in the data, and noise of its own.
    """
    images, digits = digit_examples(1797, seed=seed)
    signs = 2.0 * (digits % 2) - 1
    margins = signs.unsqueeze(1) * images  # y x [1797, d]
    data, own, other = margins[:num], margins[:chains], margins[1000 : 1000 + chains]

    def loss(model: nn.Module) -> Tensor:
        theta = model()
        risk = nn.functional.softplus(-(data @ theta.T)).mean(dim=0)
        return (risk + ridge / 2 * theta.square().sum(dim=1)).sum()

    def neighbour(model: nn.Module) -> Tensor:
        theta = model()
        change = nn.functional.softplus(-(other * theta).sum(dim=1)) - nn.functional.softplus(-(own * theta).sum(dim=1))
        return loss(model) + change.sum() / num

    def rule(model: nn.Module) -> HeavyTailedSGD:
        groups = [{"params": [p], "seed": 1000 * seed + r} for r, p in enumerate(model.parameters())]
        return HeavyTailedSGD(groups, lr=lr, alpha=alpha, sigma=sigma)

    window = round(5 / (ridge * lr))
    found = coupled_runs(
        Chains(chains, images.shape[1]),
        (loss, neighbour),
        rule,
        (1 + windows) * window,
        every=max(1, window // 25),
        distance=lambda model, other: float((model() - other()).norm(dim=1).mean()),
    )
    pairs = list(zip(found["step"], found["distance"], strict=True))
    means = []
    for i in range(1, 1 + windows):
        inside = [d for step, d in pairs if i * window < step <= (i + 1) * window]
        means.append(sum(inside) / len(inside))
    return {"time": [step * lr * ridge for step, _ in pairs], "distance": found["distance"], "windows": means}


def scale_differences(alphas: Sequence[float], chains: int, snapshots: int, seed: int) -> list[float]:
    """(s − s') E|ξ| of Euler chains with ηa and ηa' = 1.05 ηa in units of σ η^(1/α), which is W₁ of their laws.

    Scales are medians of |θ| over the median of |ξ|. Both chains take the same noise. A chain depends on a through ηa
    and the unit σ η^(1/α) only, so one simulation serves every a.
    """
    factors = torch.tensor([[1 - CONTRACTION / (1 + RELATIVE_CHANGE)], [1 - CONTRACTION]], dtype=torch.float64)
    settle, gap, found = 150, 30, []
    for alpha in alphas:
        random = torch.Generator().manual_seed(seed)
        theta, seen = torch.zeros(2, chains, dtype=torch.float64), []
        for step in range(1, settle + snapshots * gap + 1):
            theta.mul_(factors).add_(stable((chains,), alpha, generator=random))
            if step > settle and (step - settle) % gap == 0:
                seen.append(theta.abs())
        first, second = torch.cat(seen, dim=1).median(dim=1).values.tolist()
        found.append((first - second) / absolute_median(alpha) * stable_abs_mean(alpha))
    return found


def predicted_difference(alpha: float, curvature: float) -> float:
    """g(α): |ds/da| E|ξ| of the stochastic differential equation with σ = 1."""
    return (alpha * curvature) ** (-1 - 1 / alpha) * stable_abs_mean(alpha)


def shifted_minima(alphas: Sequence[float], curvature: float, lr: float, change: float, steps: int) -> list[float]:
    """Distance of two chains with b' = b + change, for each α."""

    def parabola(b: float):
        return lambda model: curvature / 2 * model.theta.square().sum() - b * model.theta.sum()

    start = nn.Module()
    start.theta = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    return [
        coupled_runs(
            start,
            (parabola(0.0), parabola(change)),
            lambda model, alpha=alpha: HeavyTailedSGD(model.parameters(), lr=lr, alpha=alpha, sigma=1.0),
            steps,
            every=steps,
        )["distance"][-1]
        for alpha in alphas
    ]


def stable_estimates(alpha: float, num: int, size: int, seeds: Sequence[int]) -> dict[str, list[float]]:
    """Log-moment estimates of stable samples, with their intervals, and Hill's."""
    found: dict[str, list[float]] = {"logmoment": [], "low": [], "high": [], "hill": []}
    for seed in seeds:
        samples = stable((num,), alpha, generator=torch.Generator().manual_seed(seed))
        index = tail_index(samples, size=size, seed=seed)
        for name, value in zip(found, (index.estimate, index.low, index.high), strict=False):
            found[name].append(value)
        found["hill"].append(tail_index(samples, method="hill").estimate)
    return found


def linear_model_noise(num: int, size: int, seed: int) -> dict[str, float]:
    """Tail index of the gradient noise Xᵀε / B at the minimum of a linear model with normal noise in its targets."""
    random = torch.Generator().manual_seed(seed)
    design = torch.randn(64, 10, generator=random, dtype=torch.float64)
    noise = torch.randn(num, 64, generator=random, dtype=torch.float64) @ design / 64
    index = tail_index(noise, size=size, seed=seed)
    return {**_ends(index), "lowest": float(index.columns.min()), "highest": float(index.columns.max())}


def multiplicative_noise(lr: float, num: int, size: int, steps: int, seed: int) -> dict[str, float]:
    """Tail index of SGD on (y − θx)²/2 with batches of one, x and y normal and independent: θ ← (1 − ηx²) θ + ηxy."""
    random = torch.Generator().manual_seed(seed)
    theta = torch.zeros(num, dtype=torch.float64)
    for _ in range(steps):
        x, y = torch.randn(2, num, generator=random, dtype=torch.float64)
        theta.add_(lr * x * (y - theta * x))
    return {**_ends(tail_index(theta, size=size, seed=seed)), "hill": float(tail_index(theta, method="hill"))}


def kesten_index(lr: float) -> float:
    """κ > 0 with E|1 − ηx²|^κ = 1 for normal x: P(|θ| > t) falls as t^(−κ).

    Source: Kesten, Random Difference Equations and Renewal Theory for Products of Random Matrices, 1973, theorem 5.
    """
    x = torch.linspace(0, 12, 200001, dtype=torch.float64)
    weight = torch.exp(-x.square() / 2) * math.sqrt(2 / math.pi)
    factor = (1 - lr * x.square()).abs()
    low, high = 0.05, 50.0
    for _ in range(50):
        middle = (low + high) / 2
        above = float(torch.trapezoid(factor**middle * weight, x)) > 1
        low, high = (low, middle) if above else (middle, high)
    return (low + high) / 2


def _ends(index: TailIndex) -> dict[str, float]:
    return {"estimate": index.estimate, "low": index.low, "high": index.high}
