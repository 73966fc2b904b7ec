"""SignSGD and Signum, and the step that all sign methods share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import BaseOptimizer, Group, counted, gradients, group_of, missing_gradient, moment_dtype
from .option_checks import check_number
from .torch_geometry import NoPreconditionerError


class SignSGD(BaseOptimizer):
    r"""θ ← (1 − η λ) θ − η sign(u), with u = g, or u = m ← μ m + (1 − μ) g for a momentum μ > 0 (Signum).

    sign(0) = 0: a coordinate whose u is exactly zero stays where it is. Every other one moves by η, whatever the size
    of its gradient: ‖Δθ‖ = η √n. Scaling the loss, or any coordinate of its gradient, by a positive number changes
    nothing when λ = 0.

    There is no stability threshold. A step has the length η however small the gradient, so the method is not linear
    near a minimum and has no onset of divergence: on a quadratic it ends in a 2-cycle of amplitude η/2 to η at every
    sharpness.

    Args:
        lr: η, the distance each coordinate moves.
        momentum: μ in [0, 1). The buffer is an average; the signs of μ m + g, which other packages keep, are the same.
        weight_decay: λ, decoupled from the gradient.

    Source: Bernstein et al., signSGD: Compressed Optimisation for Non-Convex Problems, 2018, algorithms 1 and 2, whose
    decay is coupled the same way (θ ← θ − η (sign(m) + λ θ)).
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def check_group(self, group: Group) -> None:
        check_sign_group(group)
        check_number("momentum", group["momentum"], least=0, below=1)

    def update(self, group: Group) -> None:
        beta = group["momentum"]
        for p, g in gradients(group):
            state = self.state[p]
            counted(state)
            if beta > 0:
                state["momentum"] = g = averaged(momentum_of(state, p), g, beta)
            sign_step(p, g, group["lr"], group["weight_decay"])

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        """diag(|u|), so that P⁻¹ u = sign(u); ∞ where u = 0, which is where nothing moves.

        Args:
            p: A parameter of this optimizer.
            gradient: What the next step will see. None: P of the last step.

        Raises:
            NoPreconditionerError: a ValueError; `gradient` is None and there is no momentum, which would tell.
        """
        beta = group_of(self, p)["momentum"]
        state = self.state.get(p, {})
        if gradient is not None:
            return magnitude(averaged(momentum_of(state, p), gradient, beta) if beta > 0 else gradient)
        if beta > 0 and "momentum" in state:
            return magnitude(state["momentum"])
        raise gradient_is_gone(self) if p in self.state else missing_gradient(self)


def sign_step(p: Tensor, u: Tensor, lr: float | Tensor, weight_decay: float = 0.0) -> None:
    """p ← (1 − η λ) p − η sign(u), in place, with sign(0) = 0. A NaN of u becomes one of p, where it is seen."""
    lr = float(lr)
    if weight_decay:
        p.mul_(1 - lr * float(weight_decay))
    signs = torch.where(u.isnan(), u, torch.sign(u))
    p.add_(signs.to(p.dtype), alpha=-lr)


def averaged(m: Tensor, g: Tensor, beta: float) -> Tensor:
    """β m + (1 − β) g, in the precision of m."""
    return m.mul(beta).add_(g, alpha=1 - beta)


def momentum_of(state: dict[str, Any], p: Tensor) -> Tensor:
    """The average that a parameter keeps; zero at first, in float32 at least."""
    return state["momentum"] if "momentum" in state else torch.zeros_like(p, dtype=moment_dtype(p))


def magnitude(u: Tensor) -> Tensor:
    """P of a step along sign(u): |u|, and ∞ where u = 0, so that u / P = sign(u) in every coordinate."""
    return u.abs().masked_fill(u == 0, math.inf)


def check_sign_group(group: Group) -> None:
    """Raise where the learning rate or weight decay of a sign method cannot be used."""
    check_number("lr", group["lr"], least=0)
    check_number("weight_decay", group["weight_decay"], least=0)


def gradient_is_gone(optimizer: BaseOptimizer) -> NoPreconditionerError:
    """For the P of the last step of a method that keeps no copy of the gradient it saw."""
    return NoPreconditionerError(
        f"{type(optimizer).__name__} keeps no copy of the last gradient, so P of the last step is not known any more: "
        'pass `gradient` (which="next")'
    )


def theoretical_rates(steps: int, order: int) -> tuple[float, float]:
    """Learning rate γ and momentum θ with the proven exponents, for a run of T steps.

    First order (Signum): γ = T^(-3/4), 1 − θ = T^(-1/2), for a mean l1 gradient norm of O(T^(-1/4)). Second order
    (gradient transport): γ = T^(-5/7), 1 − θ = T^(-4/7), for O(T^(-2/7)). All constants are set to one here.

    Args:
        steps: T, at least 2.
        order: 1 or 2.

    Source: Sun et al., Rethinking SIGN Training, 2023; these are the exponents of normalised SGD with momentum in
    Cutkosky and Mehta, Momentum Improves Normalized SGD, 2020.
    """
    if order not in (1, 2):
        raise ValueError(f"`order` is {order!r}; it must be 1 (momentum) or 2 (gradient transport)")
    check_number("steps", steps, least=2)
    gamma, share = {1: (-3 / 4, -1 / 2), 2: (-5 / 7, -4 / 7)}[order]
    return float(steps**gamma), float(1 - steps**share)
