"""Measured parts of the study of coherence: thresholds at the optimum of a small network, and SGD from there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ...hessian.coherence import coherence
from ...hessian.mean_square import MeanSquareStability
from ...landscape.objective import Objective
from ..workloads.catalogue import HalfSquaredError
from .coherence_family import SAMPLINGS
from .digit_problems import digit_examples

NUM_DIGITS = 32
# The loss at which training stops.
LOSSES = {"squared error": 4e-9, "logistic": 2.8e-5, "squared error, ten outputs": 4e-9}


def trained(loss: str, seed: int) -> tuple[nn.Module, Objective, float]:
    """A tanh network 64-16-1 (or -10) trained by full-batch Adam on 32 digits until its loss is that of `LOSSES`."""
    pixels, labels = digit_examples(1797)
    if "ten" in loss:
        x, y = pixels[:NUM_DIGITS], nn.functional.one_hot(labels[:NUM_DIGITS], 10).double()
    else:
        chosen = torch.nonzero((labels == 3) | (labels == 8)).reshape(-1)[:NUM_DIGITS]
        x, eight = pixels[chosen], (labels[chosen] == 8).double().unsqueeze(1)
        y = eight if loss == "logistic" else 2 * eight - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, y.shape[1])).double()
    criterion = nn.BCEWithLogitsLoss() if loss == "logistic" else HalfSquaredError()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    value = math.inf
    for _ in range(50_000):
        optimizer.zero_grad()
        now = criterion(model(x), y)
        value = float(now.detach())
        if value <= LOSSES[loss]:
            break
        now.backward()
        optimizer.step()
    return model, Objective.supervised(model, criterion, (x, y)), value


def optimum(loss: str, seed: int, batch_sizes: Sequence[int], runs: int) -> dict[str, Any]:
    """Coherence and thresholds at an optimum; for `runs` > 0 also what SGD with one example a step does from there."""
    torch.set_num_threads(1)
    model, objective, value = trained(loss, seed)
    found = coherence(objective)
    thresholds = {
        sampling: [
            [t.exact, t.condition_d, t.theorem1, t.gradient_descent]
            for t in (found.thresholds(size, sampling) for size in batch_sizes)
        ]
        for sampling in SAMPLINGS
    }
    result = {
        "loss": value,
        "sigma": found.sigma,
        "lambda1": found.lambda1,
        "max_lambda1": found.max_lambda1,
        "gradient": float(found.gradient_norms.max()),
        "thresholds": thresholds,
    }
    if runs:
        exact = found.stability.threshold(1, sampling="without_replacement")
        result["restarts"] = {
            str(share): restarted(model, objective, found.stability, share * exact, runs, seed) for share in (0.7, 1.3)
        }
    return result


def restarted(
    model: nn.Module, objective: Objective, stability: MeanSquareStability, lr: float, runs: int, seed: int
) -> dict[str, list[float]]:
    """Mean loss of `runs` runs of SGD, one random example a step, from the weights with noise of size 1e-4.

    "predicted": loss at the weights plus ½ tr(H X) for the second moment X of the linearised steps.
    """
    random = torch.Generator().manual_seed(seed)
    [(x, y)] = [chunk.batch for chunk in objective.chunks()]
    criterion, noise, steps = HalfSquaredError(), 1e-4, 20

    def loss(weights: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return criterion(functional_call(model, weights, (inputs,)), targets)

    weights = {
        name: p.detach() + noise * torch.randn(runs, *p.shape, generator=random, dtype=p.dtype)
        for name, p in model.named_parameters()
    }
    found: dict[str, list[float]] = {"mean": [], "error": [], "predicted": []}
    moment = noise**2 * torch.eye(stability.rank, dtype=torch.float64)
    floor = objective.loss()
    for step in range(steps + 1):
        with torch.no_grad():
            losses = vmap(loss, in_dims=(0, None, None))(weights, x, y)
        found["mean"].append(float(losses.mean()))
        found["error"].append(float(losses.std()) / math.sqrt(runs))
        found["predicted"].append(floor + 0.5 * float(stability.eigenvalues @ moment.diagonal()))
        if step == steps:
            break
        chosen = torch.randint(0, len(x), (runs,), generator=random)
        gradients = vmap(grad(loss))(weights, x[chosen].unsqueeze(1), y[chosen].unsqueeze(1))
        weights = {name: w - lr * gradients[name] for name, w in weights.items()}
        moment = stability.advanced(moment, lr, 1, sampling="without_replacement")
    return found
