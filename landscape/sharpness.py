"""Sharpness of first order: how much the loss rises nearby, without a second derivative."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .objective import Objective

TINY = 1e-12


class AverageSharpnessEstimate(NamedTuple):
    """
    Attributes:
        estimate: E L(θ + σz) − L(θ).
        stderr: Its standard error; NaN from one pair.
        num_pairs: Pairs ±z behind it.
    """

    estimate: float
    stderr: float
    num_pairs: int


def sam_sharpness(
    objective: Objective,
    rho: float = 0.05,
    adaptive: bool = False,
    ascent_steps: int = 1,
    *,
    loss: float | None = None,
    gradient: Tensor | None = None,
) -> float:
    r"""L(θ + ε) − L(θ) at the point where SAM takes its gradient.

    ε = ρ g / (‖g‖ + 1e-12), or ρ θ² g / (‖|θ| g‖ + 1e-12) elementwise for `adaptive`, with g = ∇L(θ) over all data of
    the objective. With several ascent steps each has radius ρ / `ascent_steps` and a gradient of its own. On a
    quadratic one step gives ρ ‖g‖ + ρ²/2 ĝᵀHĝ, ĝ = g/‖g‖.

    The weights are not touched: θ + ε stands in their place. One gradient per ascent step and two evaluations of the
    loss. It is a difference of two losses, so it carries their rounding, about L(θ) times the machine epsilon.

    Args:
        rho: ρ >= 0, in units of the weights.
        loss, gradient: L(θ), and ∇L(θ) flat [n], where they are known already.

    Returns:
        In units of the loss; negative where the loss falls along its own gradient.

    Source: Foret et al., Sharpness-Aware Minimization, 2021, equations 1 and 2; Kwon et al., ASAM, 2021.
    """
    _check(objective, "rho", rho)
    if isinstance(ascent_steps, bool) or not isinstance(ascent_steps, int) or ascent_steps < 1:
        raise ValueError(f"`ascent_steps` is {ascent_steps!r}; give an integer of at least 1")
    before = objective.loss() if loss is None else loss
    theta = weights_of(objective)
    shift = torch.zeros_like(theta)
    for i in range(ascent_steps):
        if i == 0:
            g = objective.gradient() if gradient is None else gradient.to(theta)
        else:
            g = gradient_at(objective, theta + shift)
        direction = theta.square() * g if adaptive else g
        length = (theta * g if adaptive else g).double().square().sum().sqrt()
        shift += rho / ascent_steps * direction / (length + TINY).to(theta)
    return loss_at(objective, theta + shift) - before


def average_sharpness(
    objective: Objective, sigma: float, num_pairs: int = 8, *, seed: int = 0, loss: float | None = None
) -> AverageSharpnessEstimate:
    r"""E L(θ + σz) − L(θ) over normal z [n], from pairs ±z, which cancel the gradient.

    On a quadratic σ²/2 tr H, and each pair σ²/2 zᵀHz. The weights are not touched. Two losses a pair.

    Args:
        sigma: σ >= 0, in units of the weights.
        num_pairs: At least 1.
        seed: Of z; the same seed gives the same directions at every θ.
        loss: L(θ) where it is known already.

    Source: Neyshabur, Bhojanapalli, McAllester, Srebro, Exploring Generalization in Deep Learning, 2017, section 2.
    """
    _check(objective, "sigma", sigma)
    if isinstance(num_pairs, bool) or not isinstance(num_pairs, int) or num_pairs < 1:
        raise ValueError(f"`num_pairs` is {num_pairs!r}; give an integer of at least 1")
    before = objective.loss() if loss is None else loss
    theta = weights_of(objective)
    generator = torch.Generator(device=theta.device).manual_seed(seed)
    samples = torch.empty(num_pairs, dtype=torch.float64)
    for i in range(num_pairs):
        shift = sigma * torch.randn(len(theta), dtype=theta.dtype, device=theta.device, generator=generator)
        samples[i] = (loss_at(objective, theta + shift) + loss_at(objective, theta - shift)) / 2 - before
    stderr = float(samples.std()) / math.sqrt(num_pairs) if num_pairs > 1 else math.nan
    return AverageSharpnessEstimate(float(samples.mean()), stderr, num_pairs)


def _check(objective: Objective, name: str, radius: float) -> None:
    if isinstance(radius, bool) or not isinstance(radius, int | float) or not 0 <= radius < math.inf:
        raise ValueError(f"`{name}` is {radius!r}; give a finite number of at least 0")
    if objective.captures_tensors:
        raise ValueError(
            "the closure uses its tensors directly, so the loss elsewhere is unknown; write closure(*tensors)"
        )


def weights_of(objective: Objective) -> Tensor:
    """θ as a flat vector [n]."""
    with objective.evaluation() as theta:
        return objective.join([tensor.detach() for tensor in theta])


def _placed(objective: Objective, vector: Tensor) -> list[Tensor]:
    """A flat vector [n] as the tensors that stand for the parameters."""
    with objective.evaluation() as theta:
        return [piece.clone().requires_grad_() for piece in objective.split(vector, theta)]


def loss_at(objective: Objective, vector: Tensor) -> float:
    """L at the weights `vector`."""
    total = torch.zeros((), dtype=torch.float64)
    with objective.evaluation(_placed(objective, vector)) as theta:
        for chunk in objective.chunks():
            total += chunk.weight * objective.chunk_loss(chunk, theta).detach().double().cpu()
    return float(objective.all_reduce(total.to(objective.device)))


def gradient_at(objective: Objective, vector: Tensor) -> Tensor:
    """∇L [n] at the weights `vector`."""
    total = torch.zeros_like(vector)
    with objective.evaluation(_placed(objective, vector)) as theta:
        for chunk in objective.chunks():
            total += chunk.weight * objective.join(
                torch.autograd.grad(objective.chunk_loss(chunk, theta), theta, allow_unused=True)
            )
    return objective.all_reduce(total)
