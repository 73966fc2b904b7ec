"""Linear stability of SAM near a minimum: the map of second moments, and closed forms in one dimension."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from ...hessian.mean_square import MeanSquareStability
from ..optimizers.sam import SAM

RHOS = (0.0, 0.05, 0.1, 0.2)
# The example of the closed forms: η, ρ and the curvature h of the cycle.
LR, RHO, CURVATURE = 0.1, 0.5, 5.0


def mean_square_curve(factors: Tensor, lr: float, rho: float, steps: int, moment: Tensor) -> list[Tensor]:
    r"""Second moments E[w wᵀ] [k, k] at steps 0 to `steps` of SAM on ℓ_i = (g_iᵀ w)²/2, one random example a step.

    X ← (1/n) Σ_i J_i X J_i with J_i = I − η (1 + ρ ‖g_i‖²) g_i g_iᵀ; ρ = 0 is SGD.

    Args:
        factors: g_i [n, k].
        lr, rho: η, and ρ of the unnormalised perturbation.
        moment: X at step 0 [k, k].

    Source: derived here; for SGD: Ma and Ying, On Linear Stability of SGD and Input-Smoothness of Neural Networks,
    2021.
    """
    scale = lr * (1 + rho * factors.square().sum(1))
    maps = torch.eye(factors.shape[1], dtype=factors.dtype) - torch.einsum("n,nk,nl->nkl", scale, factors, factors)
    found = [moment]
    for _ in range(steps):
        found.append((maps @ found[-1] @ maps).mean(0))
    return found


def operator_check(seed: int, runs: int = 400_000, simulate: int = 3, steps: int = 60) -> dict[str, Any]:
    """Random g_i in six dimensions, twelve of them: thresholds, radii, and the growth of E‖w‖² a step.

    Args:
        runs, simulate: Runs from isotropic w, and how many steps of them. Later growth is that of ever rarer runs.
        steps: Of the exact growth.

    Returns:
        "thresholds" by ρ of `RHOS`; at the mean of those of SGD and SAM with ρ = 0.1: "sgd" and "sam", the radii;
        "exact" growth of E‖w‖² with SAM in each step, "simulated" with its "error" in the first ones.
    """
    random = torch.Generator().manual_seed(seed)
    g = torch.randn(12, 6, generator=random, dtype=torch.float64)
    stability = MeanSquareStability(g.unsqueeze(-1))
    thresholds = [stability.threshold(1, sampling="without_replacement", rho=rho) for rho in RHOS]
    rho, lr = RHOS[2], (thresholds[0] + thresholds[2]) / 2
    traces = [float(X.trace()) for X in mean_square_curve(g, lr, rho, steps, torch.eye(6, dtype=torch.float64))]
    w = torch.randn(runs, 6, generator=random, dtype=torch.float64)
    simulated, errors = [], []
    scale = lr * (1 + rho * g.square().sum(1))
    for _ in range(simulate):
        before = w.square().sum(1)
        chosen = torch.randint(len(g), (runs,), generator=random)
        w = w - (scale[chosen] * (g[chosen] * w).sum(1)).unsqueeze(1) * g[chosen]
        after = w.square().sum(1)
        growth = float(after.mean() / before.mean())
        simulated.append(growth)
        errors.append(float((after - growth * before).std() / before.mean()) / math.sqrt(runs))
    return {
        "thresholds": thresholds,
        "sgd": stability.radius(lr, 1, sampling="without_replacement"),
        "sam": stability.radius(lr, 1, sampling="without_replacement", rho=rho),
        "exact": [b / a for a, b in itertools.pairwise(traces)],
        "simulated": simulated,
        "error": errors,
    }


def closed_forms() -> dict[str, float]:
    """Full-batch SAM on h x²/2: what its steps do, beside the closed forms.

    Returns:
        "curvature": h at which a step of unnormalised SAM turns x into −x, by bisection; "curvature_formula";
        "amplitude": of the cycle of normalised SAM; "amplitude_formula"; "period": largest |x_(t+2) − x_t| there.
    """

    def stepped(x: float, h: float, times: int, normalize: bool) -> list[float]:
        p = nn.Parameter(torch.tensor([x], dtype=torch.float64))
        optimizer = SAM(torch.optim.SGD([p], lr=LR), rho=RHO, normalize=normalize)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = 0.5 * h * p.square().sum()
            loss.backward()
            return loss

        path = [x]
        for _ in range(times):
            optimizer.step(closure)
            path.append(float(p.detach()))
        return path

    low, high = 0.0, 2 / LR
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if abs(stepped(1.0, middle, 1, False)[-1]) < 1 else (low, middle)
    cycle = stepped(1.0, CURVATURE, 400, True)
    return {
        "curvature": (low + high) / 2,
        "curvature_formula": (-1 + math.sqrt(1 + 8 * RHO / LR)) / (2 * RHO),
        "amplitude": abs(cycle[-1]),
        "amplitude_formula": LR * CURVATURE * RHO / (2 - LR * CURVATURE),
        "period": max(abs(a - b) for a, b in zip(cycle[-20:], cycle[-18:], strict=False)),
    }
