"""Two runs with the same random numbers and different data: how far apart they come to be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def coupled_runs(
    model: nn.Module,
    losses: tuple[Callable[[nn.Module], Tensor], Callable[[nn.Module], Tensor]],
    optimizer: Callable[[nn.Module], Optimizer],
    steps: int,
    *,
    every: int = 1,
    distance: Callable[[nn.Module, nn.Module], Any] | None = None,
) -> dict[str, list[Any]]:
    r"""Distance between two copies of a model, one trained on each loss, along their synchronous coupling.

    Both start at the same weights and take the same random numbers: each optimizer is made anew with the same seed,
    and torch's generators are put back before the second loss of each step. The mean of ‖θ − θ'‖ is an upper bound on
    the Wasserstein-1 distance of the two laws of the weights, the algorithmic stability when the losses differ in one
    example. In one dimension it is equal to it where one step is a monotone map.

    Args:
        model: Not changed.
        losses: Two functions `loss(model)` -> scalar, such as the empirical risks of neighbouring data sets.
        optimizer: `optimizer(model)` -> an optimizer of its parameters, such as `HeavyTailedSGD` with a seed.
        steps: Of each run.
        every: Period of the distances, in steps; the start is left out.
        distance: `distance(model, other)`; None takes the Euclidean one over all parameters.

    Returns:
        "step" and "distance".

    Source: Raj, Zhu, Gürbüzbalaban, Simsekli, Algorithmic Stability of Heavy-Tailed SGD with General Loss Functions,
    2023, which bounds that distance of the laws; the coupling is measured here.
    """
    if steps < 1 or every < 1:
        raise ValueError(f"`steps` is {steps} and `every` {every}; both must be at least 1")
    measured = parameter_distance if distance is None else distance
    models = [copy.deepcopy(model) for _ in losses]
    rules = [optimizer(own) for own in models]
    found: dict[str, list[Any]] = {"step": [], "distance": []}
    for step in range(1, steps + 1):
        random = torch.get_rng_state()
        for own, loss, rule in zip(models, losses, rules, strict=True):
            torch.set_rng_state(random)
            rule.zero_grad()
            loss(own).backward()
            rule.step()
        if step % every == 0:
            with torch.no_grad():
                found["step"].append(step)
                found["distance"].append(measured(*models))
    return found


def parameter_distance(model: nn.Module, other: nn.Module) -> float:
    """‖θ − θ'‖₂ over all parameters."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return float(sum((p - q).double().square().sum() for p, q in pairs)) ** 0.5
