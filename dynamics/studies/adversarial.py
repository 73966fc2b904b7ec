"""Attacks on inputs by projected gradient ascent within a box."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def pgd_attack(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    *,
    radius: float,
    step: float,
    num_steps: int = 10,
    limits: tuple[float, float] = (0.0, 1.0),
    random_start: torch.Generator | None = None,
) -> Tensor:
    r"""x + δ with ‖δ‖_∞ <= ε that raises the loss: δ ← clip(δ + α sign ∇_x ℓ), within ε and within the inputs' range.

    Gradients of the parameters, flags and buffers are left as found.

    Args:
        loss: loss(output, targets), a mean over the examples or a sum.
        inputs: x [b, ...], within `limits`.
        radius: ε, in units of the inputs.
        step: α.
        num_steps: Of ascent.
        limits: Range of the inputs.
        random_start: Draws a first δ, uniform in the box; None starts at x.

    Returns:
        [b, ...], without a graph.

    Source: Madry, Makelov, Schmidt, Tsipras, Vladu, Towards Deep Learning Models Resistant to Adversarial Attacks,
    2018, section 2.1.
    """
    x = inputs.detach()
    low, high = (x - radius).clamp(min=limits[0]), (x + radius).clamp(max=limits[1])
    attacked = x.clone()
    if random_start is not None:
        shift = 2 * torch.rand(x.shape, generator=random_start, dtype=x.dtype) - 1
        attacked = torch.clamp(x + radius * shift, low, high)
    for _ in range(num_steps):
        attacked.requires_grad_()
        with torch.enable_grad():
            [gradient] = torch.autograd.grad(loss(model(attacked), targets), attacked)
        attacked = torch.clamp(attacked.detach() + step * gradient.sign(), low, high)
    return attacked
