"""Training on a whole objective, with the sharpness along the way."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...hessian.curvature import Hessian
from ...hessian.tracking import EigenTracker
from ...landscape.objective import Objective
from ..optimizers.closures import needs_closure


def descend(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    steps: int,
    *,
    measure_every: int | None = 1,
    tol: float = 1e-3,
    proof_every: int | None = 25,
    diverged: float = 1e5,
) -> dict[str, Any]:
    """Makes `steps` optimizer steps with the gradient of the whole objective.

    The loss is looked at before every step and after the last. Where it is not finite or above `diverged`, the run
    ends at once.

    Args:
        model: Whose parameters `objective` and `optimizer` have; trained in place.
        optimizer: One that steps from `.grad`.
        measure_every: Steps from one record to the next; the last step is recorded, too. None records the loss of
            every step and no sharpness.
        tol, proof_every: Of the sharpness, λ_max of the Hessian, as for `EigenTracker`.
        diverged: In units of the loss.

    Returns:
        "step", "loss", "sharpness" and its error bar "error", lists of one length, without the last two for
        `measure_every` None; "diverged", whether the run ended early. Its last record has then no sharpness, NaN.

    Raises:
        ValueError: The optimizer evaluates the loss itself, or `steps` or `measure_every` is not positive.
    """
    _check(optimizer, steps, measure_every)
    parameters = dict(model.named_parameters())
    tracker, hessian = EigenTracker(tol=tol, proof_every=proof_every), Hessian(objective)
    found: dict[str, Any] = {"step": [], "loss": [], "diverged": False}
    if measure_every is not None:
        found |= {"sharpness": [], "error": []}
    for step in range(steps + 1):
        loss, gradient = loss_and_gradient(objective)
        found["diverged"] = not loss <= diverged
        last = found["diverged"] or step == steps
        if last or step % (measure_every or 1) == 0:
            found["step"].append(step)
            found["loss"].append(loss)
            if measure_every is not None:
                pairs = None if found["diverged"] else tracker.measure(hessian)
                found["sharpness"].append(math.nan if pairs is None else float(pairs.values[0]))
                found["error"].append(math.nan if pairs is None else float(pairs.value_bounds[0]))
        if last:
            break
        for name, piece in objective.unflatten(gradient).items():
            parameters[name].grad = piece.to(parameters[name].dtype)
        optimizer.step()
    return found


def loss_and_gradient(objective: Objective) -> tuple[float, torch.Tensor]:
    """L(θ) and ∇L(θ), flat [n], from one pass over the data; the loss may be infinite or NaN, unlike `.loss()`."""
    total = torch.zeros(objective.num_parameters, dtype=objective.dtype, device=objective.device)
    loss = torch.zeros((), dtype=torch.float64)
    with objective.evaluation() as theta:
        for chunk in objective.chunks():
            value = objective.raw_loss(chunk, theta)
            total += chunk.weight * objective.join(torch.autograd.grad(value, theta, allow_unused=True))
            loss += chunk.weight * value.detach().double().cpu()
    return float(objective.all_reduce(loss.to(objective.device))), objective.all_reduce(total)


def _check(optimizer: Optimizer, steps: int, measure_every: int | None) -> None:
    if needs_closure(optimizer):
        raise ValueError(
            f"`optimizer` is {type(optimizer).__name__}, which evaluates the loss itself; give one that steps from "
            "`.grad`, such as torch.optim.SGD"
        )
    if steps < 1:
        raise ValueError(f"`steps` is {steps}; give at least 1")
    if measure_every is not None and measure_every < 1:
        raise ValueError(f"`measure_every` is {measure_every}; give at least 1, or None for the loss alone")
